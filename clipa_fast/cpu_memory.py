"""Keeps freed memory in the process, so that a CPU train step does not fault its buffers in anew each time.

XLA's CPU backend allocates a step's temporaries afresh and frees them after it. glibc maps such large blocks from the
kernel and hands them back, which costs a page fault per 4 KiB: hundreds of thousands a step, a quarter of the time of
an S/16 step. Told to use one heap and never to trim it, glibc gives the next step the same warm pages.
"""

from __future__ import annotations

import ctypes
import sys

# Parameter numbers of mallopt in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Sets glibc's allocator for large, repeated allocations. Call it before jax makes its CPU client.

    The process then keeps its peak memory until it ends.

    Returns:
      Whether it was set; False where the C library is not glibc.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    # -1 as a size is the largest there is: never trim.
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    return all(mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings)
