"""The libraries that were compiled of one C source, each for another instruction set."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from trainer.compiled import library_of

CPUINFO = Path("/proc/cpuinfo")
FLAGS = {"default": None, "avx2": "avx2", "avx512": "avx512vl"}  # what a processor must have, by instruction set


def each_library(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Has a module compute by each library that this machine can use, one after the other; yields its name."""
    there = CPUINFO.read_text().split() if CPUINFO.exists() else []
    for name, flag in FLAGS.items():
        if flag is None or flag in there:
            library = module.load(library_of(module.SOURCE, name))
            assert library is not None
            monkeypatch.setattr(module, "_library", library)
            yield name
