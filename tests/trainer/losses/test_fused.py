"""The kernels for CUDA devices give what torch does: on a device where there is one, else in Triton's interpreter."""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trainer.losses import Mixture, bmc_loss, density_bmc_loss, density_nll_loss, fused, kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
with pytest.MonkeyPatch.context() as patched:
    if DEVICE.type == "cpu":
        patched.setenv("TRITON_INTERPRET", "1")  # read as Triton is imported, and later
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
    KERNELS = importlib.import_module("trainer.losses.fused_rows")
ON_CUDA = [pytest.mark.cuda, pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")]
Answers = list[Tensor]


@pytest.fixture
def both_ways(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Answers]], tuple[Answers, Answers]]:
    """What a function gives by the fused kernels, and by torch."""
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernel, "_library", None)

    def give(function: Callable[[], Answers]) -> tuple[Answers, Answers]:
        answers = []
        for taken in (True, False):
            monkeypatch.setattr(fused, "_kernels", lambda: KERNELS)
            monkeypatch.setattr(fused, "takes", lambda *given, taken=taken: taken and is_float32(*given))
            answers.append(function())
        return answers[0], answers[1]

    return give


def is_float32(*given: Tensor) -> bool:
    return all(tensor.dtype == torch.float32 for tensor in given)


def assert_close(answers: tuple[Answers, Answers]) -> None:
    for by_kernel, by_torch in zip(*answers, strict=True):
        assert bool(by_torch.isfinite().all())
        torch.testing.assert_close(by_kernel, by_torch, rtol=2e-5, atol=2e-6 * max(1.0, float(by_torch.abs().max())))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("sigma_gradient", ["likelihood", "moments"])
@pytest.mark.parametrize("sigma", [0.02, 0.4, 5.0])
@pytest.mark.parametrize(("rows", "more"), [(1, 3), (7, 600), pytest.param(3000, 300, marks=ON_CUDA)])
def test_balanced_mse(both_ways, rows: int, more: int, sigma: float, sigma_gradient: str) -> None:
    target, memory, pred = drawn(rows).exp(), drawn(more, seed=1).exp(), drawn(rows, seed=2)
    pred[rows // 2] = 60.0  # far from every label
    if rows > 1:
        pred[0], pred[1], target[2] = torch.nan, torch.inf, -torch.inf
    memory[1:2] = torch.nan

    def answers() -> Answers:
        p, s = pred.clone().requires_grad_(), torch.tensor(sigma, device=DEVICE, requires_grad=True)
        given = {"memory": memory, "sigma_gradient": sigma_gradient}
        rows_of = bmc_loss(p, target, s, **given, reduction="none")
        loss = bmc_loss(p, target, s, **given)
        (loss + rows_of @ torch.linspace(0, 1, rows, device=DEVICE)).backward()
        return [loss.detach(), rows_of.detach(), p.grad, s.grad]

    assert_close(both_ways(answers))


@pytest.mark.parametrize("components", [1, 3, pytest.param(17, marks=ON_CUDA)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("variances", [False, True])
@pytest.mark.parametrize("given_scale", [False, True])
@pytest.mark.parametrize("likelihood", [False, True])
def test_mixtures(
    both_ways, components: int, weighted: bool, variances: bool, given_scale: bool, likelihood: bool
) -> None:
    rows, more = 8, 60
    target, memory = drawn(rows), drawn(more, seed=1)
    logits, offsets, log_scales = drawn(3, rows, components, seed=2)
    location = drawn(rows, seed=3)
    location[2], offsets[3, 0], target[4], memory[5] = torch.nan, torch.inf, torch.nan, torch.inf
    location[6] = 40.0  # far from every label, in scales
    log_weights = drawn(more, seed=4)
    log_weights[7:9] = -torch.inf
    scale = drawn(rows, seed=5).exp() if given_scale else None

    def answers() -> Answers:
        parts = [logits.log_softmax(1), location[:, None] + offsets, log_scales - 1, location]
        parts = [part.clone().requires_grad_() for part in parts]
        mixture = Mixture(*parts)
        given = {"row_scale": scale, "location_weight": 0.7, "reduction": "none"}
        if likelihood:
            loss = density_nll_loss(mixture, target, weights=target.exp().nan_to_num() if weighted else None, **given)
        else:
            given |= {"memory": memory, "memory_weight": 3.5}
            given |= {"memory_log_weights": log_weights} if weighted else {}
            given |= {"memory_variances": memory.square() * 0.1} if variances else {}
            loss = density_bmc_loss(mixture, target, **given)
        (loss @ torch.linspace(0.1, 1, rows, device=DEVICE)).backward()
        return [loss.detach(), *(part.grad for part in parts)]

    assert_close(both_ways(answers))


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
def test_on_cuda_the_kernels_are_taken() -> None:
    assert fused.takes(drawn(3))
    assert not fused.takes(drawn(3).double())
