"""No host sync: on torch's meta device `.item()`, boolean indexing and copies to a CPU raise, as does a CPU tensor."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tests.trainer.waiting import nothing_waits_for_cuda
from trainer.losses import (
    BMCLoss,
    ClassCounts,
    IBLoss,
    InverseDensityWeights,
    LabelHistogram,
    LabelMixture,
    Mixture,
    NoiseSigma,
    StreamIBLoss,
    balanced_log_probabilities,
    bmc_loss,
    bni_loss,
    cross_entropy_loss,
    density_bmc_loss,
    density_nll_loss,
    focal_loss,
    fused,
    gai_loss,
    huber_loss,
    influence_balanced_loss,
    l1_loss,
    logit_adjusted_loss,
    mse_loss,
)

ROWS, MEMORY, COMPONENTS, CLASSES = 48, 80, 4, 6
Make = Callable[..., Tensor]


def bmc(make: Make, device: str) -> Tensor:
    noise = NoiseSigma("learned").to(device, non_blocking=True)
    return bmc_loss(make(ROWS), make(ROWS), noise.value(), memory=make(MEMORY), memory_log_weights=make(MEMORY))


def bmc_by_moments(make: Make, device: str) -> Tensor:
    return bmc_loss(make(ROWS), make(ROWS), make(), memory=make(MEMORY), sigma_gradient="moments")


def gai_by_moments(make: Make, device: str) -> Tensor:
    mixture = LabelMixture(COMPONENTS).to(device, non_blocking=True)
    mixture.observe(make(ROWS))
    return gai_loss(make(ROWS), make(ROWS), make(), mixture, sigma_gradient="moments")


def bmc_without_memory(make: Make, device: str) -> Tensor:
    return BMCLoss(8.0).to(device, non_blocking=True)(make(ROWS, 1), make(ROWS))


def bmc_two_dimensions(make: Make, device: str) -> Tensor:
    noise = NoiseSigma("adaptive").to(device, non_blocking=True)
    noise.observe(make(ROWS))
    noise.rescale(make())
    return bmc_loss(make(ROWS, 2), make(ROWS, 2), noise.value(), memory=make(MEMORY, 2))


def head(make: Make) -> Mixture:
    log_pi = torch.log_softmax(make(ROWS, COMPONENTS), 1)
    return Mixture(log_pi, make(ROWS, COMPONENTS), make(ROWS, COMPONENTS), make(ROWS))


def density_bmc(make: Make, device: str) -> Tensor:
    return density_bmc_loss(head(make), make(ROWS), memory=make(MEMORY), memory_log_weights=make(MEMORY))


def density_nll(make: Make, device: str) -> Tensor:
    return density_nll_loss(head(make), make(ROWS), weights=make(ROWS))


def gai(make: Make, device: str) -> Tensor:
    mixture = LabelMixture(COMPONENTS).to(device, non_blocking=True)
    for _ in range(2):
        mixture.observe(make(ROWS))
    mixture.rescale(make().double(), make().double())
    return gai_loss(make(ROWS), make(ROWS), make(), mixture)


def bni(make: Make, device: str) -> Tensor:
    histogram = LabelHistogram(32).to(device, non_blocking=True)
    for _ in range(2):
        histogram.observe(make(ROWS))
    histogram.rescale(make().double().abs() + 0.1, make().double())
    return bni_loss(make(ROWS), make(ROWS), make(), histogram)


def reweighted(make: Make, device: str) -> Tensor:
    weigh = InverseDensityWeights(16).to(device, non_blocking=True)
    weigh.observe(make(ROWS))
    target = make(ROWS)
    return (
        mse_loss(make(ROWS), target, weights=weigh(target))
        + l1_loss(make(ROWS), target)
        + huber_loss(make(ROWS), target)
    )


def classes(make: Make, device: str) -> Tensor:
    logits = make(ROWS, CLASSES)
    target = (make(ROWS).detach().abs() * 2).long().clamp(max=CLASSES)
    counts = ClassCounts(CLASSES).to(device, non_blocking=True)
    counts.observe(target)
    prior = counts.log_prior()
    loss = cross_entropy_loss(logits, target, class_weights=counts.weights()) + focal_loss(logits, target)
    return loss + logit_adjusted_loss(logits, target, prior) + balanced_log_probabilities(logits, prior, 0.5).mean()


def influence(make: Make, device: str) -> Tensor:
    logits, features = make(ROWS, CLASSES), make(ROWS, 9)
    target = (make(ROWS).detach().abs() * 2).long().clamp(max=CLASSES)
    counts = ClassCounts(CLASSES).to(device, non_blocking=True)
    stream = StreamIBLoss(after=10).to(device, non_blocking=True)
    stream.observe(ROWS)
    fixed = IBLoss(weight=counts.weights()).to(device, non_blocking=True)
    loss = stream(logits, target, features, counts.weights()) + fixed(logits, target, features)
    return loss + influence_balanced_loss(logits, target, features, detach_influence=False)


CASES = [
    bmc,
    bmc_by_moments,
    bmc_without_memory,
    bmc_two_dimensions,
    density_bmc,
    density_nll,
    gai,
    gai_by_moments,
    bni,
    reweighted,
    classes,
    influence,
]


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_never_ask_the_host(case: Callable[[Make, str], Tensor]) -> None:
    made: list[Tensor] = []

    def make(*shape: int) -> Tensor:
        made.append(torch.empty(shape, device="meta", requires_grad=True))
        return made[-1]

    loss = case(make, "meta")
    loss.backward()
    assert loss.device.type == "meta"
    assert any(tensor.grad is not None for tensor in made)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_cuda_gives_the_cpus_numbers_without_a_sync(case: Callable[[Make, str], Tensor]) -> None:
    results = []
    fused.takes(torch.ones(1, device="cuda"))  # is tried out the first time
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(shape, generator=generator).to(device) for shape in shapes_of(case)]
        for tensor in drawn:
            tensor.requires_grad_()
        waiting = iter(drawn)
        with nothing_waits_for_cuda() if device == "cuda" else nullcontext():
            loss = case(lambda *shape, waiting=waiting: next(waiting), device)
            loss.backward()
        results.append([loss.detach().cpu(), *(t.grad.cpu() for t in drawn if t.grad is not None)])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-4, atol=1e-5)


def shapes_of(case: Callable[[Make, str], Tensor]) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []

    def make(*shape: int) -> Tensor:
        shapes.append(shape)
        return torch.empty(shape, device="meta", requires_grad=True)

    case(make, "meta")
    return shapes
