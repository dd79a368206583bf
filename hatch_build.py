"""Compiles what is in C with the C compiler of the machine, for wheels and for editable installs alike.

A library of each source for each instruction set; the module of the same name takes the one that the machine it runs on
can use. Without a compiler, or where it fails, the package is pure Python, and torch and msgspec do the same several
times slower; `TAILSTREAM_KERNEL=require` makes that an error. `CC` names another compiler.
"""

import os
import platform
import runpy
import shlex
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = [Path("trainer/losses/kernel.c"), Path("trainer/tilting.c"), Path("trainer/decoding.c")]
# No option that lets a compiler reorder or assume what the source does not say: -ffast-math, -march=native.
FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-shared", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
# By torch's names for what a CPU can do.
INSTRUCTIONS = {"default": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTIONS |= {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}


class KernelBuildHook(BuildHookInterface[Any]):
    """Puts `NAME.PLATFORM.INSTRUCTIONS.CHECKSUM.so` beside each `NAME.c`, and into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; a failure leaves no library, rather than an old one."""
        target = sysconfig.get_platform()
        for source in SOURCES:
            for old in (Path(self.root) / source.parent).glob(f"{source.stem}.{target}.*.so"):
                old.unlink()  # programs that run with it keep it
        library_of = runpy.run_path(str(Path(self.root) / "trainer/compiled.py"))["library_of"]
        try:
            for source in SOURCES:
                self._compile(Path(self.root) / source, library_of)
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("TAILSTREAM_KERNEL") == "require":
                raise
            self.app.display_warning(f"{source} was not compiled ({error}): Tailstream will do without, slower")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{target.replace('-', '_').replace('.', '_')}"
        build_data["artifacts"] += [f"{source.with_suffix('')}.{target}.*.so" for source in SOURCES]

    def _compile(self, source: Path, library_of: Callable[[Path, str], Path]) -> None:
        compiler = shlex.split(os.environ.get("CC", "cc"))
        with tempfile.TemporaryDirectory(dir=source.parent) as folder:
            for name, options in INSTRUCTIONS.items():
                library = Path(folder) / library_of(source, name).name
                subprocess.run([*compiler, *FLAGS, *options, str(source), "-o", str(library), "-lm"], check=True)
            for library in sorted(Path(folder).iterdir()):
                library.rename(source.with_name(library.name))
