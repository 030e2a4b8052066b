"""How a process that moves much data keeps its memory."""

import ctypes
from typing import Final

# Of glibc's mallopt(3): blocks below this come from the heap (glibc allows no more), and so much of the heap's free end is kept.
HEAP_BLOCK_BYTES_MAX: Final = 32 * 1024 * 1024
FREE_BYTES_KEPT: Final = 128 * 1024 * 1024

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3


def keep_freed() -> None:
    """Use freed memory again in place of giving it back to the system after every batch. By default an array of some megabytes is
    mapped anew each time, and the page faults cost several times what is computed on it. Does nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES_MAX)
        mallopt(_M_TRIM_THRESHOLD, FREE_BYTES_KEPT)
