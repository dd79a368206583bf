"""The compiled answers are those of torch, but for rounding, and a row's depend on nothing else."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer import tilting
from trainer.compiled import library_of
from trainer.label_density import LabelDensity, LabelGrid
from trainer.predictive import Components, LearnedPrior, Point, TiltedGrid

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
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    tilted = TiltedGrid.of(grid, 1030.0, 40.0, "uniform", 0.5)
    found = []
    for name, flag in (("default", None), ("avx2", "avx2"), ("avx512", "avx512vl")):
        if flag is None or flag in flags:
            library = tilting.load(library_of(tilting.SOURCE, name))
            assert library is not None
            monkeypatch.setattr(tilting, "_library", library)
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
