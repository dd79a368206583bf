"""What follows the labels of a stream: the mixture of GAI, the histogram of BNI and of inverse-density weights."""

import copy

import pytest
import torch
from torch import Tensor, nn

from trainer.losses import InverseDensityWeights, LabelHistogram, LabelMixture, bni_loss, gai_loss


def two_humps(count: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.8, 0.3 * noise, 5 + noise)


def fitted(components: int = 4, batches: int = 300) -> LabelMixture:
    generator = torch.Generator().manual_seed(0)
    mixture = LabelMixture(components)
    for _ in range(batches):
        mixture.observe(two_humps(128, generator))
    return mixture


def exact_two_humps(at: Tensor) -> Tensor:
    humps = torch.distributions.Normal(torch.tensor([0.0, 5.0]), torch.tensor([0.3, 1.0]))
    return (humps.log_prob(at[:, None]) + torch.tensor([0.8, 0.2]).log()).logsumexp(1)


def test_the_mixture_finds_the_density_of_the_stream() -> None:
    labels = two_humps(20_000, torch.Generator().manual_seed(1))
    regret = (exact_two_humps(labels) - fitted().log_density(labels)).mean()
    assert 0 <= regret.item() < 0.02


def test_the_mixture_forgets_what_the_stream_no_longer_holds() -> None:
    mixture = fitted()
    generator = torch.Generator().manual_seed(2)
    for _ in range(600):
        mixture.observe(20 + torch.randn(128, generator=generator))
    labels = 20 + torch.randn(5000, generator=generator)
    regret = torch.distributions.Normal(20.0, 1.0).log_prob(labels) - mixture.log_density(labels)
    assert regret.mean().item() < 0.05


def test_a_component_that_collapsed_on_ties_starts_again() -> None:
    mixture = LabelMixture(3, decay=0.9)
    for _ in range(20):
        mixture.observe(torch.zeros(64))
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        mixture.observe(two_humps(256, generator))
    log_weights, means, variances = mixture.parameters_of_mixture()
    assert bool(variances.isfinite().all() & means.isfinite().all())
    labels = two_humps(20_000, generator)
    assert (exact_two_humps(labels) - mixture.log_density(labels)).mean().item() < 0.1
    torch.testing.assert_close(log_weights.exp().sum(), torch.ones((), dtype=torch.float64))


def test_the_histogram_counts_and_averages_whatever_its_range_did() -> None:
    histogram = LabelHistogram(64, decay=1.0)
    generator = torch.Generator().manual_seed(4)
    seen = [torch.randn(50, generator=generator) * 10**k for k in (0, 1, 2)]
    for labels in seen:
        histogram.observe(torch.cat([labels, torch.tensor([torch.nan, torch.inf])]))
    everything = torch.cat(seen).double()
    assert histogram.mass.sum().item() == pytest.approx(150)
    assert histogram.moment.sum().item() == pytest.approx(everything.sum().item())
    assert histogram.low <= everything.min()
    assert histogram.high >= everything.max()
    filled = histogram.mass > 0
    width = (histogram.high - histogram.low) / 64
    edges = histogram.low + torch.arange(64) * width
    inside = (histogram.centres() >= edges - 1e-9) & (histogram.centres() <= edges + width + 1e-9)
    assert bool(inside[filled].all())


def test_the_histogram_fades() -> None:
    histogram = LabelHistogram(10, decay=0.9)
    histogram.observe(torch.tensor([0.0, 1.0]))
    for _ in range(100):
        histogram.observe(torch.ones(5))
    assert histogram.log_weights().exp()[histogram.index(torch.ones(1))].item() == pytest.approx(1.0)
    assert histogram.log_weights()[histogram.index(torch.zeros(1))].item() < -40


def test_gai_is_its_formula() -> None:
    mixture = fitted(3)
    generator = torch.Generator().manual_seed(5)
    pred, target = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    sigma = torch.tensor(0.4, dtype=torch.float64)
    log_weights, means, variances = mixture.parameters_of_mixture()
    noise = torch.distributions.Normal(pred, sigma)
    marginal = torch.distributions.Normal(means, (variances + sigma**2).sqrt())
    right = -noise.log_prob(target) + (log_weights + marginal.log_prob(pred[:, None])).logsumexp(1)
    loss = gai_loss(pred, target, sigma, mixture, reduction="none")
    torch.testing.assert_close(loss.double(), 2 * sigma**2 * right, rtol=1e-5, atol=1e-6)


def test_bni_is_its_formula_with_its_gradients() -> None:
    histogram = LabelHistogram(100)
    generator = torch.Generator().manual_seed(6)
    histogram.observe(two_humps(2000, generator))
    target = two_humps(40, generator).double()
    pred = (target + 0.3).requires_grad_()
    sigma = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    filled = histogram.mass > 0
    logits = histogram.log_weights()[filled] - (pred[:, None] - histogram.centres()[filled]).square() / (2 * sigma**2)
    entropy = (pred - target).square() / (2 * sigma**2) + logits.logsumexp(1)
    right = (2 * sigma.detach() ** 2 * entropy).mean()
    loss = bni_loss(pred, target, sigma, histogram)
    torch.testing.assert_close(loss, right)
    ours, theirs = (torch.autograd.grad(x, (pred, sigma)) for x in (loss, right))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss", ["gai", "bni"])
def test_rows_that_are_not_finite_are_left_out(loss: str) -> None:
    generator = torch.Generator().manual_seed(7)
    target = two_humps(20, generator)
    pred = (target + 0.5).requires_grad_()
    state = fitted(3, 20) if loss == "gai" else LabelHistogram(50)
    state.observe(two_humps(500, generator))
    function = gai_loss if loss == "gai" else bni_loss
    right = function(pred[2:], target[2:], 0.3, state)  # type: ignore[operator]
    broken = pred.detach().clone()
    broken[0] = torch.nan
    broken.requires_grad_()
    target[1] = torch.inf
    value = function(broken, target, 0.3, state)  # type: ignore[operator]
    value.backward()
    torch.testing.assert_close(value.detach(), right.detach())
    assert bool(broken.grad.isfinite().all())
    assert torch.equal(broken.grad[:2], torch.zeros(2))


def test_gai_and_bni_agree_with_each_other_where_the_fit_is_good() -> None:
    generator = torch.Generator().manual_seed(8)
    mixture, histogram = fitted(4), LabelHistogram(1000)
    for _ in range(100):
        histogram.observe(two_humps(500, generator))
    target = two_humps(500, generator)
    pred = target + 0.2 * torch.randn(500, generator=generator)
    a, b = gai_loss(pred, target, 0.3, mixture), bni_loss(pred, target, 0.3, histogram)
    # They differ by the constant 2 v log sqrt(v): BNI's Gaussians are not normalised.
    assert (a - b).item() == pytest.approx(0.0, abs=0.02)


def test_rare_labels_weigh_more_and_the_mean_weight_is_one() -> None:
    weigh = InverseDensityWeights(20, decay=1.0)
    labels = torch.cat([torch.zeros(900), torch.ones(100)])
    weigh.observe(labels)
    weights = weigh(labels)
    assert weights.mean().item() == pytest.approx(1.0)
    assert (weights[-1] / weights[0]).item() == pytest.approx(9.0)
    assert weigh(torch.tensor([0.0, torch.nan]))[1].item() == 0.0


STATES = [lambda: LabelMixture(3), lambda: LabelHistogram(40), lambda: InverseDensityWeights(40)]


@pytest.mark.parametrize("make", STATES)
def test_state_goes_round_and_what_is_not_finite_changes_nothing(make) -> None:
    generator = torch.Generator().manual_seed(9)
    state = make()
    for _ in range(5):
        state.observe(two_humps(64, generator))
    other = make()
    other.load_state_dict(state.state_dict())
    labels = two_humps(64, generator)
    for each in (state, other):
        each.observe(labels)
    assert_same(state, other)
    other.observe(torch.full((10,), torch.nan))
    for name, value in state.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("make", STATES)
def test_a_change_of_unit_is_as_if_it_had_always_been_that_unit(make) -> None:
    generator = torch.Generator().manual_seed(10)
    labels = [two_humps(64, generator).double() for _ in range(10)]
    state, direct = make(), make()
    for batch in labels:
        state.observe(batch)
        direct.observe(3.0 * batch - 2.0)
    state.rescale(3.0, -2.0)
    if isinstance(state, LabelMixture):
        for a, b in zip(state.parameters_of_mixture(), direct.parameters_of_mixture(), strict=True):
            torch.testing.assert_close(a, b)
    else:
        histogram, other = (getattr(x, "histogram", x) for x in (state, direct))
        torch.testing.assert_close(histogram.high, other.high)
        torch.testing.assert_close(histogram.moment.sum(), other.moment.sum())


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for name, value in copy.deepcopy(one.state_dict()).items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize(
    "make",
    [
        lambda: LabelMixture(0),
        lambda: LabelMixture(2, decay=1.0),
        lambda: LabelHistogram(1),
        lambda: LabelHistogram(5, decay=0.0),
        lambda: InverseDensityWeights(power=-1.0),
        lambda: gai_loss(torch.zeros(3, 2), torch.zeros(3, 2), 1.0, LabelMixture(2)),
        lambda: bni_loss(torch.zeros(3, 2), torch.zeros(3, 2), 1.0, LabelHistogram(2)),
    ],
)
def test_what_makes_no_sense_is_refused(make) -> None:
    with pytest.raises(ValueError, match=r"must|one label"):
        make()
