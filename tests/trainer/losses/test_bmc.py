import warnings

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.trainer.losses.reference import naive_bmc, relative_error
from trainer.losses import BMCLoss, bmc_loss, finite_rows
from trainer.losses import bmc as bmc_module
from trainer.losses import candidates as candidates_module

pytestmark = pytest.mark.usefixtures("_both_ways")

LABELS = ("normal", "lognormal", "uniform", "ties", "duplicates", "offset", "two_clusters")


def make_labels(kind: str, count: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(count, generator=generator)
    match kind:
        case "lognormal":
            return noise.exp()
        case "uniform":
            return torch.rand(count, generator=generator)
        case "ties":
            return (3 * noise).round()
        case "duplicates":
            return noise[torch.randint(max(1, count // 10), (count,), generator=generator)]
        case "offset":
            return noise + 1e4
        case "two_clusters":
            return 0.01 * noise + 10 * torch.randint(2, (count,), generator=generator)
    return noise


def make_case(kind: str, rows: int, memory: int, seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Predictions, labels, memory and the labels' sd; 1% of predictions and of labels lie 30 sd off."""
    generator = torch.Generator().manual_seed(seed)
    labels = make_labels(kind, rows + memory, generator)
    # The deviation of labels that are all the same is rounding, and no unit to measure anything in.
    sd = float(labels.std()) if bool((labels != labels[0]).any()) else 1.0
    target, rest = labels[:rows].clone(), labels[rows:]
    pred = target + 0.5 * sd * torch.randn(rows, generator=generator)
    pred[rows // 2 :: 100] += 30 * sd
    target[rows // 3 :: 100] += 30 * sd
    return pred, target, rest, sd


def loss_and_gradients(loss, pred, target, sigma, memory, log_weights, dtype):
    pred = pred.to(dtype).clone().requires_grad_()
    sigma = torch.tensor(sigma, dtype=dtype, requires_grad=True)
    memory = None if memory is None or not len(memory) else memory.to(dtype)
    value = loss(pred, target.to(dtype), sigma, memory, log_weights)
    value.backward()
    return value.detach(), pred.grad, sigma.grad


def ours(pred, target, sigma, memory, log_weights):
    return bmc_loss(pred, target, sigma, memory=memory, memory_log_weights=log_weights)


def exact(pred, target, sigma, memory, log_weights):
    return naive_bmc(pred, target, sigma, memory, None if log_weights is None else log_weights.double())


def choose_near_linear(patch: pytest.MonkeyPatch, near_linear: bool) -> None:
    for name in ("NEAR_LINEAR_PAIRS", "NEAR_LINEAR_PAIRS_OF_KERNEL"):
        patch.setattr(bmc_module, name, 0 if near_linear else 1 << 60)


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(LABELS),
    rows=st.integers(2, 300),
    memory=st.integers(0, 400),
    sigma_over_sd=st.floats(-3, 3).map(lambda x: 10**x),
    weights=st.sampled_from(["none", "masked", "ramp"]),
    near_linear=st.booleans(),
    seed=st.integers(0, 2**20),
)
@example("normal", 179, 299, 71.04974114426787, "ramp", False, 180)  # rows cancel in sigma's gradient a thousandfold
@example("lognormal", 2, 251, 1000.0, "masked", False, 251)  # of two rows one is an outlier
def test_float32_agrees_with_float64(kind, rows, memory, sigma_over_sd, weights, near_linear, seed) -> None:
    pred, target, rest, sd = make_case(kind, rows, memory, seed)
    sigma = float(torch.tensor(sigma_over_sd * sd, dtype=torch.float32))
    log_weights = None
    if memory and weights == "masked":
        drawn = torch.rand(memory, generator=torch.Generator().manual_seed(seed)) < 0.5
        log_weights = torch.zeros(memory).masked_fill(drawn, -torch.inf)
    elif memory and weights == "ramp":
        log_weights = torch.linspace(-40, 1, memory)
    with pytest.MonkeyPatch.context() as patch:
        choose_near_linear(patch, near_linear)
        got = loss_and_gradients(ours, pred, target, sigma, rest, log_weights, torch.float32)
    want = loss_and_gradients(exact, pred, target, sigma, rest, log_weights, torch.float64)
    # Where a value is a difference of far larger ones, the float64 of the naive form is itself no better than this.
    span = float((pred.double() - target.double().median()).abs().max()) + sd
    floor = 1e-15 * span**2 / min(1.0, sigma_over_sd)
    for value, right, tolerance in zip(got, want, (1e-6, 1e-5, 1e-5), strict=True):
        error = (value.double() - right).abs()
        assert bool((error <= tolerance * (right.abs() + right.abs().quantile(0.5)) + floor).all())


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_predictions_midway_between_labels_far_apart(offset: float) -> None:
    # Two labels thousands of sigmas away and all but equally near: their distances are the same number in float32.
    target = torch.tensor([0.0, 2.0, -3.0, 30.0, 7.0, -20.0]) + offset
    middle = (target[:, None] + target).flatten() / 2
    pred = torch.stack([middle, middle + 1e-6, middle - 1e-6, middle.nextafter(torch.tensor(torch.inf))]).flatten()
    own = target.repeat(len(pred) // len(target))
    got = loss_and_gradients(ours, pred, own, 1e-3, None, None, torch.float32)
    want = loss_and_gradients(exact, pred, own, 1e-3, None, None, torch.float64)
    for value, right, tolerance in zip(got, want, (1e-6, 1e-5, 1e-5), strict=True):
        assert relative_error(value, right) < tolerance


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("sigma_over_sd", [1e-3, 1e-2, 0.1, 1.0, 1e3])
def test_a_large_batch_takes_the_near_linear_path_and_agrees(
    kind: str, sigma_over_sd: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bmc_module, "NEAR_LINEAR_PAIRS_OF_KERNEL", bmc_module.NEAR_LINEAR_PAIRS)
    pred, target, rest, sd = make_case(kind, 700, 800, seed=1)
    sigma = float(torch.tensor(sigma_over_sd * sd, dtype=torch.float32))
    assert len(pred) * (len(target) + len(rest)) > bmc_module.NEAR_LINEAR_PAIRS
    got = loss_and_gradients(ours, pred, target, sigma, rest, None, torch.float32)
    want = loss_and_gradients(exact, pred, target, sigma, rest, None, torch.float64)
    for value, right, tolerance in zip(got, want, (1e-6, 1e-5, 1e-5), strict=True):
        assert relative_error(value, right) < tolerance


def test_predictions_far_from_a_dense_edge_are_summed_over_cells() -> None:
    # Every prediction is 3 to 60 sigma from thousands of labels: the case that neither few pairs nor wide cells serve.
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3000, generator=generator)
    pred = 1 + torch.linspace(0.3, 6, 3000)
    got = loss_and_gradients(ours, pred, target, 0.1, None, None, torch.float32)
    want = loss_and_gradients(exact, pred, target, 0.1, None, None, torch.float64)
    for value, right in zip(got, want, strict=True):
        assert relative_error(value, right) < 1e-6


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("sigma_over_sd", [1e-3, 0.1, 1.0, 1e3])
def test_labels_of_several_dimensions(dims: int, sigma_over_sd: float) -> None:
    generator = torch.Generator().manual_seed(dims)
    target = torch.randn(150, dims, generator=generator) + 1e4
    pred = target + 0.5 * torch.randn(150, dims, generator=generator)
    pred[::50] += 30
    memory = torch.randn(100, dims, generator=generator) + 1e4
    log_weights = torch.linspace(-2, 0, 100).masked_fill(torch.arange(100) % 3 == 0, -torch.inf)
    sigma = float(torch.tensor(sigma_over_sd, dtype=torch.float32))
    got = loss_and_gradients(ours, pred, target, sigma, memory, log_weights, torch.float32)
    want = loss_and_gradients(exact, pred, target, sigma, memory, log_weights, torch.float64)
    for value, right, tolerance in zip(got, want, (1e-6, 1e-5, 1e-5), strict=True):
        assert relative_error(value, right) < tolerance


@pytest.mark.parametrize("near_linear", [False, True])
def test_gradcheck(near_linear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_near_linear(monkeypatch, near_linear)
    generator = torch.Generator().manual_seed(0)
    target, memory = torch.randn(40, dtype=torch.float64, generator=generator).split([10, 30])
    pred = (target + 0.3).requires_grad_()
    sigma = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def cross_entropy(pred: Tensor, sigma: Tensor) -> Tensor:
        # The loss's own factor is detached, so it is divided out: what is left is a function with that derivative.
        loss = bmc_loss(pred, target, sigma, memory=memory, reduction="none")
        return loss / (2 * sigma.detach() ** 2)

    assert torch.autograd.gradcheck(cross_entropy, (pred, sigma))


def test_masked_memory_is_no_memory() -> None:
    pred, target, memory, sd = make_case("normal", 64, 64, seed=2)
    masked = torch.where(torch.arange(64) < 20, 0.0, -torch.inf)
    assert torch.equal(
        bmc_loss(pred, target, 0.3 * sd, memory=memory, memory_log_weights=masked),
        bmc_loss(pred, target, 0.3 * sd, memory=memory[:20]),
    )


def test_a_weight_of_two_is_the_label_twice() -> None:
    pred, target, memory, sd = make_case("normal", 32, 16, seed=3)
    twice = bmc_loss(pred, target, sd, memory=memory, memory_log_weights=torch.full((16,), 2.0).log())
    torch.testing.assert_close(twice, bmc_loss(pred, target, sd, memory=memory.repeat(2)))


def test_a_column_of_predictions_is_a_batch_not_a_matrix() -> None:
    pred, target, _, _ = make_case("normal", 50, 0, seed=4)
    flat = bmc_loss(pred, target, 0.5)
    for p, t in ((pred[:, None], target), (pred, target[:, None]), (pred[:, None], target[:, None])):
        assert torch.equal(bmc_loss(p, t, 0.5), flat)
    with pytest.raises(ValueError, match="not one batch"):
        bmc_loss(pred, target[:10], 0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("masked_memory", [False, True])
def test_rows_that_are_not_finite_are_left_out(bad: float, dims: int, masked_memory: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    pred, target = torch.randn(2, 30, dims, generator=generator)
    memory = torch.randn(20, dims, generator=generator)
    log_weights = torch.zeros(20) if masked_memory else None
    clean = pred[4:].clone().requires_grad_()
    # Row 3 keeps a finite label, so that label remains a candidate for the others.
    bmc_loss(clean, target[4:], 0.5, memory=torch.cat([memory, target[3:4]])).backward()
    pred[3], target[:3], memory[7] = bad, bad, bad
    pred.requires_grad_()
    loss = bmc_loss(pred, target, 0.5, memory=memory, memory_log_weights=log_weights)
    loss.backward()
    others = torch.cat([memory[:7], memory[8:], target[3:4]])
    right = bmc_loss(pred.detach()[4:], target[4:], 0.5, memory=others)
    torch.testing.assert_close(loss.detach(), right)
    assert torch.equal(pred.grad[:4], torch.zeros_like(pred.grad[:4]))
    assert bool(pred.grad.isfinite().all())
    assert bool((pred.grad[4:] != 0).any())
    assert int((~finite_rows(pred.detach(), target)).sum()) == 4


def test_a_batch_with_nothing_finite_gives_zero_and_finite_gradients() -> None:
    pred = torch.full((4,), torch.nan, requires_grad=True)
    sigma = torch.tensor(0.3, requires_grad=True)
    loss = bmc_loss(pred, torch.full((4,), torch.nan), sigma)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(pred.grad, torch.zeros(4))
    assert float(sigma.grad) == 0.0


def test_one_row_teaches_with_a_memory_and_warns_once_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates_module, "_warned", set())
    pred = torch.tensor([0.7], requires_grad=True)
    with pytest.warns(UserWarning, match="teaches nothing"):
        assert bmc_loss(pred, torch.tensor([0.2]), 0.3).item() == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bmc_loss(pred, torch.tensor([0.2]), 0.3)
        bmc_loss(pred, torch.tensor([0.2]), 0.3, memory=torch.tensor([1.0, -1.0, 0.5])).backward()
    assert float(pred.grad) != 0.0


def test_half_precision_is_upcast() -> None:
    pred, target, _, _ = make_case("normal", 40, 0, seed=6)
    half = pred.bfloat16().requires_grad_()
    loss = bmc_loss(half, target, 0.5)
    loss.backward()
    assert loss.dtype == torch.float32
    assert half.grad.dtype == torch.bfloat16
    assert torch.equal(loss.detach(), bmc_loss(half.detach().float(), target, 0.5))


def test_reductions() -> None:
    pred, target, _, _ = make_case("normal", 40, 0, seed=7)
    rows = bmc_loss(pred, target, 0.5, reduction="none")
    assert rows.shape == (40,)
    torch.testing.assert_close(rows.mean(), bmc_loss(pred, target, 0.5))
    torch.testing.assert_close(rows.sum(), bmc_loss(pred, target, 0.5, reduction="sum"))
    with pytest.raises(ValueError, match="reduction"):
        bmc_loss(pred, target, 0.5, reduction="median")  # type: ignore[arg-type]


def test_sigma_has_a_gradient_of_its_sign_and_none_below_the_smallest() -> None:
    pred, target, memory, _ = make_case("normal", 20, 30, seed=9)
    grads = {}
    for value in (0.4, -0.4, 0.0):
        sigma = torch.tensor([value], requires_grad=True)
        bmc_loss(pred.clone().requires_grad_(), target, sigma, memory=memory).backward()
        grads[value] = sigma.grad
    assert torch.equal(grads[-0.4], -grads[0.4])
    assert float(grads[0.0]) == 0.0


def test_a_fixed_sigma_and_fixed_predictions_ask_for_no_gradient() -> None:
    pred, target, memory, sd = make_case("normal", 20, 30, seed=10)
    learned = torch.tensor(sd, requires_grad=True)
    left, right = pred.clone().requires_grad_(), pred.clone().requires_grad_()
    fixed = bmc_loss(left, target, sd, memory=memory)
    both = bmc_loss(right, target, learned, memory=memory)
    fixed.backward()
    both.backward()
    assert torch.equal(fixed, both)
    assert torch.equal(left.grad, right.grad)
    alone = torch.tensor(sd, requires_grad=True)
    bmc_loss(pred, target, alone, memory=memory).backward()
    assert torch.equal(alone.grad, learned.grad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_sigma": torch.ones(2)}, "noise_sigma"),
        ({"memory": torch.ones(3, 2)}, "memory"),
        ({"memory": torch.ones(3), "memory_log_weights": torch.ones(2)}, "memory_log_weights"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bmc_loss(torch.ones(5), torch.ones(5), **({"noise_sigma": 1.0} | arguments))


def test_the_guides_snippet_runs_with_ours() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    criterion = BMCLoss(init_noise_sigma=8.0)
    optimizer.add_param_group({"params": criterion.noise_sigma, "lr": 1e-2})
    x = torch.randn(64, 3)
    target = 20 * x.sum(1)
    before = (model(x)[:, 0] - target).detach().square().mean()
    for _ in range(50):
        pred = model(x)
        loss = criterion(pred, target)
        assert torch.equal(loss, criterion(pred[:, 0], target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(x)[:, 0] - target).detach().square().mean() < before
    assert criterion.noise_sigma.item() != 8.0
    criterion(torch.tensor([torch.nan, 1.0, 2.0]), torch.ones(3))
    assert int(criterion.nonfinite_rows) == 1
    assert set(criterion.state_dict()) == {"noise_sigma", "nonfinite_rows"}


def test_sigma_settles_at_the_noise_and_collapses_without_the_detach() -> None:
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(256, generator=generator)
    pred = signal
    target = signal + 0.3 * torch.randn(256, generator=generator)
    residual = float((pred - target).std())

    def settle(loss_of) -> float:
        log_sigma = torch.tensor(0.0, requires_grad=True)
        optimizer = torch.optim.Adam([log_sigma], lr=0.05, betas=(0.9, 0.9))
        for _ in range(300):
            optimizer.zero_grad()
            loss_of(log_sigma.exp()).backward()
            optimizer.step()
        return float(log_sigma.detach().exp())

    def not_detached(sigma: Tensor) -> Tensor:
        loss = bmc_loss(pred, target, sigma)
        return loss / (2 * sigma.detach() ** 2) * (2 * sigma**2)

    # The labels' own spread makes the batch's fixed point a little smaller than the noise.
    assert settle(lambda sigma: bmc_loss(pred, target, sigma)) == pytest.approx(residual, rel=0.15)
    assert settle(not_detached) < 0.01
