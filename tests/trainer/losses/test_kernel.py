"""The compiled kernel gives what torch does, and is left aside where it has no place."""

import pytest
import torch

from tests.trainer.instructions import each_library
from trainer.losses import bmc_loss, density_bmc_loss, kernel, mixture_of_outputs


@pytest.mark.skipif(not kernel.is_loaded(), reason="the kernel is not compiled here")
def test_every_instruction_set_gives_the_same_within_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, labels = torch.randn(64, 13, generator=generator), torch.randn(600, generator=generator)
    answers = []
    for _ in each_library(kernel, monkeypatch):
        mixture = mixture_of_outputs(outputs.requires_grad_(), 4, (0.02, 1.5))
        loss = density_bmc_loss(mixture, labels[:64], memory=labels[64:], reduction="none")
        single = bmc_loss(mixture.location, labels[:64], 0.3, memory=labels[64:], reduction="none")
        answers.append([loss, single, *torch.autograd.grad((loss + single).sum(), outputs)])
    for other in answers[1:]:
        for a, b in zip(other, answers[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", ["all", "location"])
def test_a_mixture_and_its_gradient_are_those_of_torch(grad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = (3 * torch.randn(50, 10, generator=torch.Generator().manual_seed(1))).requires_grad_()
    results = []
    for by_torch in (True, False):
        if by_torch:
            monkeypatch.setattr(kernel, "_library", None)
        mixture = mixture_of_outputs(outputs, 3, (0.1, 2.0))
        parts = mixture if grad == "all" else (mixture.location,)
        weights = [torch.linspace(-1, 2, part.numel()).view_as(part) for part in parts]
        total = sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True))
        results.append([*mixture, *torch.autograd.grad(total, outputs)])
        monkeypatch.undo()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert float((outputs[:, 6:9] < -2.3).float().mean()) > 0.05  # some scales are clamped


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_what_is_traced_is_left_to_torch() -> None:
    pred, target = torch.randn(2, 40)
    compiled = torch.compile(lambda p: bmc_loss(p, target, 0.5), backend="eager")
    torch.testing.assert_close(compiled(pred), bmc_loss(pred, target, 0.5))


def test_only_float32_on_a_cpu_is_taken() -> None:
    assert not kernel.takes(torch.zeros(1).double())
    assert not kernel.takes(torch.zeros(1, device="meta"))
