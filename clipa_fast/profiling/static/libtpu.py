"""libtpu in this process: its environment, the folder its dumps go to, and the topologies it describes.

libtpu reads its flags once, when it is first loaded. So one folder takes the dumps of every compilation of the process,
and the files of one compilation are those that appeared while it ran.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from clipa_fast.errors import UserError

_DUMP_FLAGS = (
    "--xla_jf_dump_to={folder}",
    "--xla_jf_dump_llo_text=true",
    "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*",  # the last pass only: some 20 files, not 800
)
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # libtpu's lock file would let one process at a time compile
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


def is_available() -> bool:
    """Whether the libtpu package is installed."""
    return importlib.util.find_spec("libtpu") is not None


@functools.cache
def dump_folder() -> Path:
    """Folder of this process that libtpu writes its dumps to; the first call sets libtpu up, at exit it is removed."""
    if not is_available():
        raise UserError(
            "compiling for TPU needs libtpu, which is not installed: pip install clipa-fast[tpu] (no TPU is needed)"
        )
    if _is_loaded():
        raise UserError(
            "libtpu was loaded in this process before the static profiler could ask it for dumps (it reads its flags "
            "once): call clipa_fast.profiling.prepare() before the first use of a TPU or of a TPU topology, or profile "
            "in a process of its own"
        )
    folder = Path(tempfile.mkdtemp(prefix="clipa-fast-profile-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    dumps, logs = folder / "dumps", folder / "logs"
    dumps.mkdir()
    logs.mkdir()
    for name, value in _ENVIRONMENT.items():
        # Away from a TPU, importing jax may leave a warning as the value.
        if os.environ.get(name, "WARNING").startswith("WARNING"):
            os.environ[name] = value
    os.environ.setdefault("TPU_LOG_DIR", str(logs))
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    flags = " ".join(flag.format(folder=dumps) for flag in _DUMP_FLAGS)
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
    return dumps


def _is_loaded() -> bool:
    """Whether the shared library is mapped into this process."""
    maps = Path("/proc/self/maps")
    return maps.exists() and "libtpu.so" in maps.read_text()


@functools.cache
def topology_devices(name: str) -> tuple:
    """The devices of a described topology such as ``"v5e:4x4"``; they can be compiled for, not run on."""
    dump_folder()
    from jax.experimental import topologies

    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def prepare() -> None:
    """Sets libtpu up for profiling; needed only before something else of the process loads it."""
    dump_folder()
