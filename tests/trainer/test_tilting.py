"""The compiled answers are those of torch, but for rounding, and a row's depend on nothing else."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.trainer.instructions import each_library
from trainer import tilting
from trainer.label_density import LabelDensity, LabelGrid
from trainer.losses import mixture_of_outputs
from trainer.predictive import (
    Components,
    GridDensity,
    LearnedPrior,
    Point,
    TiltedGrid,
    cell_probabilities,
    predict,
)

pytestmark = pytest.mark.skipif(not tilting.is_loaded(), reason="it is not compiled here")
ENDS = torch.tensor([0.05, 0.95])
ROWS = 150


@pytest.fixture(scope="module")
def grid() -> LabelGrid:
    labels = LabelDensity()
    labels.observe(1000 + 20 * torch.randn(3000, generator=torch.Generator().manual_seed(0)).exp())
    return labels.grid()


def components(count: int, seed: int = 0) -> Components:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(ROWS, count, generator=generator)
    scales = torch.rand(ROWS, count, generator=generator).mul(8).sub(5).exp()
    log_weights = torch.randn(ROWS, count, generator=generator).log_softmax(1)
    return Components(log_weights, means, scales, torch.tensor(1030.0), torch.tensor(40.0))


def answers(tilted: TiltedGrid, of: Components, point: Point, ends: Tensor | None) -> list[Tensor]:
    answer = tilted.predict(of, point, ends)
    return [part for part in (answer.point, answer.lower, answer.upper) if part is not None]


@pytest.mark.parametrize("count", [1, 4, 64])
@pytest.mark.parametrize("point", ["median", "mean"])
@pytest.mark.parametrize("prior", ["uniform", "weighted", "stream"])
@pytest.mark.parametrize("balance", [0.0, 0.3, 1.0])
def test_answers_are_those_of_torch(
    grid: LabelGrid, count: int, point: Point, prior: LearnedPrior, balance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = components(count)
    tilted = TiltedGrid.of(grid, 1030.0, 40.0, prior, balance)
    for ends in (None, ENDS):
        compiled = answers(tilted, of, point, ends)
        with monkeypatch.context() as without:
            without.setattr(tilting, "_library", None)
            by_torch = answers(tilted, of, point, ends)
        for one, other in zip(compiled, by_torch, strict=True):
            # Where hardly any mass lies between two levels, rounding moves a quantile by a part of a cell.
            torch.testing.assert_close(one, other, rtol=0, atol=2e-3)
            assert float((one - other).abs().median()) < 3e-4


def test_every_instruction_set_gives_the_same_within_rounding(grid: LabelGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    tilted = TiltedGrid.of(grid, 1030.0, 40.0, "uniform", 0.5)
    found = []
    for _ in each_library(tilting, monkeypatch):
        found.append(torch.stack(answers(tilted, components(4), "median", ENDS)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=2e-3)


@pytest.mark.parametrize("point", ["median", "mean"])
def test_a_row_is_answered_alike_wherever_it_stands(grid: LabelGrid, point: Point) -> None:
    tilted = TiltedGrid.of(grid, 1030.0, 40.0, "uniform", 0.3)
    of = components(4)
    whole = torch.stack(answers(tilted, of, point, ENDS))
    for rows in (slice(0, 1), slice(7, 8), slice(3, 20), slice(149, 150), slice(0, 149, 4)):
        part = Components(of.log_weights[rows], of.means[rows], of.scales[rows], of.label_mean, of.label_sd)
        assert torch.equal(torch.stack(answers(tilted, part, point, ENDS)), whole[:, rows])


def test_no_row_is_without_an_answer(grid: LabelGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Densities far outside, infinitely narrow or not finite are answered as torch answers them."""
    odd = [math.nan, math.inf, -math.inf, 1e30, -1e30, 1e5, -1e5, 0.0]
    means = torch.tensor([[a, b] for a in odd for b in odd])
    scales = torch.tensor([[a, b] for a in (1.0, 1e-30, math.inf, math.nan) for b in (1.0, 1e30)]).repeat(8, 1)
    log_weights = torch.tensor([[0.0, -math.inf], [-0.7, -0.7], [math.nan, 0.0], [-1e4, -1e4]]).repeat(16, 1)
    of = Components(log_weights, means, scales, torch.tensor(1030.0), torch.tensor(40.0))
    for balance in (0.0, 0.5, 1.0):
        tilted = TiltedGrid.of(grid, 1030.0, 40.0, "uniform", balance)
        compiled = torch.stack(answers(tilted, of, "median", ENDS))
        with monkeypatch.context() as without:
            without.setattr(tilting, "_library", None)
            by_torch = torch.stack(answers(tilted, of, "median", ENDS))
        assert compiled.isfinite().all()
        torch.testing.assert_close(compiled, by_torch, rtol=0, atol=0.05)


def labels_within_and_beyond(grid: LabelGrid) -> Tensor:
    inside = torch.linspace(float(grid.edges[0]), float(grid.edges[-1]), ROWS - 22, dtype=torch.float64)
    beyond = torch.tensor([-1e6, 1e6], dtype=torch.float64)
    return torch.cat([inside, grid.edges[:20].double(), beyond])  # a label on an edge is in the upper cell


def scored(density: GridDensity, labels: Tensor) -> dict[str, Tensor]:
    of = density.scored(labels, ENDS)
    assert of.natural.lower is not None
    assert of.natural.upper is not None
    ends = {"lower": of.natural.lower, "upper": of.natural.upper}
    return {
        "score": of.log_score,
        "level": of.level,
        "natural": of.natural.point,
        "balanced": of.balanced.point,
        **ends,
    }


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("prior", ["uniform", "weighted", "stream"])
def test_scores_are_those_of_torch(
    grid: LabelGrid, count: int, prior: LearnedPrior, monkeypatch: pytest.MonkeyPatch
) -> None:
    density, labels = GridDensity.of(components(count), grid, prior), labels_within_and_beyond(grid)
    compiled = scored(density, labels)
    monkeypatch.setattr(tilting, "_library", None)
    for name, by_torch in scored(density, labels).items():
        tolerance = 1e-4 if name in ("score", "level") else 2e-3
        assert compiled[name].dtype == by_torch.dtype
        torch.testing.assert_close(compiled[name], by_torch, rtol=1e-6, atol=tolerance)
        assert float((compiled[name] - by_torch).abs().median()) < 0.15 * tolerance


def test_scores_by_every_instruction_set_agree_and_depend_on_their_row_alone(
    grid: LabelGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, rows = labels_within_and_beyond(grid), slice(3, 20)
    density = GridDensity.of(components(4), grid, "uniform")
    part = replace(density, mass=density.mass[rows], total=density.total[rows])
    found = []
    for _ in each_library(tilting, monkeypatch):
        found.append(scored(density, labels))
        assert all(torch.equal(own, found[-1][key][rows]) for key, own in scored(part, labels[rows]).items())
    for other in found[1:]:
        for key, values in other.items():
            torch.testing.assert_close(values, found[0][key], rtol=1e-6, atol=2e-3)


def test_scores_of_rows_that_the_balance_tilts_out_of_reach_have_exact_answers(grid: LabelGrid) -> None:
    often = int(grid.log_density.argmax())
    means = grid.centres[[often, often + 60]].float()[:, None]
    narrow = Components(torch.zeros(2, 1), means, torch.full((2, 1), 1e-3))
    near = (torch.arange(len(grid)) - often).abs() < 30
    density = GridDensity.of(narrow, replace(grid, log_density=grid.log_density + 80 * near), "stream")
    labels, raw_edges = grid.centres[:2].double(), grid.edges.double()
    found = tilting.scores(density.mass, labels, raw_edges, density._tilted(1.0), ENDS, 0.0)
    assert found[5].isnan().tolist() == [True, False]
    exact = predict(narrow, density.grid, learned_prior="stream", balance=1.0)
    torch.testing.assert_close(density.scored(labels, ENDS).balanced.point, exact.point)


def test_masses_of_cells_are_those_of_torch_whatever_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randn(5000, generator=generator, dtype=torch.float64).exp()
    density = LabelDensity()
    density.observe(labels)
    outputs = 5 * torch.randn(300, 13, generator=generator)
    outputs[7, 3], outputs[8, 5], outputs[9, 12], outputs[10] = torch.nan, torch.inf, 1e30, -1e30
    mixture = mixture_of_outputs(outputs, 4, (1e-6, 1e3))
    components = Components(mixture.log_weights, mixture.means, mixture.log_scales.exp(), 1.6, 2.1)
    results = []
    for by_torch in (True, False):
        if by_torch:
            monkeypatch.setattr(tilting, "_library", None)
        results.append(
            [
                cell_probabilities(components, density.grid(), learned_prior="uniform", balance=balance)
                for balance in (0.0, 0.5, 1.0)
            ]
        )
        monkeypatch.undo()
    for a, b in zip(*results, strict=True):
        assert bool(a.isfinite().all())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
