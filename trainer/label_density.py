"""The density of the stream's labels: a decayed histogram, and the grid that it is read on.

The stream's own label prior p(y) is needed twice: by Bayes' rule, when a head that was trained as if every label were
equally likely is asked for the stream's prior (see trainer.predictive), and by the weights of a weighted likelihood.

The label axis is u = asinh((y - centre) / unit), with unit = 0.3 standard deviations: linear near the bulk, logarithmic
in both tails, so that a label a million standard deviations away costs a few cells and not the resolution of the rest.
"""

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

CELLS = 2048
"""Cells that labels are counted in: some thirty a bandwidth, so that moving counts to another axis blurs nothing."""
GRID_CELLS = 256
"""Cells of the grid that is handed out; answering a request costs time in proportion."""
WINDOW_LABELS = 65536.0
"""Labels seen this long ago count 1/e."""

_UNIT_PER_SD = 0.3
_BANDWIDTH = 0.12  # of the smoothing, in u
_FLOOR_LABELS = 1e-3  # spread evenly over the range, so that no label between the extremes is impossible
_ENOUGH_LABELS = 40.0  # labels within one bandwidth from which on a region is trusted fully
_LEAST_MASK = 1e-4
_KNOWN_LABELS = 10.0  # labels within one bandwidth from which on a region gets the finest cells
_FINER_WHERE_KNOWN = 3.0  # a region that labels fall in gets cells this much finer than an empty one gets, plus one
_RANGE_PADDING = 3e-3  # in u, beyond the extreme labels, so that all-equal labels still span a range
_GROWTH_MARGIN = 0.5  # in u, beyond the extreme labels: how far the range can grow before counts have to move
_FORGOTTEN_LABELS = 1e-3  # a cell at an end that holds less is no longer part of the range
_NEGLIGIBLE_LABELS = 1e-9  # set to zero before they become denormal numbers, which are slow
_SETTLING_LABELS = 4096  # until then the axis is compared with the labels at every batch, afterwards
_REVIEWS_PER_WINDOW = 4  # as often as this
_CENTRE_TOLERANCE_SD = 0.25
_SD_TOLERANCE = 1.25
_RECENT_LABELS = 256  # kept as they are: they tell labels that tie from labels that the cells are too wide for
_WINSOR_SPREADS = 20.0
_WEIGHT_POWER = -0.25
_WEIGHT_CAP = 20.0


@dataclass(frozen=True)
class LabelGrid:
    """The label density on G cells, in raw label units; G = 0 when no label was seen yet.

    Attributes:
        edges: (G + 1,) float64, increasing; the first and the last enclose every label of the window. (0,) if G = 0.
        log_density: (G,) float32, log p(y), with y in raw label units; integrates to 1 over the cells.
        log_mask: (G,) float32, log m(y) with m = min(1, labels within one bandwidth / 40): how far to trust a region.
        log_weights: (G,) float32, log w(y) with w = min(20, c p(y)^-1/4), c such that w has mean 1 under p.
    """

    edges: Tensor
    log_density: Tensor
    log_mask: Tensor
    log_weights: Tensor

    @classmethod
    def empty(cls) -> Self:
        """Return the grid of a stream that has not had a label yet."""
        none = torch.empty(0)
        return cls(none.double(), none, none, none)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """Rebuild a grid from what `to_tensors` returned.

        Raises:
            KeyError: a tensor is missing.
        """
        return cls(**{field.name: tensors[field.name] for field in fields(cls)})

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the grid as named tensors, for a safetensors file."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device | str) -> Self:
        """Return the grid on another device, which is not waited for."""
        aside = torch.device(device).type != "cpu"
        moved = {name: tensor.to(device, non_blocking=aside) for name, tensor in self.to_tensors().items()}
        return type(self)(**moved)

    def __len__(self) -> int:
        return len(self.log_density)

    @cached_property
    def widths(self) -> Tensor:
        """(G,) float64, raw label units."""
        return self.edges.diff()

    @cached_property
    def centres(self) -> Tensor:
        """(G,) float64, raw label units: halfway between the edges, the mean of a label that is uniform in its cell."""
        return (self.edges[1:] + self.edges[:-1]) / 2

    def cell_of(self, labels: Tensor) -> Tensor:
        """Return the cell that each label falls in, the nearest one for labels beyond the range.

        Args:
            labels: any shape, raw label units. The grid must not be empty.

        Returns:
            int64, the shape of `labels`.
        """
        return torch.bucketize(labels.to(self.edges).contiguous(), self.edges[1:-1], right=True)

    def log_weight(self, labels: Tensor) -> Tensor:
        """Return log w(y), the log of the weight of a row in a weighted likelihood; 0 on an empty grid.

        Constant within a cell, so that dividing the trained density by w on the same cells undoes it exactly.

        Args:
            labels: any shape, raw label units.

        Returns:
            float32, the shape of `labels`; at most log 20.
        """
        if not len(self):
            return torch.zeros_like(labels, dtype=self.log_weights.dtype)
        return self.log_weights[self.cell_of(labels)]


class LabelDensity(nn.Module):
    """A histogram of the labels in which old labels fade, on an axis that follows their centre, spread and range.

    All state is in buffers of fixed shape, and what is done depends on nothing but the labels observed, so that a
    restored density goes on exactly as the one that was saved. Deciding whether the axis still fits needs values on the
    host: keep it on the CPU, where labels arrive.

    Attributes:
        window_labels: labels seen this long ago count 1/e. May be changed at any time, to forget faster.
    """

    counts: Tensor
    axis: Tensor
    extremes: Tensor
    recent: Tensor
    seen: Tensor

    def __init__(self, window_labels: float = WINDOW_LABELS, cells: int = CELLS) -> None:
        super().__init__()
        self.window_labels = window_labels
        self.register_buffer("counts", torch.zeros(cells, dtype=torch.float64))  # (N,) decayed labels in each cell
        self.register_buffer("axis", torch.zeros(4, dtype=torch.float64))  # centre, unit, first edge in u, cell in u
        self.register_buffer("extremes", torch.zeros(2, dtype=torch.float64))  # least and greatest label
        self.register_buffer("recent", torch.zeros(_RECENT_LABELS, dtype=torch.float64))  # the last labels, newest last
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # labels ever observed

    @torch.no_grad()
    def observe(self, labels: Tensor) -> None:
        """Count a batch of labels; all that was counted before fades by exp(-B / window_labels).

        Args:
            labels: (B,) raw label units, all finite (the caller's duty), magnitudes below 1e150.
        """
        if not labels.numel():
            return
        values = labels.detach().to(self.counts)
        seen = int(self.seen)
        self.recent.copy_(torch.cat([self.recent, values[-_RECENT_LABELS:]])[-_RECENT_LABELS:])
        interval = self.window_labels / _REVIEWS_PER_WINDOW
        due = seen < _SETTLING_LABELS or seen // interval != (seen + len(values)) // interval
        self.seen.add_(len(values))
        if self._widen_extremes(values, first=not seen) or due:
            self._review_axis(values)
        centre, unit, first, step = self.axis.tolist()
        cells = (values - centre).div_(unit).asinh_().sub_(first).div_(step).long().clamp_(0, len(self.counts) - 1)
        self.counts.mul_(math.exp(-len(values) / self.window_labels)).index_add_(0, cells, torch.ones_like(values))

    def smoothing(self) -> tuple[float, float, float]:
        """Return c, u and h: `grid` smooths a label y by a kernel of standard deviation h (u^2 + (y - c)^2)^(1/2)."""
        centre, unit, *_ = self.axis.tolist()
        return centre, unit, _BANDWIDTH

    @torch.no_grad()
    def grid(self) -> LabelGrid:
        """Return the smoothed density of the labels seen so far; changes no state.

        Costs about a millisecond: ask once every few batches.
        """
        if not int(self.seen):
            return LabelGrid.empty()
        centre, unit, _, step = self.axis.tolist()
        start, end = (_asinh(extreme, centre, unit) for extreme in self.extremes.tolist())
        start, end = start - _RANGE_PADDING, end + _RANGE_PADDING
        radius = math.ceil(4 * _BANDWIDTH / step)
        edges = self._edges_in_u(beyond=radius)
        middles = (edges[1:] + edges[:-1]) / 2
        smooth = _smooth(self.counts, _BANDWIDTH / step, radius)
        # At an end of the range half of the kernel lies inside. Less than half: the range is narrow, and labels few.
        inside = torch.special.ndtr((end - middles) / _BANDWIDTH) - torch.special.ndtr((start - middles) / _BANDWIDTH)
        near = smooth / inside.clamp_min(0.5) * (_BANDWIDTH * math.sqrt(2 * math.pi) / step)
        mask = (near / _ENOUGH_LABELS).clamp(_LEAST_MASK, 1.0)
        # Edges at equal steps of how much is known.
        fineness = _cumulative(1.0 + _FINER_WHERE_KNOWN * (near / _KNOWN_LABELS).clamp_max(1.0))
        spent = _interpolate(edges.new_tensor([start, end]), edges, fineness)
        shares = torch.linspace(0, 1, GRID_CELLS + 1, dtype=torch.float64, device=edges.device)
        positions = _interpolate(torch.lerp(spent[0], spent[1], shares), fineness, edges)
        # What the kernel carries beyond the range is reflected at its ends, so that a tie there keeps its mass.
        places = torch.stack([positions, 2 * start - positions, 2 * end - positions])
        direct, left, right = _interpolate(places, edges, _cumulative(smooth))
        mass = (direct - left - right + _FLOOR_LABELS * (positions - start) / (end - start)).diff()
        mass = mass / mass.sum()
        label_edges = centre + unit * torch.sinh(positions)
        log_density = torch.log(mass / label_edges.diff())
        log_mask = torch.log(_interpolate((positions[1:] + positions[:-1]) / 2, middles, mask))
        return LabelGrid(label_edges, log_density.float(), log_mask.float(), _log_weights(mass, log_density).float())

    def _edges_in_u(self, beyond: int = 0) -> Tensor:
        """Return the (N + 1,) edges of the counting cells, and of so many cells beyond either end."""
        cells = torch.arange(-beyond, len(self.counts) + beyond + 1, dtype=torch.float64, device=self.counts.device)
        return self.axis[2] + self.axis[3] * cells

    def _widen_extremes(self, values: Tensor, first: bool) -> bool:
        """Let `extremes` enclose the values; say whether they now reach beyond the counting cells."""
        lowest, highest = (float(extreme) for extreme in torch.aminmax(values))
        least, greatest = (math.inf, -math.inf) if first else self.extremes.tolist()
        if least <= lowest and highest <= greatest:
            return False
        lowest, highest = min(lowest, least), max(highest, greatest)
        self.extremes.copy_(torch.tensor([lowest, highest], dtype=torch.float64))
        return not self._spans(lowest, highest)

    def _spans(self, lowest: float, highest: float) -> bool:
        """Say whether the counting cells reach from `lowest` to `highest`."""
        centre, unit, first, step = self.axis.tolist()
        last = first + step * len(self.counts)
        return bool(unit) and first <= _asinh(lowest, centre, unit) and _asinh(highest, centre, unit) <= last

    def _review_axis(self, fresh: Tensor) -> None:
        """Move the counts to another axis if centre, spread or range of the labels have left the present one.

        Args:
            fresh: (B,) float64 labels, already part of `extremes`, not yet counted.
        """
        centre, unit, _, step = self.axis.tolist()
        self.counts.masked_fill_(self.counts < _NEGLIGIBLE_LABELS, 0.0)
        label_edges = centre + unit * torch.sinh(self._edges_in_u())
        self._drop_forgotten_ends(label_edges, fresh)
        held = torch.nonzero(self.counts)[:, 0]
        values = torch.cat([(label_edges[held] + label_edges[held + 1]) / 2, fresh])
        weights = torch.cat([self.counts[held], torch.ones_like(fresh)])
        recent = self.recent[-int(self.seen) :]
        new_centre, sd = _centre_and_sd(values, weights, recent, resolution=2 * step * unit)
        new_unit = _UNIT_PER_SD * sd
        new_first, new_last = (_asinh(float(extreme), new_centre, new_unit) for extreme in self.extremes)
        new_first, new_last = new_first - _GROWTH_MARGIN, new_last + _GROWTH_MARGIN
        if (
            self._spans(*self.extremes.tolist())
            and abs(new_centre - centre) <= _CENTRE_TOLERANCE_SD * sd
            and 1 / _SD_TOLERANCE <= new_unit / unit <= _SD_TOLERANCE
            and step * len(self.counts) <= 1.5 * (new_last - new_first)
        ):
            return
        new_step = (new_last - new_first) / len(self.counts)
        self.axis.copy_(torch.tensor([new_centre, new_unit, new_first, new_step], dtype=torch.float64))
        if len(held):
            old_edges = torch.asinh((label_edges - new_centre) / new_unit)
            moved = _interpolate(self._edges_in_u(), old_edges, _cumulative(self.counts))
            moved[0], moved[-1] = 0.0, self.counts.sum()  # what lay beyond the new ends joins the last cell there
            self.counts.copy_(moved.diff())

    def _drop_forgotten_ends(self, label_edges: Tensor, fresh: Tensor) -> None:
        """Shrink `extremes` to the cells that still hold labels, and to the labels about to be counted."""
        kept = torch.nonzero(self.counts > _FORGOTTEN_LABELS)[:, 0]
        if len(kept):
            self.extremes[0] = torch.maximum(self.extremes[0], torch.minimum(label_edges[kept[0]], fresh.min()))
            self.extremes[1] = torch.minimum(self.extremes[1], torch.maximum(label_edges[kept[-1] + 1], fresh.max()))


def _asinh(label: float, centre: float, unit: float) -> float:
    return math.asinh((label - centre) / unit)


def _cumulative(parts: Tensor) -> Tensor:
    """Return the (N + 1,) running sums of N parts, from 0."""
    return torch.cat([parts.new_zeros(1), parts.cumsum(0)])


def _interpolate(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Interpolate linearly between the points (x, y), x increasing; constant beyond them."""
    right = torch.searchsorted(x, at).clamp_(1, len(x) - 1)
    left = right - 1
    part = ((at - x[left]) / (x[right] - x[left])).clamp_(0.0, 1.0)
    return torch.lerp(y[left], y[right], part)


def _smooth(counts: Tensor, bandwidth: float, radius: int) -> Tensor:
    """Convolve with a Gaussian of this standard deviation, in cells, that is cut at `radius` cells and sums to 1.

    Returns:
        (N + 2 radius,): what the kernel carries beyond the ends is kept.
    """
    offsets = torch.arange(-radius, radius + 1, dtype=counts.dtype, device=counts.device)
    kernel = torch.exp(-0.5 * (offsets / bandwidth) ** 2)
    return torch.from_numpy(np.convolve(counts.numpy(), (kernel / kernel.sum()).numpy()))


def _log_weights(mass: Tensor, log_density: Tensor) -> Tensor:
    """Return log min(20, c p^-1/4), with c such that the mean under p is 1, for cells of this mass and density."""
    rarity = torch.exp(_WEIGHT_POWER * (log_density - log_density.max()))
    capped = torch.zeros_like(mass, dtype=torch.bool)
    while True:  # every round caps more cells, and few are ever needed; the capped ones hold less than 1/20 of the mass
        scale = (1 - _WEIGHT_CAP * mass[capped].sum()) / (mass * rarity)[~capped].sum()
        beyond = scale * rarity > _WEIGHT_CAP
        if torch.equal(beyond, capped):
            return torch.log(scale * rarity).clamp_max(math.log(_WEIGHT_CAP))
        capped = beyond


def _centre_and_sd(values: Tensor, weights: Tensor, recent: Tensor, resolution: float) -> tuple[float, float]:
    """Return the median, and a standard deviation that far outliers cannot inflate.

    The standard deviation is that of the labels limited to 20 times the spread of their middle around the median; the
    middle is the narrowest of three quantile ranges that is not a tie. Where all of it lies in one or two cells, the
    most recent labels say whether it is a tie, and if it is not, they are what is measured.

    Args:
        values: (N,) float64 labels, or centres of cells.
        weights: (N,) how many labels each stands for.
        recent: (M,) float64, the most recent labels.
        resolution: differences between values up to this may come from labels being counted in cells.
    """
    counted = _Sample(values, weights)
    exact = _Sample(recent, torch.ones_like(recent))
    # Less is the rounding of the labels, or would be lost when it is squared.
    rounding = max(1e-12 * abs(counted.quantile(0.5)), 1e-100)
    # The distance between the quantiles p and 1 - p of a normal variable, in standard deviations.
    for level, normal in ((0.25, 1.349), (0.05, 3.290), (0.01, 4.653)):
        for sample, least in ((counted, max(resolution, rounding)), (exact, rounding)):
            spread = (sample.quantile(1 - level) - sample.quantile(level)) / normal
            if spread > least:
                return sample.quantile(0.5), max(sample.sd(_WINSOR_SPREADS * spread), rounding)
    centre, sd = counted.quantile(0.5), counted.sd(math.inf)
    # All equal: any unit will do until a second value comes.
    return centre, sd if sd > max(resolution, rounding) else 1e-3 * max(abs(centre), 1.0)


class _Sample:
    """Weighted values, sorted."""

    def __init__(self, values: Tensor, weights: Tensor) -> None:
        self.values, order = values.sort()
        self.weights = weights[order]
        self.cumulative = self.weights.cumsum(0)

    def quantile(self, level: float) -> float:
        """Return the least value that at least this share of the weight does not exceed."""
        at = torch.searchsorted(self.cumulative, level * self.cumulative[-1])
        return float(self.values[at.clamp_max(len(self.values) - 1)])

    def sd(self, limit: float) -> float:
        """Return the standard deviation of the values limited to this distance from their median."""
        centre = self.quantile(0.5)
        values = self.values.clamp(centre - limit, centre + limit)
        mean = (self.weights @ values) / self.cumulative[-1]
        return float(((self.weights @ (values - mean) ** 2) / self.cumulative[-1]).sqrt())
