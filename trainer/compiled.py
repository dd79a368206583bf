"""Where the build puts what it compiled of a C source: beside it, a library for each of several instruction sets."""

import sysconfig
from pathlib import Path


def library_of(source: Path, instructions: str) -> Path:
    """The library of a source for an instruction set; `default` runs everywhere."""
    return source.with_name(f"{source.stem}.{sysconfig.get_platform()}.{instructions}.so")


def instructions_of_torch() -> str:
    """The instruction set that torch uses on this machine."""
    import torch  # which takes a second, and decoding does without

    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "default")
