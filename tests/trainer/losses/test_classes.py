import pytest
import torch
import torch.nn.functional as F

from trainer.losses import (
    ClassCounts,
    IBLoss,
    StreamIBLoss,
    balanced_log_probabilities,
    cross_entropy_loss,
    effective_number_weights,
    focal_loss,
    influence_balanced_loss,
    inverse_count_weights,
    logit_adjusted_loss,
)


def batch(rows: int = 30, classes: int = 5, features: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (rows,), generator=generator)
    return logits, target, torch.randn(rows, features, generator=generator, dtype=torch.float64)


def test_inverse_counts_are_those_of_the_paper() -> None:
    weights = inverse_count_weights(torch.tensor([100.0, 200.0, 50.0]))
    torch.testing.assert_close(weights, torch.tensor([0.8571, 0.4286, 1.7143]), rtol=0, atol=5e-5)


def test_counts_fade_and_rare_classes_stay_on_the_floor() -> None:
    counts = ClassCounts(3, decay=1.0, floor=10.0)
    counts.observe(torch.tensor([0] * 100 + [1] * 200 + [2] * 2 + [7, -1]))
    assert counts.counts.tolist() == [100, 200, 2]
    torch.testing.assert_close(counts.weights(), inverse_count_weights(torch.tensor([100.0, 200.0, 10.0])))
    torch.testing.assert_close(counts.log_prior().exp(), torch.tensor([100.0, 200.0, 10.0]) / 310)
    fading = ClassCounts(2, decay=0.9)
    for _ in range(30):
        fading.observe(torch.zeros(10, dtype=torch.int64))
    fading.observe(torch.ones(10, dtype=torch.int64))
    assert fading.counts[0] < fading.counts[1]
    other = ClassCounts(2)
    other.load_state_dict(fading.state_dict())
    assert torch.equal(other.weights(), fading.weights())


def test_counts_grow_and_a_class_without_rows_stands_on_the_floor() -> None:
    counts = ClassCounts(0, decay=1.0, floor=1.0)
    counts.grow(2)
    counts.observe(torch.tensor([0, 0, 0, 1]))
    counts.grow(3)
    assert counts.counts.tolist() == [3, 1, 0]
    torch.testing.assert_close(counts.log_prior().exp(), torch.tensor([3.0, 1.0, 1.0]) / 5)


def test_effective_numbers_lie_between_equal_and_inverse_counts() -> None:
    counts = torch.tensor([100.0, 200.0, 50.0], dtype=torch.float64)
    torch.testing.assert_close(
        effective_number_weights(counts, 1 - 1e-9), inverse_count_weights(counts), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(effective_number_weights(counts, 1e-9), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("detach", [True, False])
def test_influence_balanced_is_its_formula(detach: bool) -> None:
    logits, target, features = batch()
    weights = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)
    logits.requires_grad_()
    influence = (torch.softmax(logits, 1) - F.one_hot(target, 5)).abs().sum(1) * features.abs().sum(1)
    factor = 1000 / (influence + 1e-3)
    entropy = F.cross_entropy(logits, target, weights, reduction="none")
    right = ((factor.detach() if detach else factor) * entropy).mean()
    loss = influence_balanced_loss(logits, target, features, class_weights=weights, detach_influence=detach)
    torch.testing.assert_close(loss, right)
    (ours,), (theirs,) = torch.autograd.grad(loss, logits), torch.autograd.grad(right, logits)
    torch.testing.assert_close(ours, theirs)


def test_influence_balanced_in_float32_is_that_of_float64_however_sure_the_model_is() -> None:
    logits, target, features = batch(rows=200)
    # From plainly wrong to right by 30 nats: there 1 - p is all rounding, and epsilon keeps the quotient finite.
    sure = torch.linspace(-30, 30, 200, dtype=torch.float64)[:, None] * F.one_hot(target, 5)
    weights = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)
    found = []
    for dtype in (torch.float64, torch.float32):
        leaf = (logits + sure).to(dtype).requires_grad_()
        given = {"class_weights": weights.to(dtype), "reduction": "none"}
        loss = influence_balanced_loss(leaf, target, features.to(dtype), **given)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        found.append((loss.detach().double(), gradient.double()))
    (right_loss, right_gradient), (loss, gradient) = found
    assert float((loss - right_loss).abs().max() / right_loss.abs().max()) < 1e-4
    assert float((gradient - right_gradient).abs().max() / right_gradient.abs().max()) < 2e-3


def test_the_explainers_module_runs_with_ours() -> None:
    logits, target, features = batch()
    weights = inverse_count_weights(torch.tensor([100.0, 200.0, 50.0, 10.0, 30.0], dtype=torch.float64))
    criterion = IBLoss(weight=weights, alpha=1000)
    logits.requires_grad_()
    loss = criterion(logits, target, features)
    loss.backward()
    assert bool((logits.grad != 0).any())
    norms = features.abs().sum(1)
    for given in (norms, norms[:, None]):
        torch.testing.assert_close(criterion(logits, target, given), loss)


def test_cross_entropy_teaches_first_then_influence_balances_at_its_scale() -> None:
    logits, target, features = batch()
    weights = inverse_count_weights(torch.tensor([100.0, 200.0, 50.0, 10.0, 30.0], dtype=torch.float64))
    criterion = StreamIBLoss(after=60)
    plain = F.cross_entropy(logits, target)
    raw = influence_balanced_loss(logits, target, features, class_weights=weights)
    for _ in range(2):
        criterion.observe(30)
        torch.testing.assert_close(criterion(logits, target, features, weights), plain)
    criterion.observe(30)
    leaf = logits.clone().requires_grad_()
    loss = criterion(leaf, target, features, weights)
    torch.testing.assert_close(loss.detach(), plain)  # its mean over these rows, always the same, is that of the other
    (ours,) = torch.autograd.grad(loss, leaf)
    (theirs,) = torch.autograd.grad(
        influence_balanced_loss(leaf, target, features, class_weights=weights) * plain / raw, leaf
    )
    torch.testing.assert_close(ours, theirs)
    other = StreamIBLoss(after=60)
    other.load_state_dict(criterion.state_dict())
    torch.testing.assert_close(other(logits, target, features, weights), loss.detach())


def test_the_second_phase_begins_where_the_loss_no_longer_falls() -> None:
    _, target, features = batch()
    criterion = StreamIBLoss(after="plateau")
    weights = torch.ones(5, dtype=torch.float64)
    began = []
    for step in range(2600):
        sure = 2 * min(1.0, step / 800)  # the loss falls for 800 steps
        criterion(F.one_hot(target, 5).double() * sure, target, features, weights)
        criterion.observe(1)
        began += [step] if criterion.balanced else []
    assert 800 < began[0] < 2500


def test_logit_adjustment_answers_under_any_prior() -> None:
    # A model that knows nothing but the prior: trained with adjustment its logits carry no prior, and the answer at
    # balance 0 is the stream's prior, at balance 1 uniform.
    prior = torch.tensor([0.7, 0.2, 0.1])
    target = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    bias = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([bias], max_iter=50)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = logit_adjusted_loss(bias.expand(100, 3), target, prior.log())
        loss.backward()
        return loss

    optimizer.step(closure)
    logits = bias.detach()[None]
    torch.testing.assert_close(balanced_log_probabilities(logits, prior.log(), 0.0).exp()[0], prior, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        balanced_log_probabilities(logits, prior.log(), 1.0).exp()[0], torch.full((3,), 1 / 3), atol=1e-3, rtol=0
    )


def test_focal_loss_is_its_formula_and_cross_entropy_at_gamma_zero() -> None:
    logits, target, _ = batch()
    p = torch.softmax(logits, 1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(focal_loss(logits, target), (-((1 - p) ** 2) * p.log()).mean())
    torch.testing.assert_close(focal_loss(logits, target, gamma=0.0), F.cross_entropy(logits, target))
    sure = torch.tensor([[50.0, -50.0]], requires_grad=True)
    focal_loss(sure, torch.tensor([0]), gamma=0.5).backward()
    assert bool(sure.grad.isfinite().all())


@pytest.mark.parametrize("name", ["cross_entropy", "logit_adjusted", "focal", "influence_balanced"])
def test_rows_that_cannot_count_are_left_out(name: str) -> None:
    logits, target, features = batch()
    functions = {
        "cross_entropy": lambda z, t, h: cross_entropy_loss(z, t),
        "logit_adjusted": lambda z, t, h: logit_adjusted_loss(z, t, torch.linspace(-1, 0, 5, dtype=torch.float64)),
        "focal": lambda z, t, h: focal_loss(z, t),
        "influence_balanced": lambda z, t, h: influence_balanced_loss(z, t, h),
    }
    function = functions[name]
    right = function(logits[3:], target[3:], features[3:])
    logits[0, 2], logits[1, 0], target[2] = torch.nan, torch.inf, 5
    logits.requires_grad_()
    loss = function(logits, target, features)
    loss.backward()
    torch.testing.assert_close(loss.detach(), right)
    assert bool(logits.grad.isfinite().all())
    assert torch.equal(logits.grad[:3], torch.zeros(3, 5, dtype=torch.float64))


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="decay"):
        ClassCounts(2, decay=0)
    with pytest.raises(ValueError, match="are not"):
        cross_entropy_loss(torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="features"):
        influence_balanced_loss(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 4))
