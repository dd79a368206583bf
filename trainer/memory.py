"""What a process does with its memory: what it has freed stays with it, and what stays is not searched for garbage.

glibc returns large blocks to the system at once and takes them anew a moment later. In a process of several threads
each return interrupts the other processors, and each page taken anew is a fault: some thousands of them a batch.
"""

import atexit
import ctypes
import gc
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


def freeze_heap() -> None:
    """Has garbage collections pass over all that there is by now: what was imported and made stays with the process.

    There are a few hundred thousand objects where torch was imported. A full collection looks at each of them, which
    takes a fifth of a second; and the many objects of which records are made bring it about again and again.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # what is never looked at is never let go of, and some libraries then report a leak
