"""What else the machine does while something is timed."""

from __future__ import annotations

import os
from pathlib import Path


def busy_seconds() -> float:
    """CPU time of all processes since boot; 0 where the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, *_ = map(int, fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def own_seconds(pid: int | str = "self") -> float:
    """CPU time of one process so far; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def processor() -> str:
    """What this machine's CPU is called, and how many cores may be used."""
    names = [
        row.split(":", 1)[1].strip()
        for row in (Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else "").splitlines()
        if row.startswith("model name")
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else 'CPU'}, {cores} cores"
