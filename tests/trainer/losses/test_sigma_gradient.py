"""What a learned sigma follows: the moments beside the likelihood."""

from collections.abc import Callable
from functools import partial
from typing import get_args

import pytest
import torch
from torch import Tensor

from tests.trainer.losses.test_bmc import choose_near_linear, make_case
from trainer.losses import BMCLoss, LabelHistogram, LabelMixture, bmc_loss, bni_loss, gai_loss
from trainer.losses.sigma_gradient import SigmaGradient

Loss = Callable[..., Tensor]


def exact_moments(
    pred: Tensor, target: Tensor, sigma: float, labels: Tensor, log_weights: Tensor | None = None
) -> float:
    """d loss / d sigma by moments as the module's docstring has it, in float64 and with the whole matrix."""
    pred, target, labels = (x.double()[:, None] if x.dim() == 1 else x.double() for x in (pred, target, labels))
    weights = torch.zeros(len(labels), dtype=torch.float64) if log_weights is None else log_weights.double()
    share = torch.softmax(weights - (pred[:, None] - labels).square().sum(2) / (2 * sigma**2), 1)
    mean = share @ labels
    spread = (share[..., None] * (labels - mean[:, None]).square()).sum((1, 2))
    prior = torch.softmax(weights, 0)[:, None]
    variance = (prior * (labels - (prior * labels).sum(0)).square()).sum()
    return float(2 / sigma * (spread.mean() - torch.minimum((target - mean).square().sum(1).mean(), variance)))


def by_sigma(loss: Loss, sigma: float, sigma_gradient: str = "moments") -> float:
    value = torch.tensor(sigma, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(value, sigma_gradient=sigma_gradient), value)
    return float(slope)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("near_linear", [False, True])
@pytest.mark.parametrize("sigma_over_sd", [0.05, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("far", [0.0, 8.0])
def test_bmc_by_moments_is_its_formula(
    near_linear: bool, sigma_over_sd: float, far: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_near_linear(monkeypatch, near_linear)
    pred, target, memory, sd = make_case("lognormal", 200, 300, seed=1)
    pred += far * sd
    sigma = float(torch.tensor(sigma_over_sd * sd))
    for log_weights in (None, torch.linspace(-3, 1, 300).masked_fill(torch.arange(300) % 3 == 0, -torch.inf)):
        weights = None if log_weights is None else torch.cat([torch.zeros(200), log_weights])
        loss = partial(bmc_loss, pred, target, memory=memory, memory_log_weights=log_weights)
        right = exact_moments(pred, target, sigma, torch.cat([target, memory]), weights)
        assert by_sigma(loss, sigma) == pytest.approx(right, rel=1e-4, abs=1e-5 * sd)


def test_bmc_by_moments_in_several_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    target, memory = torch.randn(80, 3, generator=generator), torch.randn(50, 3, generator=generator)
    pred = target + 0.4 * torch.randn(80, 3, generator=generator)
    right = exact_moments(pred, target, 0.5, torch.cat([target, memory]))
    assert by_sigma(partial(bmc_loss, pred, target, memory=memory), 0.5) == pytest.approx(right, rel=1e-4)


def test_bni_by_moments_is_its_formula() -> None:
    histogram = LabelHistogram(50)
    generator = torch.Generator().manual_seed(1)
    histogram.observe(torch.randn(2000, generator=generator))
    target = torch.randn(60, generator=generator)
    pred = target + 0.3 * torch.randn(60, generator=generator)
    right = exact_moments(pred, target, 0.4, histogram.centres(), histogram.log_weights())
    assert by_sigma(partial(bni_loss, pred, target, labels=histogram), 0.4) == pytest.approx(right, rel=1e-4)


@pytest.mark.parametrize("sigma", [0.4, 2.0])
def test_gai_by_moments_is_that_of_a_fine_grid_of_its_density(sigma: float) -> None:
    mixture = LabelMixture(3)
    generator = torch.Generator().manual_seed(2)
    for _ in range(50):
        mixture.observe(torch.randn(200, generator=generator).exp())
    target = torch.randn(60, generator=generator).exp()
    pred = target + 0.3 * torch.randn(60, generator=generator)
    grid = torch.linspace(-15, 40, 20_001)
    right = exact_moments(pred, target, sigma, grid, mixture.log_density(grid))
    assert by_sigma(partial(gai_loss, pred, target, labels=mixture), sigma) == pytest.approx(right, rel=1e-3)


def test_losses_and_the_gradients_of_predictions_are_the_same_either_way() -> None:
    pred, target, memory, sd = make_case("normal", 50, 80, seed=3)
    mixture, histogram = LabelMixture(3), LabelHistogram(40)
    for labels in (mixture, histogram):
        labels.observe(torch.cat([target, memory]))
    for loss in (
        lambda p, s, **given: bmc_loss(p, target, s, memory=memory, **given),
        lambda p, s, **given: gai_loss(p, target, s, mixture, **given),
        lambda p, s, **given: bni_loss(p, target, s, histogram, **given),
    ):
        found = []
        for kind in ("likelihood", "moments"):
            left, sigma = pred.clone().requires_grad_(), torch.tensor(0.5 * sd, requires_grad=True)
            value = loss(left, sigma, sigma_gradient=kind)
            value.backward()
            found.append((value.detach(), left.grad))
        torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_have_no_part_in_it(bad: float) -> None:
    pred, target, memory, sd = make_case("normal", 40, 60, seed=4)
    mixture = LabelMixture(3)
    mixture.observe(memory)
    pred = pred - 3 * sd  # so that the squared error is more than is counted
    right = [
        by_sigma(partial(bmc_loss, pred[4:], target[4:], memory=memory), sd),
        by_sigma(partial(gai_loss, pred[4:], target[4:], labels=mixture), sd),
    ]
    broken, labels = pred.clone(), target.clone()
    broken[0], labels[1:4] = bad, bad
    memory = torch.cat([memory, torch.tensor([bad])])
    found = [
        # Row 0 keeps its label, which stays a candidate.
        by_sigma(partial(bmc_loss, broken[1:], labels[1:], memory=memory), sd),
        by_sigma(partial(gai_loss, broken, labels, labels=mixture), sd),
    ]
    assert found == pytest.approx(right, rel=1e-4)


def descent(sigma_gradient: str, steps: int, offset: float) -> list[float]:
    """Sigma, from 1.5, of a linear model of noise 1 that starts `offset` from the labels, by plain SGD."""
    generator = torch.Generator().manual_seed(5)
    target = 5 + 0.5 * torch.randn(512, generator=generator)
    x = (target - torch.randn(512, generator=generator))[:, None]
    linear = torch.nn.Linear(1, 1)
    with torch.no_grad():
        linear.weight.fill_(1.0)
        linear.bias.fill_(offset)
    log_sigma = torch.tensor(1.5).log().requires_grad_()
    optimizer = torch.optim.SGD(
        [{"params": linear.parameters(), "lr": 1e-3}, {"params": log_sigma, "lr": 1e-2}], lr=0.0, momentum=0.9
    )
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        bmc_loss(linear(x), target, log_sigma.exp(), sigma_gradient=sigma_gradient).backward()
        optimizer.step()
        found.append(float(log_sigma.detach().exp()))
    return found


def test_sigma_settles_at_the_noise() -> None:
    assert descent("moments", 1500, 0.0)[-1] == pytest.approx(1.0, abs=0.1)


def test_predictions_that_know_nothing_do_not_drive_sigma_away() -> None:
    assert max(descent("likelihood", 60, -8.0)) > 20
    assert max(descent("moments", 1500, -8.0)) < 4


def test_the_module_passes_it_on() -> None:
    pred, target, _, sd = make_case("normal", 40, 0, seed=6)
    slopes = []
    for kind in get_args(SigmaGradient):
        criterion = BMCLoss(sd, sigma_gradient=kind)
        criterion(pred, target).backward()
        assert criterion.noise_sigma.grad is not None
        slopes.append(float(criterion.noise_sigma.grad))
    assert slopes == [by_sigma(partial(bmc_loss, pred, target), sd, kind) for kind in get_args(SigmaGradient)]
    assert slopes[0] != slopes[1]


def test_an_unknown_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="is not likelihood or moments"):
        BMCLoss(sigma_gradient="guess")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not likelihood or moments"):
        bmc_loss(torch.ones(3), torch.ones(3), 1.0, sigma_gradient="guess")  # type: ignore[arg-type]
