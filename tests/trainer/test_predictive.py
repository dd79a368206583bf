"""The answer under any label prior agrees with Bayes' rule, and there always is one."""

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.label_density import LabelDensity, LabelGrid
from trainer.predictive import Components, GridDensity, LearnedPrior, cell_probabilities, log_score, predict

PRIORS: tuple[LearnedPrior, ...] = ("uniform", "stream", "weighted")
FINE = 64  # points that the reference takes in each cell


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid_of(labels: Tensor) -> LabelGrid:
    density = LabelDensity()
    density.observe(labels)
    return density.grid()


def skewed_labels(count: int = 50_000) -> Tensor:
    return 10 * torch.empty(count, dtype=torch.float64).exponential_(generator=generator(0)) - 20


def random_components(rows: int, count: int = 4, seed: int = 0) -> Components:
    source = generator(seed)
    weights = torch.log_softmax(torch.randn(rows, count, generator=source), 1)
    means = torch.randn(rows, count, generator=source)
    scales = torch.exp(torch.randn(rows, count, generator=source) * 0.7 - 1).clamp(0.1, 1.5)
    return Components(weights, means, scales, label_mean=-10.0, label_sd=10.0)


def rows_of(components: Components, rows: slice) -> Components:
    return replace(
        components,
        log_weights=components.log_weights[rows],
        means=components.means[rows],
        scales=components.scales[rows],
    )


def reference_density(
    components: Components, grid: LabelGrid, prior: LearnedPrior, balance: float
) -> tuple[Tensor, ...]:
    """The formula, in float64, on points so dense that sums are integrals: points (P,), masses (B, P)."""
    inner = (torch.arange(FINE, dtype=torch.float64) + 0.5) / FINE
    points = (grid.edges[:-1, None] + grid.widths[:, None] * inner).flatten()
    mean, sd = components.label_mean, components.label_sd
    head = torch.distributions.Normal(mean + sd * components.means.double(), sd * components.scales.double())
    log_h = torch.logsumexp(head.log_prob(points[:, None, None]) + components.log_weights.double(), 2).T
    log_p, log_m, log_w = (
        values.double().repeat_interleave(FINE) for values in (grid.log_density, grid.log_mask, grid.log_weights)
    )
    natural = log_h + {"uniform": log_p, "stream": 0.0, "weighted": -log_w}[prior]
    mass = torch.softmax(natural - balance * log_p + balance * log_m + grid.widths.log().repeat_interleave(FINE), dim=1)
    return points, mass


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("balance", [0.0, 0.3, 1.0])
def test_answers_match_a_dense_float64_reference(prior: LearnedPrior, balance: float) -> None:
    grid, components = grid_of(skewed_labels()), random_components(70)
    points, mass = reference_density(components, grid, prior, balance)
    spread = (mass @ points**2 - (mass @ points) ** 2).sqrt()

    answer = predict(components, grid, learned_prior=prior, balance=balance, interval=0.9)
    assert answer.lower is not None
    assert answer.upper is not None
    levels = [(0.05, answer.lower), (0.5, answer.point), (0.95, answer.upper)]
    if (prior, balance) == ("stream", 0.0):  # there the point is what a plain loss learned, and widens the interval
        inside = (answer.lower < answer.point) & (answer.point < answer.upper)
        mass, levels = mass[inside], [(level, value[inside]) for level, value in levels if level != 0.5]
        assert inside.float().mean() > 0.5
    else:
        mean = predict(components, grid, learned_prior=prior, balance=balance, point="mean").point
        assert float(((mean - mass @ points).abs() / spread).max()) < 0.01
    cumulative = mass.cumsum(1)
    for level, value in levels:
        reached = cumulative.gather(1, torch.searchsorted(points, value)[:, None].clamp_max(len(points) - 1))
        assert float((reached - level).abs().max()) < 0.01


def test_a_plain_loss_answers_with_what_it_learned_inside_the_range_of_labels() -> None:
    grid = grid_of(skewed_labels())
    low, high = float(grid.edges[0]), float(grid.edges[-1])
    wanted = torch.tensor(
        [low - 5, low, low + 0.01, 0.5 * (low + high), high, high + 5, torch.nan], dtype=torch.float64
    )
    means = wanted[:, None].float()
    components = Components(torch.zeros_like(means), means, torch.full_like(means, 0.3 * (high - low)), 0.0, 1.0)
    at_its_prior = {
        "predict": predict(components, grid, learned_prior="stream", balance=0.0, interval=0.9),
        "density": GridDensity.of(components, grid, "stream").answer(0.0, torch.tensor([0.05, 0.95])),
    }
    for answer in at_its_prior.values():
        torch.testing.assert_close(answer.point[:-1], wanted[:-1].clamp(low, high), rtol=1e-5, atol=1e-5)
        assert answer.point[-1].isfinite()
        assert answer.lower is not None
        assert answer.upper is not None
        assert ((answer.lower <= answer.point) & (answer.point <= answer.upper)).all()


@pytest.mark.parametrize("prior", PRIORS)
def test_scores_match_the_reference_density(prior: LearnedPrior) -> None:
    grid, components = grid_of(skewed_labels()), random_components(70)
    points, mass = reference_density(components, grid, prior, 0.0)
    chosen = torch.randint(len(points), (70,), generator=generator(3))
    score = log_score(components, grid, points[chosen], learned_prior=prior)
    own = mass.view(70, -1, FINE).sum(2) / grid.widths
    expected = own[torch.arange(70), chosen // FINE].log()
    likely = expected > -20
    torch.testing.assert_close(score[likely].double(), expected[likely], rtol=0, atol=0.05)


def test_the_score_is_that_of_a_density_that_integrates_to_one() -> None:
    grid, components = grid_of(skewed_labels()), random_components(3)
    every = Components(
        *(getattr(components, f.name)[:1].expand(len(grid), -1) for f in fields(components)[:3]), -10.0, 10.0
    )
    scores = log_score(every, grid, grid.centres, learned_prior="uniform")
    assert float((scores.double().exp() * grid.widths).sum()) == pytest.approx(1, abs=1e-4)


def bayes_problem() -> tuple[LabelGrid, Tensor, Tensor]:
    """Exponential labels y in sd units, features x = y + noise of sd .3: p(y|x) ~ N(x; y, .3^2) p(y)."""
    labels = torch.empty(200_000, dtype=torch.float64).exponential_(generator=generator(1))
    x = labels[:256] + 0.3 * torch.randn(256, generator=generator(2), dtype=torch.float64)
    return grid_of(labels), labels[:256], x


def test_a_balanced_head_gives_back_the_true_posterior_at_balance_0() -> None:
    """h = N(y; x, .3^2) is p(y|x)/p(y); the posterior is a normal around x - .09, cut off at 0."""
    grid, _, x = bayes_problem()
    x = x[(x > 0.9) & (x < 3)]
    head = Components(torch.zeros(len(x), 1), x[:, None].float(), torch.full((len(x), 1), 0.3))
    answer = predict(head, grid, learned_prior="uniform", balance=0.0, interval=0.9)
    assert answer.lower is not None
    assert answer.upper is not None
    torch.testing.assert_close(answer.point, x - 0.09, rtol=0, atol=0.03)
    torch.testing.assert_close(answer.upper - answer.lower, torch.full_like(x, 2 * 1.645 * 0.3), rtol=0.05, atol=0)


def test_a_balanced_head_answers_with_its_own_location_at_balance_1() -> None:
    grid, _, x = bayes_problem()
    x = x[(x > 0.9) & (x < 3)]
    head = Components(torch.zeros(len(x), 1), x[:, None].float(), torch.full((len(x), 1), 0.3))
    answer = predict(head, grid, learned_prior="uniform", balance=1.0)
    torch.testing.assert_close(answer.point, x, rtol=0, atol=0.01)


def test_heads_that_learned_different_priors_agree_when_each_is_exact() -> None:
    """A plain head trained to p(y|x) = N(x - .09, .3^2) and a balanced one trained to N(x, .3^2) tell the same."""
    grid, _, x = bayes_problem()
    x = x[(x > 1.2) & (x < 2.5)]
    scale = torch.full((len(x), 1), 0.3)
    balanced = Components(torch.zeros(len(x), 1), x[:, None].float(), scale)
    plain = Components(torch.zeros(len(x), 1), x[:, None].float() - 0.09, scale)
    for balance in (0.0, 0.5, 1.0):
        one = predict(balanced, grid, learned_prior="uniform", balance=balance).point
        other = predict(plain, grid, learned_prior="stream", balance=balance).point
        torch.testing.assert_close(one, other, rtol=0, atol=0.05)


def test_intervals_cover_what_they_claim() -> None:
    grid, labels, x = bayes_problem()
    head = Components(torch.zeros(256, 1), x[:, None].float(), torch.full((256, 1), 0.3))
    answer = predict(head, grid, learned_prior="uniform", balance=0.0, interval=0.9)
    covered = ((labels >= answer.lower) & (labels <= answer.upper)).double().mean()
    assert 0.85 < float(covered) < 0.95  # 256 labels: .9 +- 2.7 standard errors


def test_a_component_far_narrower_than_a_cell_is_still_found() -> None:
    labels = torch.cat([skewed_labels(20_000), torch.tensor([1e5, 1e7])])
    grid = grid_of(labels)
    means = torch.linspace(200, 9e6, 300)
    head = Components(torch.zeros(300, 1), means[:, None], torch.full((300, 1), 1e-3))
    answer = predict(head, grid, learned_prior="stream", balance=0.0).point
    assert ((answer - means).abs() <= 1.01 * grid.widths[grid.cell_of(means)]).all()


PARAMETER = st.floats(width=32) | st.floats(-3, 3, width=32)


@st.composite
def any_components(draw: st.DrawFn) -> Components:
    count = draw(st.integers(1, 4))
    columns = st.lists(PARAMETER, min_size=count, max_size=count)
    rows = draw(st.integers(1, 3))
    weights, means = (torch.tensor([draw(columns) for _ in range(rows)]) for _ in range(2))
    scales = torch.tensor([draw(columns) for _ in range(rows)]).abs()
    return Components(weights, means, scales, draw(st.floats(-1e6, 1e6)), draw(st.floats(1e-3, 1e6)))


GRIDS = [
    LabelGrid.empty(),
    grid_of(torch.tensor([3.0])),
    grid_of(skewed_labels(2000)),
    grid_of(torch.cat([skewed_labels(500), torch.tensor([1e9])])),
]


@given(
    any_components(),
    st.sampled_from(GRIDS),
    st.sampled_from(PRIORS),
    st.floats(0, 1),
    st.sampled_from(["median", "mean"]),
    st.floats(0.01, 0.99),
)
@settings(max_examples=150, deadline=None)
def test_there_is_an_ordered_answer_whatever_the_head_says(components, grid, prior, balance, point, interval) -> None:  # type: ignore[no-untyped-def]
    answer = predict(components, grid, learned_prior=prior, balance=balance, point=point, interval=interval)
    assert answer.point.isfinite().all()
    assert (answer.lower <= answer.point).all()
    assert (answer.point <= answer.upper).all()
    if len(grid):
        assert answer.lower.min() >= grid.edges[0]
        assert answer.upper.max() <= grid.edges[-1]
    probabilities = cell_probabilities(components, grid, learned_prior=prior, balance=balance)
    assert probabilities.shape == (len(components.means), len(grid))
    assert (probabilities >= 0).all()
    if len(grid):
        torch.testing.assert_close(probabilities.sum(1), torch.ones(len(probabilities)), rtol=0, atol=1e-4)
    labels = torch.zeros(len(components.means))
    assert log_score(components, grid, labels, learned_prior=prior).isfinite().all()


@pytest.mark.parametrize("point", ["median", "mean"])
def test_quantiles_rise_with_their_level(point: str) -> None:
    grid, components = grid_of(skewed_labels()), random_components(64)
    lower, upper = [], []
    for interval in (0.05, 0.3, 0.6, 0.9, 0.99):
        answer = predict(components, grid, learned_prior="uniform", balance=0.5, point=point, interval=interval)  # type: ignore[arg-type]
        lower.append(answer.lower)
        upper.append(answer.upper)
    assert (torch.stack(lower).diff(dim=0) <= 0).all()
    assert (torch.stack(upper).diff(dim=0) >= 0).all()


def test_an_interval_can_be_given_by_the_levels_of_its_ends() -> None:
    grid, components = grid_of(skewed_labels()), random_components(64)
    by_levels, central = (
        predict(components, grid, learned_prior="uniform", balance=0.0, interval=interval)
        for interval in ((0.05, 0.95), 0.9)
    )
    torch.testing.assert_close(by_levels.lower, central.lower)
    torch.testing.assert_close(by_levels.upper, central.upper)


@pytest.mark.parametrize("seed", range(4))
def test_a_row_gets_the_same_bits_whatever_else_is_in_the_batch(seed: int) -> None:
    grid = grid_of(skewed_labels())
    components = random_components(64 * 5, seed=seed)
    components.means[7] = 1e4  # a row that underflows, to be done in float64, among others
    components.means[11] = math.nan
    for point in ("median", "mean"):
        answers = [
            predict(some, grid, learned_prior="uniform", balance=0.7, point=point, interval=0.8)  # type: ignore[arg-type]
            for some in (components, *(rows_of(components, slice(start, start + 64)) for start in range(0, 320, 64)))
        ]
        for field in fields(answers[0]):
            parts = torch.cat([getattr(answer, field.name) for answer in answers[1:]])
            assert torch.equal(getattr(answers[0], field.name), parts)


@pytest.mark.parametrize("rows", [1, 3, 63, 65, 128])
def test_rows_alone_or_in_other_places_get_the_same_bits(rows: int) -> None:
    grid, components = grid_of(skewed_labels()), random_components(256)
    whole = predict(components, grid, learned_prior="uniform", balance=0.7, interval=0.8)
    part = predict(
        rows_of(components, slice(100, 100 + rows)), grid, learned_prior="uniform", balance=0.7, interval=0.8
    )
    for field in fields(whole):
        assert torch.equal(getattr(whole, field.name)[100 : 100 + rows], getattr(part, field.name))


def test_a_row_without_a_usable_density_is_answered_by_the_marginal() -> None:
    labels = skewed_labels()
    grid = grid_of(labels)
    broken = Components(torch.zeros(1, 1), torch.tensor([[math.nan]]), torch.ones(1, 1))
    answer = predict(broken, grid, learned_prior="uniform", balance=0.0, interval=0.5)
    expected = torch.quantile(labels, torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64))
    assert float(answer.point) == pytest.approx(float(expected[0]), abs=0.3)
    assert float(answer.lower) == pytest.approx(float(expected[1]), abs=0.3)
    assert float(answer.upper) == pytest.approx(float(expected[2]), abs=0.3)


def test_a_head_far_beyond_the_labels_answers_with_the_nearest() -> None:
    grid = grid_of(skewed_labels())
    head = Components(torch.zeros(2, 1), torch.tensor([[-1e4], [1e4]]), torch.full((2, 1), 0.1))
    answer = predict(head, grid, learned_prior="stream", balance=0.0).point
    assert grid.edges[0] <= answer[0] <= grid.edges[1]
    assert grid.edges[-2] <= answer[1] <= grid.edges[-1]


def test_before_any_label_the_answer_is_the_heads_own() -> None:
    head = Components(torch.zeros(1, 1), torch.tensor([[2.0]]), torch.tensor([[0.5]]), label_mean=100.0, label_sd=10.0)
    answer = predict(head, LabelGrid.empty(), learned_prior="uniform", balance=0.5, interval=0.9)
    assert float(answer.point) == pytest.approx(120)
    assert float(answer.upper) == pytest.approx(120 + 1.6449 * 5, abs=1e-3)
    assert float(answer.lower) == pytest.approx(120 - 1.6449 * 5, abs=1e-3)
    score = log_score(head, LabelGrid.empty(), torch.tensor([120.0]), learned_prior="uniform")
    assert float(score) == pytest.approx(-math.log(5 * math.sqrt(2 * math.pi)), abs=1e-5)


def test_labels_large_and_close_together_keep_their_precision() -> None:
    labels = 1.7e9 + torch.randn(5000, generator=generator(5), dtype=torch.float64)
    head = Components(torch.zeros(1, 1), torch.tensor([[0.5]]), torch.tensor([[0.1]]), 1.7e9, 1.0)
    for point in ("median", "mean"):
        answer = predict(head, grid_of(labels), learned_prior="uniform", balance=1.0, point=point)  # type: ignore[arg-type]
        assert float(answer.point) == pytest.approx(1.7e9 + 0.5, abs=0.02)


def test_a_label_beyond_the_range_scores_worse_the_farther_it_is() -> None:
    grid, components = grid_of(skewed_labels()), rows_of(random_components(1), slice(0, 1))
    last = float(grid.edges[-1])
    scores = [
        float(log_score(components, grid, torch.tensor([last + far]), learned_prior="uniform"))
        for far in (-1e-3, 10, 1e4)
    ]
    assert scores[0] > scores[1] > scores[2] > -math.inf


def test_the_heads_output_may_be_a_view_of_another_tensor() -> None:
    grid, components = grid_of(skewed_labels()), random_components(5)
    joined = torch.cat([components.log_weights, components.means, components.scales], 1)
    views = Components(*joined.split(4, 1), components.label_mean, components.label_sd)
    answers = [predict(some, grid, learned_prior="uniform", balance=0.5) for some in (views, components)]
    assert torch.equal(answers[0].point, answers[1].point)


def test_no_rows_give_no_answers() -> None:
    answer = predict(random_components(0), grid_of(skewed_labels()), learned_prior="uniform", balance=0.5, interval=0.9)
    assert len(answer.point) == 0


@pytest.mark.parametrize(
    "wrong", [{"balance": -0.1}, {"balance": 1.1}, {"balance": math.nan}, {"interval": 1.0}, {"interval": (0.6, 0.4)}]
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    for grid in (grid_of(skewed_labels()), LabelGrid.empty()):
        with pytest.raises(ValueError, match=r"balance must be|an interval needs"):
            predict(random_components(1), grid, **({"learned_prior": "uniform", "balance": 0.5} | wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize("prior", ["uniform", "stream", "weighted"])
@pytest.mark.parametrize("point", ["median", "mean"])
@pytest.mark.parametrize("balance", [0.0, 0.3, 1.0])
def test_a_density_computed_once_answers_as_one_computed_for_the_balance(balance, point, prior) -> None:  # type: ignore[no-untyped-def]
    components, grid = random_components(200), grid_of(skewed_labels())
    once = GridDensity.of(components, grid, prior).answer(balance, torch.tensor([0.05, 0.95]), point)
    own = predict(components, grid, learned_prior=prior, balance=balance, interval=0.9, point=point)
    span = float(grid.edges[-1] - grid.edges[0])
    for left, right in zip((once.point, once.lower, once.upper), (own.point, own.lower, own.upper), strict=True):
        torch.testing.assert_close(left, right, atol=2e-5 * span, rtol=0)


def test_rows_that_a_balance_tilts_out_of_reach_are_answered_exactly() -> None:
    grid = grid_of(skewed_labels())
    lowest = int(grid.log_density.argmax())
    narrow = Components(
        torch.zeros(1, 1),
        grid.centres[lowest].float().view(1, 1),
        torch.full((1, 1), 1e-3),
        torch.zeros(()),
        torch.ones(()),
    )
    rare = replace(grid, log_density=grid.log_density + 80 * (torch.arange(len(grid)) == lowest))
    once = GridDensity.of(narrow, rare, "stream").answer(1.0)
    own = predict(narrow, rare, learned_prior="stream", balance=1.0)
    torch.testing.assert_close(once.point, own.point)


def test_the_level_of_a_quantile_is_its_probability() -> None:
    components, grid = random_components(200), grid_of(skewed_labels())
    density = GridDensity.of(components, grid, "uniform")
    answer = density.answer(0.0, torch.tensor([0.1, 0.7]))
    for label, level in ((answer.lower, 0.1), (answer.point, 0.5), (answer.upper, 0.7)):
        assert label is not None
        torch.testing.assert_close(density.level(label), torch.full((len(label),), level), atol=1e-4, rtol=0)
    beyond = torch.tensor([-1e9, 1e9]).repeat(len(answer.point) // 2)
    torch.testing.assert_close(density.level(beyond), torch.tensor([0.0, 1.0]).repeat(len(beyond) // 2))
