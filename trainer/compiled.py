"""Where the build puts what it compiled of a C source: beside it, a library for each of several instruction sets."""

import ctypes
import re
import sysconfig
import zlib
from pathlib import Path


def library_of(source: Path, instructions: str) -> Path:
    """The library of a source for an instruction set; `default` runs everywhere.

    Its name has a checksum of what it was made of, so that one of another version is none.
    """
    return source.with_name(f"{source.stem}.{sysconfig.get_platform()}.{instructions}.{_checksum(source):08x}.so")


def opened(path: Path, function: str) -> ctypes.CDLL | None:
    """The library at a path, or None if it is not there, is not for this machine, or lacks a function."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    return library if hasattr(library, function) else None


def _checksum(source: Path) -> int:
    """CRC-32 of a source and what it includes; of nothing where it is not there."""
    if not source.exists():
        return 0
    text = source.read_bytes()
    included = re.findall(rb'^#include "(.+)"', text, re.MULTILINE)
    return zlib.crc32(b"".join([text, *((source.parent / name.decode()).read_bytes() for name in included)]))


def instructions_of_torch() -> str:
    """The instruction set that torch uses on this machine."""
    import torch  # which takes a second, and decoding does without

    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "default")
