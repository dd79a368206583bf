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
        assert library_of(source, instructions).exists(), "make install"


def test_a_library_of_another_version_is_none(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / source.parent.name
    folder.mkdir()
    for file in (source, *source.parent.glob("*.h"), *source.parents[1].glob("*.h")):
        shutil.copy(file, folder if file.parent == source.parent else tmp_path)
    copy = folder / source.name
    assert library_of(copy, "default").name == library_of(source, "default").name
    names = {library_of(copy, "default").name}
    for file in (copy, *tmp_path.rglob("*.h")):
        file.write_text(file.read_text() + "\n")
        names.add(library_of(copy, "default").name)
    assert len(names) == 1 + 1 + (b'#include "' in source.read_bytes())


def test_the_source_has_no_warnings(source: Path, tmp_path: Path) -> None:
    flags = "-std=gnu11 -fopenmp-simd -Wall -Wextra -Wconversion -Wno-sign-conversion -Wno-float-conversion -Werror"
    command = ["cc", *flags.split(), "-c", str(source), "-o", str(tmp_path / "compiled.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
