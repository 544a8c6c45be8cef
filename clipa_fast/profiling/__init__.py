"""Static profiler: what a jitted function would cost on a TPU, estimated on a machine without one.

``compile_for_tpu`` compiles with libtpu and reads times from the program that the chip would run. Everything it says is
a static estimate: nothing runs.
"""

from clipa_fast.profiling.static.communication import Collective
from clipa_fast.profiling.static.compile import compile_for_tpu, tpu_mesh
from clipa_fast.profiling.static.libtpu import is_available, prepare
from clipa_fast.profiling.static.profile import Op, Profile
from clipa_fast.profiling.static.self_check import Check, format_checks, self_check

__all__ = [
    "Check",
    "Collective",
    "Op",
    "Profile",
    "compile_for_tpu",
    "format_checks",
    "is_available",
    "prepare",
    "self_check",
    "tpu_mesh",
]
