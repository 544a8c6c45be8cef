"""SIGKILL at random times; `python -m bench kill_rounds --rounds 20` is the long version."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(tmp_path):
    command = [sys.executable, "-m", "bench", "kill_rounds", "--rounds", "4", "--steps", "300"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        command,
        cwd=root,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every restart worked" in done.stdout
