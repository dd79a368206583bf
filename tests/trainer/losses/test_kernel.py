"""The compiled kernel is there where it can be, is what its source says, and is left aside where it has no place."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from trainer.losses import bmc_loss, kernel

SOURCE = Path(kernel.__file__).with_name("kernel.c")


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_an_installation_with_a_compiler_has_the_kernel() -> None:
    assert kernel.is_loaded()
    assert kernel.LIBRARY.stat().st_mtime >= SOURCE.stat().st_mtime, "older than its source: make install"


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_source_has_no_warnings(tmp_path: Path) -> None:
    flags = "-std=gnu11 -fopenmp-simd -Wall -Wextra -Wconversion -Wno-sign-conversion -Wno-float-conversion -Werror"
    command = ["cc", *flags.split(), "-c", str(SOURCE), "-o", str(tmp_path / "kernel.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not kernel.is_loaded(), reason="the kernel is not compiled here")
def test_every_instruction_set_of_this_machine_gives_the_same_within_rounding() -> None:
    library = ctypes.CDLL(str(kernel.LIBRARY))
    flags = set(re.findall(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split())
    names = ["default", *(["avx2"] if "avx2" in flags else []), *(["avx512"] if "avx512vl" in flags else [])]
    generator = torch.Generator().manual_seed(0)
    reference, labels = torch.randn(2, 5000, generator=generator)
    mirror, rest = -reference, torch.zeros(5000)
    answers = []
    for name in names:
        outputs = torch.empty(3, 5000)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (reference, mirror, rest, labels)]
        counts = [ctypes.c_int64(5000)] * 2
        library[f"shifted_rows_{name}"](
            *counts, *pointers, ctypes.c_float(-3.0), *(ctypes.c_void_p(o.data_ptr()) for o in outputs)
        )
        answers.append(outputs)
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kernel.shifted_rows(reference, mirror, rest, labels, -3.0), tuple(answers[-1].unbind()))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_what_is_traced_is_left_to_torch() -> None:
    pred, target = torch.randn(2, 40)
    compiled = torch.compile(lambda p: bmc_loss(p, target, 0.5), backend="eager")
    torch.testing.assert_close(compiled(pred), bmc_loss(pred, target, 0.5))


def test_only_float32_on_a_cpu_is_taken() -> None:
    assert not kernel.takes(torch.zeros(1).double())
    assert not kernel.takes(torch.zeros(1, device="meta"))
