"""What is in C is compiled where it can be, and is what its source says."""

import shutil
import subprocess
from pathlib import Path

import pytest

from trainer import decoding, tilting
from trainer.compiled import instructions_of_torch, library_of
from trainer.losses import kernel

SOURCES = (kernel.SOURCE, tilting.SOURCE, decoding.SOURCE)
pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
    pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name),
]


def test_an_installation_with_a_compiler_has_it(source: Path) -> None:
    module = {of.SOURCE: of for of in (kernel, tilting, decoding)}[source]
    assert module.is_loaded()
    for instructions in {"default", instructions_of_torch()}:
        library = library_of(source, instructions)
        newest = max(of.stat().st_mtime for of in (source, *source.parent.glob("*.h")))
        assert library.stat().st_mtime >= newest, "older than its source: make install"


def test_the_source_has_no_warnings(source: Path, tmp_path: Path) -> None:
    flags = "-std=gnu11 -fopenmp-simd -Wall -Wextra -Wconversion -Wno-sign-conversion -Wno-float-conversion -Werror"
    command = ["cc", *flags.split(), "-c", str(source), "-o", str(tmp_path / "compiled.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
