"""That memory which was freed is used again, as the system counts it."""

import subprocess
import sys

import pytest

# Blocks by the C library itself: where torch's come to lie is not for a test to say.
FAULTS = """
import ctypes
import resource
from trainer.memory import keep_freed

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
if {kept}:
    keep_freed()

def round_of(blocks: int, size: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [libc.malloc(size) for _ in range(blocks)]
    for block in held:
        libc.memset(block, 1, size)
    for block in held:
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print([round_of(20, 4 << 20) for _ in range(6)][-1])
"""


def faults(kept: bool) -> int:
    """Pages faulted in when 80 MiB in blocks of 4 are taken and given back for the sixth time."""
    script = FAULTS.format(kept=kept)
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_pages_that_were_freed_are_not_faulted_in_again() -> None:
    assert faults(kept=False) > 10_000
    assert faults(kept=True) < 100


COLLECTED = """
import gc
from trainer.memory import freeze_heap

made = [[number] for number in range(100_000)]
if {frozen}:
    freeze_heap()
print(len(gc.get_objects()))
"""


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_frozen_is_not_searched_for_garbage(frozen: bool) -> None:
    script = COLLECTED.format(frozen=frozen)
    searched = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert (searched < 10_000) == frozen
