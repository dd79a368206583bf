"""The answer under any label prior: from a head's density and the label density to a point and an interval.

A head trained by a balanced loss gives h(y|x) ~ p(y|x) / p(y), as if every label were equally likely; one trained by a
plain likelihood gives h ~ p(y|x); one trained by a likelihood with weights w(y) gives h ~ w(y) p(y|x). With the label
density p(y) beside it, Bayes' rule gives the answer at any balance b between the stream's own prior (0) and all labels
alike (1):

    p_b(y|x) ~ p(y|x) p(y)^-b m(y)^b,    m(y) = min(1, labels within one bandwidth / 40),

on the cells of a LabelGrid, where m keeps the answer off regions that hardly any label has been seen in. The label is
uniform within a cell: point, interval and score all follow from the cells' probabilities.

Every row is computed by operations of its own, by the compiled kernel or in tiles of a fixed number of rows.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from trainer import tilting
from trainer.label_density import LabelGrid

LearnedPrior = Literal["uniform", "stream", "weighted"]
"""What h(y|x) is proportional to: p(y|x) / p(y), p(y|x), or w(y) p(y|x)."""
Point = Literal["median", "mean"]

_TILE_ROWS = 128  # few enough for a tile of 256 cells to stay in the second-level cache
_LEAST_EXPONENT = -60.0
_LARGEST_TOTAL = 2.0**100  # the same above it, for what was held to the largest exponent
_RELIABLE_TOTAL = 1e-15  # below it what was cut off at the least exponent may matter: the row is done in float64
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Components:
    """A head's density for B rows, a mixture of K Gaussians; K = 1 for a Gaussian head.

    Attributes:
        log_weights: (B, K) natural logs of the mixture weights.
        means: (B, K) in label standard deviations from the label mean.
        scales: (B, K) standard deviations of the components, in label standard deviations; positive.
        label_mean: (), raw label units.
        label_sd: (), raw label units; positive.
    """

    log_weights: Tensor
    means: Tensor
    scales: Tensor
    label_mean: Tensor | float = 0.0
    label_sd: Tensor | float = 1.0

    def where(self, condition: Tensor, other: "Components") -> "Components":
        """Return these where a condition () holds, else others in the same units; the condition is not waited for."""
        return Components(
            torch.where(condition, self.log_weights, other.log_weights),
            torch.where(condition, self.means, other.means),
            torch.where(condition, self.scales, other.scales),
            self.label_mean,
            self.label_sd,
        )


@dataclass(frozen=True)
class Predictive:
    """Answers for B rows, in raw label units, float64.

    Attributes:
        point: (B,) median or mean.
        lower: (B,) lower end of the interval, or None if no interval was asked for; never above the point.
        upper: (B,) upper end, or None; never below the point.
    """

    point: Tensor
    lower: Tensor | None = None
    upper: Tensor | None = None


class Scored(NamedTuple):
    """B labels beside what was said of them, and both answers that metrics are kept of."""

    log_score: Tensor  # (B,) float32, see the function of that name
    level: Tensor  # (B,) float32, P(Y <= label)
    natural: Predictive  # at balance 0, with an interval
    balanced: Predictive  # at balance 1


@torch.no_grad()
def predict(
    components: Components,
    grid: LabelGrid,
    *,
    learned_prior: LearnedPrior,
    balance: float,
    point: Point = "median",
    interval: float | tuple[float, float] | None = None,
) -> Predictive:
    """Answer for each row with a point and, if asked, an interval.

    Never NaN. A row whose density reaches no cell of the grid (parameters that are not finite, or so far away that
    float64 underflows) is answered by the marginal label density at that balance, p(y)^(1-b) m(y)^b. On an empty grid
    the answer is the head's own mean, and the quantiles of the Gaussian with the head's mean and variance.

    Args:
        components: the head's density.
        grid: the label density that the head was trained beside.
        learned_prior: what the head's loss makes it learn.
        balance: 0 for the stream's own label prior, 1 for all labels alike, or between.
        point: the median makes the absolute error small, the mean the squared error.
        interval: the probability of a central interval, or the two probability levels of its ends. An interval that
            would leave out the point (the mean of a skewed density) is widened to reach it.

    Returns:
        Point and interval, raw label units.

    Raises:
        ValueError: balance is outside [0, 1], or the interval's levels decrease or are not within (0, 1).
    """
    levels = _levels(interval)
    _check_balance(balance)
    if not len(grid):
        return _head_alone(components, levels)
    ends = components.means.new_tensor(levels) if levels else None
    return TiltedGrid.of(grid, components.label_mean, components.label_sd, learned_prior, balance).predict(
        components, point, ends
    )


@dataclass(frozen=True)
class TiltedGrid:
    """A grid as every answer at one balance needs it: what rows have in common, computed once for many of them.

    Attributes:
        grid: the label density; not empty.
        learned_prior: what the head's loss makes it learn.
        balance: label prior of the answers, in [0, 1].
        edges: (G + 1,) float32 of the cells, label standard deviations from the label mean; so are the next two.
        centres: (G,) float32 of the cells.
        half_widths: (G,) float32 of the cells.
        log_tilt: (G,) float32, log of what h(y|x) is multiplied with in each cell.
    """

    grid: LabelGrid
    learned_prior: LearnedPrior
    balance: float
    edges: Tensor
    centres: Tensor
    half_widths: Tensor
    log_tilt: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        grid: LabelGrid,
        label_mean: Tensor | float,
        label_sd: Tensor | float,
        learned_prior: LearnedPrior,
        balance: float,
    ) -> Self:
        """Tilt a grid for components of this label scaling."""
        edges = ((grid.edges - label_mean) / label_sd).float()
        centres, half_widths = (edges[1:] + edges[:-1]) / 2, edges.diff() / 2
        log_tilt = _log_tilt(grid, learned_prior, balance)
        return cls(grid, learned_prior, balance, edges, centres, half_widths, log_tilt)

    @torch.no_grad()
    def predict(self, components: Components, point: Point = "median", ends: Tensor | None = None) -> Predictive:
        """Answer as the function of that name does; `ends` (2,) are the levels of an interval, never decreasing."""
        parts = components.log_weights, components.means, components.scales
        if tilting.takes(self.log_tilt, *parts):
            offsets = self._offsets if point == "mean" else None
            answer = Predictive(*tilting.answers(parts, self._columns, offsets, ends).unbind(0))
        else:
            mass = self.masses(components)
            answer = _answer(mass, mass.cumsum(1), self.grid, ends, point)
        stream = self.learned_prior == "stream" and self.balance == 0
        return _around_location(answer, components, self.grid) if stream else answer

    @cached_property
    def _columns(self) -> tuple[Tensor, ...]:
        """What `tilting.answers` wants of a grid."""
        marginal = _log_marginal(self.grid, self.balance).float()
        return self.edges, self.centres, self.half_widths, self.log_tilt, marginal, self.grid.edges.double()

    @cached_property
    def _offsets(self) -> Tensor:
        """(G,) float32, of the centres from the first edge: they keep the precision of labels close together."""
        return (self.grid.centres - self.grid.edges[0]).float()

    @torch.no_grad()
    def masses(self, components: Components) -> Tensor:
        """Return (B, G) float32, proportional to p_b(cell|x); every row has a finite, positive sum.

        h is taken at the middle of a cell. That sum is exact to .1% as long as cells are narrower than two standard
        deviations of a component; a narrower component is widened to half a cell, or it could fall in between.
        """
        parts = components.log_weights, components.means, components.scales
        if tilting.takes(self.log_tilt, *parts):
            return tilting.masses(parts, self._columns[:-1])
        means = components.means.float().contiguous()
        cells = torch.bucketize(means, self.edges[1:-1])
        scales = torch.maximum(components.scales.float(), self.half_widths[cells])
        log_heights = components.log_weights.float() - scales.log()
        # What is largest at the means is nearly always largest of all: without it, exp neither over- nor underflows.
        log_heights = log_heights - (log_heights + self.log_tilt[cells]).amax(1, keepdim=True)
        inverse = math.sqrt(0.5) / scales
        mass = _mixture_masses(log_heights, means, inverse, self.centres, self.log_tilt)
        total = mass.sum(1)
        lost = ~((total > _RELIABLE_TOTAL) & (total < _LARGEST_TOTAL))
        if mass.device.type != "cpu":  # which is not waited for, and has the time
            marginal = _log_marginal(self.grid, self.balance)
            careful = _careful_masses(log_heights, means, inverse, self.centres, self.log_tilt, marginal)
            return torch.where(lost[:, None], careful, mass)
        if bool(lost.any()):
            marginal = _log_marginal(self.grid, self.balance)
            few = log_heights[lost], means[lost], inverse[lost]
            mass[lost] = _careful_masses(*few, self.centres, self.log_tilt, marginal)
        return mass


@torch.no_grad()
def cell_probabilities(
    components: Components, grid: LabelGrid, *, learned_prior: LearnedPrior, balance: float
) -> Tensor:
    """Return p_b(cell|x) for every cell of the grid, (B, G) float32, rows summing to 1; NaN-free like `predict`.

    Raises:
        ValueError: balance is outside [0, 1].
    """
    _check_balance(balance)
    if not len(grid):
        return components.means.new_empty(len(components.means), 0, dtype=torch.float32)
    mass = _masses(components, grid, learned_prior, balance)
    return mass / mass.sum(1, keepdim=True)


@dataclass(frozen=True)
class GridDensity:
    """p_0(y|x) of B rows on the G cells of a grid: labels are scored by it, and answers at any balance follow from it.

    The answers differ from those of `predict` by rounding: there the balance is part of the exponent.

    Attributes:
        components: the head's density.
        grid: the label density that the head was trained beside; not empty.
        learned_prior: what the head's loss makes it learn.
        mass: (B, G) float32, proportional to the cells' probabilities.
        total: (B,) float32, its sums.
    """

    components: Components
    grid: LabelGrid
    learned_prior: LearnedPrior
    mass: Tensor
    total: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, components: Components, grid: LabelGrid, learned_prior: LearnedPrior) -> Self:
        """Evaluate a head's density on a grid."""
        mass = _masses(components, grid, learned_prior, balance=0.0)
        return cls(components, grid, learned_prior, mass, mass.sum(1))

    @cached_property
    def cumulative(self) -> Tensor:
        """(B, G) float32, running sums of the masses."""
        return self.mass.cumsum(1)

    @torch.no_grad()
    def log_score(self, labels: Tensor) -> Tensor:
        """As the function of that name: (B,) float32 for labels (B,) in raw label units."""
        raw, cells = self._places(labels)
        beyond = (self.grid.edges[0] - raw).clamp_min(0.0) + (raw - self.grid.edges[-1]).clamp_min(0.0)
        share = self.mass.gather(1, cells[:, None])[:, 0] / self.total
        return (share.clamp_min(_TINY).log() - (self.grid.widths[cells] + beyond).log()).float()

    @torch.no_grad()
    def level(self, labels: Tensor) -> Tensor:
        """Return P(Y <= y|x) of labels y (B,) in raw label units: (B,) float32 in [0, 1]."""
        raw, cells = self._places(labels)
        part = ((raw - self.grid.edges[cells]) / self.grid.widths[cells]).clamp_(0.0, 1.0).float()
        up_to, here = (of.gather(1, cells[:, None])[:, 0] for of in (self.cumulative, self.mass))
        return ((up_to - (1 - part) * here) / self.cumulative[:, -1]).clamp_(0.0, 1.0)

    @torch.no_grad()
    def answer(self, balance: float, ends: Tensor | None = None, point: Point = "median") -> Predictive:
        """Answer as `predict` does.

        Args:
            balance: label prior of the answer, in [0, 1].
            ends: (2,) probability levels of an interval's ends, never decreasing, which are not waited for.
            point: the median or the mean.
        """
        if balance == 0:
            answer = _answer(self.mass, self.cumulative, self.grid, ends, point)
            stream = self.learned_prior == "stream"
            return _around_location(answer, self.components, self.grid) if stream else answer
        mass = self.mass * self._tilted(balance)
        lost = mass.sum(1) <= _RELIABLE_TOTAL
        if mass.device.type != "cpu" or bool(lost.any()):
            exact = _masses(self.components, self.grid, self.learned_prior, balance)
            mass = torch.where(lost[:, None], exact, mass)
        return _answer(mass, mass.cumsum(1), self.grid, ends, point)

    @torch.no_grad()
    def scored(self, labels: Tensor, ends: Tensor) -> Scored:
        """Return `log_score`, `level`, and `answer` at balances 0 and 1; in one pass over the masses where compiled.

        Args:
            labels: (B,) raw label units.
            ends: (2,) probability levels of the ends of the interval at balance 0, never decreasing.
        """
        if not tilting.takes_masses(self.mass):
            answers = self.answer(0.0, ends), self.answer(1.0)
            return Scored(self.log_score(labels), self.level(labels), *answers)
        raw, edges = labels.double(), self.grid.edges.double()
        found = tilting.scores(self.mass, raw, edges, self._tilted(1.0), ends.float(), _TINY)
        score, level, point, lower, upper, balanced = found.unbind(0)
        natural = Predictive(point, lower, upper)
        if self.learned_prior == "stream":
            natural = _around_location(natural, self.components, self.grid)
        second = self.answer(1.0) if bool(balanced.isnan().any()) else Predictive(balanced)
        return Scored(score.float(), level.float(), natural, second)

    def _tilted(self, balance: float) -> Tensor:
        """Return what masses are multiplied with for another balance, (G,), the largest 1."""
        tilt = balance * (self.grid.log_mask - self.grid.log_density)
        return (tilt - tilt.max()).exp()

    @torch.no_grad()
    def where(self, condition: Tensor, other: "GridDensity") -> "GridDensity":
        """Return this where a condition () holds, else another of the same grid; the condition is not waited for."""
        return replace(
            self,
            components=self.components.where(condition, other.components),
            mass=torch.where(condition, self.mass, other.mass),
            total=torch.where(condition, self.total, other.total),
        )

    def _places(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        raw = labels.to(self.grid.edges)
        return raw, self.grid.cell_of(raw)


@torch.no_grad()
def log_score(components: Components, grid: LabelGrid, labels: Tensor, *, learned_prior: LearnedPrior) -> Tensor:
    """Return log p_0(y|x) of the true labels, natural logs, per raw label unit: the larger, the better.

    It is the log of a density that integrates to one, constant within each cell. A label beyond the range counts as if
    its end cell reached out to it. A probability that underflows counts as the smallest float32.

    Args:
        components: the head's density for B rows.
        grid: the label density; on an empty grid the mixture's own density is scored.
        labels: (B,) raw label units.
        learned_prior: what the head's loss makes it learn.

    Returns:
        (B,) float32, finite.
    """
    if not len(grid):
        offsets = ((labels - components.label_mean) / components.label_sd).unsqueeze(1) - components.means
        terms = components.log_weights - components.scales.log() - 0.5 * (offsets / components.scales) ** 2
        sd = torch.as_tensor(components.label_sd, dtype=terms.dtype, device=terms.device)
        scores = torch.logsumexp(terms, 1) - 0.5 * math.log(2 * math.pi) - sd.log()
        return scores.float().nan_to_num(nan=-math.inf).clamp_min(math.log(_TINY))
    return GridDensity.of(components, grid, learned_prior).log_score(labels)


def _levels(interval: float | tuple[float, float] | None) -> tuple[float, ...]:
    """Return the probability levels of an interval's ends, or nothing."""
    if interval is None:
        return ()
    lower, upper = interval if isinstance(interval, tuple) else ((1 - interval) / 2, (1 + interval) / 2)
    if not 0 < lower <= upper < 1:
        raise ValueError(f"an interval needs levels 0 < lower <= upper < 1, not {lower} and {upper}")
    return lower, upper


def _check_balance(balance: float) -> None:
    if not 0 <= balance <= 1:
        raise ValueError(f"balance must be between 0 (the stream's prior) and 1 (all labels alike), not {balance}")


def _around_location(answer: Predictive, components: Components, grid: LabelGrid) -> Predictive:
    """The answer with the point that a plain loss learned, f(x), inside the range of labels.

    Its Gaussian, of one width for all rows, is there for the interval. Cut off at the ends of the grid, it has median
    and mean further in: for labels near an end, by a good part of that width.
    """
    location = (components.log_weights.exp() * components.means).sum(1).double()
    location = location * components.label_sd + components.label_mean
    point = torch.where(location.isfinite(), location.clamp(grid.edges[0], grid.edges[-1]), answer.point)
    if answer.lower is None or answer.upper is None:
        return Predictive(point)
    return Predictive(point, torch.minimum(answer.lower, point), torch.maximum(answer.upper, point))


def _log_tilt(grid: LabelGrid, learned_prior: LearnedPrior, balance: float) -> Tensor:
    """Return the (G,) log of what h(y|x) is multiplied with in each cell, its width included."""
    tilt = grid.widths.log().float() + balance * (grid.log_mask - grid.log_density)
    match learned_prior:
        case "uniform":
            return tilt + grid.log_density
        case "stream":
            return tilt
        case "weighted":
            return tilt - grid.log_weights


def _log_marginal(grid: LabelGrid, balance: float) -> Tensor:
    """Return the (G,) log of p(y)^(1-b) m(y)^b times the width of each cell, up to a constant."""
    return grid.widths.log().float() + (1 - balance) * grid.log_density + balance * grid.log_mask


def _masses(components: Components, grid: LabelGrid, learned_prior: LearnedPrior, balance: float) -> Tensor:
    """Return (B, G) float32, proportional to p_b(cell|x), as `TiltedGrid.masses` does."""
    tilted = TiltedGrid.of(grid, components.label_mean, components.label_sd, learned_prior, balance)
    return tilted.masses(components)


def _mixture_masses(log_heights: Tensor, means: Tensor, inverses: Tensor, centres: Tensor, log_tilt: Tensor) -> Tensor:
    """Sums over components of exp(height + tilt - ((centre - mean) inverse)^2), (B, G).

    One component at a time in one buffer: a tile stays in cache, and only exp costs more than a pass over it.
    """
    mass = torch.empty(len(means), len(centres), device=means.device)
    rows = _TILE_ROWS if mass.device.type == "cpu" else max(1, len(means))
    term = torch.empty_like(mass[:rows])
    for start in range(0, len(means), rows):
        out = mass[start : start + rows]
        tile = term[: len(out)]
        columns = torch.stack([log_heights, means, inverses])[:, start : start + rows].permute(2, 0, 1)
        for k, (log_height, mean, inverse) in enumerate(columns.unsqueeze(3).unbind(0)):
            torch.sub(centres, mean, out=tile)
            tile.mul_(inverse)
            torch.addcmul(log_tilt, tile, tile, value=-1, out=tile)
            tile.add_(log_height).clamp_min_(_LEAST_EXPONENT)  # exp is several times slower where it nears underflow
            if k == 0:
                torch.exp(tile, out=out)
            else:
                out += tile.exp_()
    return mass


def _careful_masses(
    log_heights: Tensor, means: Tensor, inverses: Tensor, centres: Tensor, log_tilt: Tensor, log_marginal: Tensor
) -> Tensor:
    """Return what `_mixture_masses` does, by logs in float64, its largest 1; the marginal where not finite."""
    heights, middles, inverse = (part.double()[:, :, None] for part in (log_heights, means, inverses))
    offsets = (centres.double() - middles) * inverse
    logs = torch.logsumexp(heights - offsets**2, 1) + log_tilt.double()
    usable = logs.amax(1, keepdim=True).isfinite()
    logs = torch.where(usable, logs, log_marginal.double())
    return torch.exp(logs - logs.amax(1, keepdim=True)).float()


def _answer(mass: Tensor, cumulative: Tensor, grid: LabelGrid, ends: Tensor | None, point: Point) -> Predictive:
    """Answer from the cells' masses and their running sums (B, G); `ends` (2,) are levels, never decreasing."""
    levels = mass.new_empty(0) if ends is None else ends.to(mass)
    if point == "median":
        levels = torch.cat([levels.new_full((1,), 0.5), levels])
    answers = _quantiles(cumulative, levels, grid)
    if point == "mean":
        # Offsets from the first edge keep the precision of labels that are large and close together.
        offsets = (grid.centres - grid.edges[0]).float()
        mean = grid.edges[0] + ((mass * offsets).sum(1, keepdim=True) / cumulative[:, -1:]).double()
        answers = torch.cat([mean, answers], 1)
    if ends is None:
        return Predictive(answers[:, 0])
    centre, lower, upper = answers.T.contiguous()
    return Predictive(centre, torch.minimum(centre, lower), torch.maximum(centre, upper))


def _quantiles(cumulative: Tensor, probabilities: Tensor, grid: LabelGrid) -> Tensor:
    """Return the (R, Q) float64 quantiles of running sums (R, G), linear within a cell, in raw label units."""
    targets = cumulative[:, -1:] * probabilities
    cells = torch.searchsorted(cumulative, targets).clamp_max_(len(grid) - 1)
    above = cumulative.gather(1, cells)
    below = torch.where(cells > 0, cumulative.gather(1, (cells - 1).clamp_min(0)), 0.0)
    part = ((targets - below) / (above - below).clamp_min(_TINY)).clamp_(0.0, 1.0)
    return torch.lerp(grid.edges[cells], grid.edges[cells + 1], part.double())


def _head_alone(components: Components, levels: tuple[float, ...]) -> Predictive:
    """Answer from the mixture's mean and variance, as there is no label density; what is not finite counts as 0."""
    weights = components.log_weights.double().exp()
    means = components.means.double()
    mean = (weights * means).sum(1)
    variance = (weights * (components.scales.double() ** 2 + (means - mean[:, None]) ** 2)).sum(1)
    mean, sd = (value.nan_to_num(0.0, 0.0, 0.0) for value in (mean, variance.sqrt()))
    ends = [
        components.label_mean + components.label_sd * (mean + sd * torch.special.ndtri(mean.new_tensor(level)))
        for level in levels
    ]
    answer = components.label_mean + components.label_sd * mean
    if not ends:
        return Predictive(answer)
    return Predictive(answer, torch.minimum(answer, ends[0]), torch.maximum(answer, ends[1]))
