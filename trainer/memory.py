"""Memory that a process has freed stays with it, to be used again.

glibc returns large blocks to the system at once and takes them anew a moment later. In a process of several threads
each return interrupts the other processors, and each page taken anew is a fault: some thousands of them a batch.
"""

import ctypes
import sys
from contextlib import suppress
from typing import Final

# Of mallopt(3).
M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
LARGEST_BLOCK: Final = 32 << 20  # that is taken from the heap, the most that glibc allows
MOST_KEPT: Final = 256 << 20  # free at the heap's end


def keep_freed() -> None:
    """Has the C library keep what it is given back, up to `MOST_KEPT`; nothing where it is not glibc."""
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
        mallopt(M_TRIM_THRESHOLD, MOST_KEPT)
