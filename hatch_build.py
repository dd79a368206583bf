"""Compiles the losses' kernel with the C compiler of the machine, for wheels and for editable installs alike.

Without a compiler, or where it fails, the package is pure Python and the losses do the same with torch, several times
slower; `TAILSTREAM_KERNEL=require` makes that an error. `CC` names another compiler.
"""

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("trainer/losses/kernel.c")
# No option that lets a compiler reorder or assume what the source does not say (-ffast-math, -march=native).
FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-shared", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]


class KernelBuildHook(BuildHookInterface[Any]):
    """Puts `kernel.PLATFORM.so` beside its source, and into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; a failure leaves no library, rather than an old one."""
        platform = sysconfig.get_platform()
        source = Path(self.root) / SOURCE
        library = source.with_name(f"kernel.{platform}.so")
        fresh = library.with_suffix(f".{os.getpid()}")
        compiler = shlex.split(os.environ.get("CC", "cc"))
        try:
            subprocess.run([*compiler, *FLAGS, str(source), "-o", str(fresh), "-lm"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            library.unlink(missing_ok=True)
            if os.environ.get("TAILSTREAM_KERNEL") == "require":
                raise
            self.app.display_warning(f"{SOURCE} was not compiled ({error}): the losses will do without, slower")
            return
        fresh.replace(library)  # programs that run with the old one keep it
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform.replace('-', '_').replace('.', '_')}"
        build_data["artifacts"].append(f"{SOURCE.parent}/{library.name}")
