"""Several processes as one run: starting JAX's distributed runtime, and agreeing on things.

Everything here does nothing in a run of one process.
"""

from __future__ import annotations

import importlib.util
import os
import zlib
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from clipa_fast.errors import UserError


def initialize(coordinator: str | None = None, process_id: int | None = None, num_processes: int | None = None) -> None:
    """Starts the distributed runtime where this process is one of several. Call it before any other use of jax.

    Given flags say so; else SLURM (under srun), Open MPI and TPU slices are recognised by their environment, and jax
    learns the rest there.

    Args:
      coordinator: HOST:PORT of process 0, reachable from all.
      process_id: 0 to num_processes - 1.
      num_processes: how many run.

    Raises:
      UserError: some of the three are missing or out of range, or the coordinator cannot be reached.
    """
    given = {"coordinator": coordinator, "process_id": process_id, "num_processes": num_processes}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise UserError(f"{', '.join(missing)}: missing; accepted: all of {', '.join(given)}, or none of them")
    if missing:
        if _in_cluster(os.environ):
            jax.distributed.initialize()
        return
    assert coordinator is not None
    assert process_id is not None
    assert num_processes is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"coordinator: got {coordinator!r}; accepted: HOST:PORT")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise UserError(
            f"process_id: got {process_id} of num_processes {num_processes}; accepted: 0 to num_processes - 1"
        )
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except RuntimeError as error:
        raise UserError(f"coordinator: no run at {coordinator}: {str(error).splitlines()[0]}") from error


def _in_cluster(environment: os._Environ[str] | dict[str, str]) -> bool:
    """Whether a launcher started several processes, of which this is one."""
    # Only srun sets the number of tasks of a step; a shell within an allocation has that of the job alone.
    tasks = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(int(environment.get(name) or 1) > 1 for name in tasks):
        return True
    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or importlib.util.find_spec("libtpu") is None:
        return False
    return any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))


def is_first() -> bool:
    """Whether this process writes what one process alone may write."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.process_count() > 1


def wait_for_all(name: str) -> None:
    """Returns once every process has called it; `name` tells one such place from another."""
    if several():
        multihost_utils.sync_global_devices(name)


def all_agree(ok: bool) -> bool:
    """Whether `ok` holds in every process."""
    return bool(_gathered(int(ok)).all())


def check_equal(text: str, what: str) -> None:
    """Raises UserError in every process unless `text` is the same in all; `what` opens the message."""
    digests = _gathered(zlib.crc32(text.encode()))
    if len(set(digests.tolist())) > 1:
        raise UserError(f"{what} differs between the {jax.process_count()} processes; it must be the same for all")


def _gathered(number: int) -> np.ndarray:
    if not several():
        return np.array([number])
    return np.asarray(multihost_utils.process_allgather(np.uint32(number))).reshape(-1)
