import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.trainer.losses.reference import relative_error
from trainer.losses import Mixture, bmc_loss, density_bmc_loss, density_nll_loss, mixture_log_density

pytestmark = pytest.mark.usefixtures("_both_ways")


def make_head(rows: int, components: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits, offsets, scales = torch.randn(3, rows, components, generator=generator, dtype=dtype)
    location = torch.randn(rows, generator=generator, dtype=dtype)
    return [x.requires_grad_() for x in (logits, offsets, 0.5 * scales - 1, location)]


def mixture_of(head: list[Tensor]) -> Mixture:
    logits, offsets, log_scales, location = head
    return Mixture(torch.log_softmax(logits, 1), location[:, None] + offsets, log_scales, location)


def naive_density_bmc(mixture: Mixture, target: Tensor, memory: Tensor, log_weights: Tensor) -> Tensor:
    logits = mixture_log_density(mixture, torch.cat([target, memory]))
    logits = logits + torch.cat([torch.zeros_like(target), log_weights])
    entropy = F.cross_entropy(logits, torch.arange(len(target)), reduction="none")
    return (mixture.spread() * entropy).mean() + 2 * (mixture.location - target).square().mean()


def naive_blurred_bmc(mixture: Mixture, target: Tensor, memory: Tensor, variances: Tensor, weight: float) -> Tensor:
    def log_density(labels: Tensor, more: Tensor) -> Tensor:
        total = (2 * mixture.log_scales).exp()[:, :, None] + more
        square = (labels - mixture.means[:, :, None]).square()
        return (mixture.log_weights[:, :, None] - 0.5 * (total.log() + square / total)).logsumexp(1)

    logits = torch.cat(
        [log_density(target, torch.zeros_like(target)), log_density(memory, variances) + math.log(weight)], 1
    )
    entropy = F.cross_entropy(logits, torch.arange(len(target)), reduction="none")
    return (mixture.spread() * entropy).mean() + 2 * (mixture.location - target).square().mean()


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    components=st.integers(1, 5),
    memory=st.integers(1, 400),
    outlier=st.floats(0, 60),
    width=st.floats(0, 1),
    seed=st.integers(0, 2**20),
)
@example(rows=5, components=5, memory=1, outlier=35.0, width=0.0, seed=5)
def test_a_memory_of_gaussians_gives_the_gradients_of_autograd(rows, components, memory, outlier, width, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(rows, generator=generator)
    labels = torch.randn(memory, generator=generator).exp()
    target[0] += outlier
    variances = (width * (0.1 + labels.square())).double()
    target, labels = target.double(), labels.double()
    results = []
    for dtype, loss_of in (
        (torch.float64, lambda m, t, y, v: naive_blurred_bmc(m, t, y, v, 30.0)),
        (torch.float64, lambda m, t, y, v: density_bmc_loss(m, t, memory=y, memory_variances=v, memory_weight=30.0)),
        (torch.float32, lambda m, t, y, v: density_bmc_loss(m, t, memory=y, memory_variances=v, memory_weight=30.0)),
    ):
        head = [x.detach().to(dtype).requires_grad_() for x in make_head(rows, components, seed)]
        loss = loss_of(mixture_of(head), target.to(dtype), labels.to(dtype), variances.to(dtype))
        results.append([loss.detach(), *torch.autograd.grad(loss, head)])
    right, double, single = results
    # Which component is nearest to a label far from all is a difference of large exponents, as float32 has them.
    mixture = mixture_of([x.detach() for x in make_head(rows, components, seed)])
    exponent = ((target[:, None] - mixture.means) / mixture.log_scales.exp()).square().amin(1).max() / 2
    share = 1e-5 + 2 * torch.finfo(torch.float32).eps * float(exponent)
    for a, b, c in zip(right, double, single, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(c.double(), a, rtol=1e-4, atol=share * (1 + float(a.abs().max())))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    components=st.integers(1, 5),
    memory=st.integers(1, 60),
    outlier=st.floats(0, 30),
    ramp=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_loss_and_gradients_are_those_of_autograd(rows, components, memory, outlier, ramp, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(rows, generator=generator, dtype=torch.float64)
    labels = torch.randn(memory, generator=generator, dtype=torch.float64)
    target[0] += outlier
    log_weights = torch.linspace(-5, 1, memory, dtype=torch.float64) if ramp else torch.zeros(memory).double()
    log_weights[1::3] = -torch.inf
    results = []
    for dtype, loss_of in (
        (torch.float64, lambda m, t, y, w: naive_density_bmc(m, t, y, w)),
        (torch.float64, lambda m, t, y, w: density_bmc_loss(m, t, memory=y, memory_log_weights=w)),
        (torch.float32, lambda m, t, y, w: density_bmc_loss(m, t, memory=y, memory_log_weights=w)),
    ):
        head = [x.detach().to(dtype).requires_grad_() for x in make_head(rows, components, seed)]
        loss = loss_of(mixture_of(head), target.to(dtype), labels.to(dtype), log_weights.to(dtype))
        results.append([loss.detach(), *torch.autograd.grad(loss, head)])
    right, double, single = results
    for a, b, c in zip(right, double, single, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
        # In float32 an outlier's exponent of thousands rounds at 1e-4 of a unit.
        torch.testing.assert_close(c.double(), a, rtol=1e-4, atol=1e-5 * (1 + float(a.abs().max())))


@pytest.mark.parametrize("far", [0.0, 60.0])
def test_a_memory_that_stands_for_more_labels_counts_so_often(far: float) -> None:
    generator = torch.Generator().manual_seed(7)
    target, memory = torch.randn(620, generator=generator).split([20, 600])
    target[0] += far
    weights = torch.full((600,), 32.0)
    results = []
    for dtype, loss_of in (
        (torch.float64, lambda m, t, y: naive_density_bmc(m, t, y, weights.double().log())),
        (torch.float64, lambda m, t, y: density_bmc_loss(m, t, memory=y, memory_weight=32.0)),
        (torch.float32, lambda m, t, y: density_bmc_loss(m, t, memory=y, memory_weight=32.0)),
        (
            torch.float32,
            lambda m, t, y: density_bmc_loss(
                m, t, memory=y, memory_log_weights=weights.log() - math.log(4.0), memory_weight=4.0
            ),
        ),
    ):
        head = [x.detach().to(dtype).requires_grad_() for x in make_head(20, 4, seed=1)]
        loss = loss_of(mixture_of(head), target.to(dtype), memory.to(dtype))
        results.append([loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, head))])
    for values in results[1:]:
        for found, right in zip(values, results[0], strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5 * (1 + float(right.abs().max())))


@pytest.mark.parametrize("loss", ["bmc", "nll"])
def test_gradcheck(loss: str) -> None:
    head = make_head(6, 3, seed=0)
    generator = torch.Generator().manual_seed(1)
    target, memory = torch.randn(20, generator=generator, dtype=torch.float64).split([6, 14])
    scale = torch.linspace(0.5, 1, 6, dtype=torch.float64)

    def function(*head: Tensor) -> Tensor:
        mixture = mixture_of(list(head))
        if loss == "bmc":
            return density_bmc_loss(mixture, target, memory=memory, row_scale=scale, reduction="none")
        return density_nll_loss(mixture, target, weights=scale, row_scale=scale, reduction="none")

    assert torch.autograd.gradcheck(function, head)


def test_one_component_of_one_scale_is_balanced_mse() -> None:
    generator = torch.Generator().manual_seed(2)
    target, memory = torch.randn(100, generator=generator, dtype=torch.float64).split([40, 60])
    sigma = 0.35
    pred = (target + 0.2).requires_grad_()
    right = bmc_loss(pred, target, sigma, memory=memory)
    right.backward()
    location = pred.detach().clone().requires_grad_()
    one = torch.zeros(40, 1, dtype=torch.float64)
    mixture = Mixture(one, location[:, None], one + torch.tensor(sigma).double().log(), location)
    scale = torch.tensor(2 * sigma**2, dtype=torch.float64)
    loss = density_bmc_loss(mixture, target, memory=memory, row_scale=scale, location_weight=0.0)
    loss.backward()
    torch.testing.assert_close(loss, right, rtol=1e-6, atol=0)
    assert relative_error(location.grad, pred.grad) < 1e-6


def test_likelihood_is_that_of_torch() -> None:
    head = make_head(30, 4, seed=3)
    target = torch.randn(30, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mixture = mixture_of(head)
    components = torch.distributions.Normal(mixture.means, mixture.log_scales.exp())
    mixed = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=mixture.log_weights), components
    )
    weights = torch.linspace(0.5, 2, 30).double()
    right = (weights * mixture.spread() * -mixed.log_prob(target)).mean()
    right = right + 2 * (mixture.location - target).square().mean()
    loss = density_nll_loss(mixture, target, weights=weights)
    torch.testing.assert_close(loss, right)
    ours = torch.autograd.grad(loss, head, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(right, head), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(mixture.spread(), mixed.variance.sqrt().detach())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_left_out(bad: float) -> None:
    target = torch.randn(10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    head = make_head(10, 2, seed=6)
    with torch.no_grad():
        head[3][0] = bad
    broken = target.clone()
    broken[1] = bad
    for loss in (density_bmc_loss(mixture_of(head), broken), density_nll_loss(mixture_of(head), broken)):
        grads = torch.autograd.grad(loss, head)
        assert bool(loss.isfinite())
        for grad in grads[1:]:
            assert bool(grad.isfinite().all())
            assert torch.equal(grad[:2], torch.zeros_like(grad[:2]))
    clean = mixture_of([x.detach()[2:] for x in head])
    # Row 0 keeps its label as a candidate, row 1 has none.
    right = density_bmc_loss(clean, target[2:], memory=target[:1])
    torch.testing.assert_close(density_bmc_loss(mixture_of(head), broken).detach(), right)


def test_labels_of_another_batch_are_refused() -> None:
    mixture = mixture_of(make_head(10, 2, seed=7))
    with pytest.raises(ValueError, match="not one a row"):
        density_bmc_loss(mixture, torch.zeros(9))


def test_many_rows_take_several_tiles() -> None:
    head = make_head(300, 4, seed=8)
    generator = torch.Generator().manual_seed(9)
    target, memory = torch.randn(900, generator=generator, dtype=torch.float64).split([300, 600])
    loss = density_bmc_loss(mixture_of(head), target, memory=memory)
    right = naive_density_bmc(mixture_of(head), target, memory, torch.zeros(600, dtype=torch.float64))
    torch.testing.assert_close(loss, right)
    for a, b in zip(torch.autograd.grad(loss, head), torch.autograd.grad(right, head), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("distance", [0.0, 3.0, 100.0])
def test_narrow_components_near_and_far_from_every_label(distance: float) -> None:
    # Far away every term is lost beside its component's peak, so the largest exponent has to be looked for.
    generator = torch.Generator().manual_seed(10)
    target, memory = torch.randn(200, generator=generator).split([40, 160])
    head = make_head(40, 4, seed=11, dtype=torch.float32)
    with torch.no_grad():
        head[2].fill_(0.05).log_()
        head[3].copy_(target + distance)
        head[1].mul_(0.1)
    exact = [x.detach().double().requires_grad_() for x in head]
    loss = density_bmc_loss(mixture_of(head), target, memory=memory, location_weight=0.0)
    # The head in float32 rounds its means; what is compared is the loss of those.
    mixture = mixture_of(head)
    means = mixture.means.detach().double().requires_grad_()
    right_mixture = Mixture(torch.log_softmax(exact[0], 1), means, exact[2], exact[3])
    logits = mixture_log_density(right_mixture, torch.cat([target, memory]).double())
    right = (right_mixture.spread() * F.cross_entropy(logits, torch.arange(40), reduction="none")).mean()
    torch.testing.assert_close(loss.double(), right, rtol=1e-5, atol=1e-6)
    for part, whole in zip(
        torch.autograd.grad(loss, (head[0], head[1], head[2])),
        torch.autograd.grad(right, (exact[0], means, exact[2])),
        strict=True,
    ):
        assert bool(((part.double() - whole).abs() <= 1e-5 * (whole.abs() + whole.abs().max()) + 1e-12).all())
