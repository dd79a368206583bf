"""The softmax over sorted one-dimensional labels in near-linear time, on a CPU.

With Gaussian logits the sum over the candidates is a Gaussian kernel density at the prediction, so a fast Gauss
transform computes it (after Greengard and Strain, "The Fast Gauss Transform", SIAM J. Sci. Stat. Comput. 12, 1991, with
Chebyshev in place of Hermite series): the labels of a cell two sigmas wide become the Chebyshev moments of the cell,
the moments of the nine cells around a prediction become one polynomial on its own cell, and the prediction evaluates
that. O(B + M), and no exponential at all: the table that carries the moments over is the same for every sigma.

That is exact to the rounding of float64 beside the mass of the cells around, so it answers where the density at the
prediction is not far below it. The others, mostly outliers with few candidates in reach, are summed pair by pair,
relative to the nearest label; where too many are in reach, those of cells that are narrow beside the exponential's
decay are first replaced by the cell's Chebyshev nodes with signed weights.
"""

import bisect
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.losses.dense_softmax import nearest_label

DEGREE = 20  # Chebyshev terms a cell: at two sigmas a cell the first one left out is 1e-15 of the kernel
CELL_SIGMAS = 2.0
CELLS_ASIDE = 4  # cells looked at on each side: what lies farther is at least 8 sigma away, 1e-14 of the kernel
TOLERANCE = 1e-8  # relative error of the sum from which a row is summed pair by pair
ROUNDING = 1e-14  # the transform's error relative to the mass of the cells looked at
NEAR_SIGMAS = 4.0  # rows whose nearest label is farther are below TOLERANCE too often to try
PAIRS_A_CELL = 150.0  # pairs that cost as much as the transfer to one more cell
PAIRS_A_ROW = 200  # pairs that cost as much as a row does over cells' nodes
MOST_LEVELS = 9  # cells are by then 4^-9 of sigma: what still holds many labels a cell is summed as it is
CHUNK_PAIRS, CHUNK_ROWS = 1 << 15, 1 << 12  # what stays in a second-level cache
LOG_WEIGHT_RANGE = 200.0  # of linear weights that can be multiplied by the kernel without leaving float64


@dataclass(frozen=True)
class _Density:
    """Ascending labels (M,), from 0, with linear weights (M,), float64, and the width of the kernel around each."""

    labels: Tensor
    weights: Tensor
    sigma: float


def near_linear_moments(
    pred: Tensor, labels: Tensor, log_weights: Tensor | None, sigma: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax moments of the candidates around each prediction, as `dense_moments` gives them, in float64.

    Args:
        pred: (B,) predictions, finite.
        labels: (M,) candidates, finite.
        log_weights: (M,) finite log weights that differ by no more than `LOG_WEIGHT_RANGE`; None = all 0.
        sigma: The noise's standard deviation, in label units, above 0.

    Returns:
        The reference r (B,), log of the weighted sum (B,), mean of t (B,), mean of q (B,).
    """
    labels, order = labels.sort()
    origin = labels[0].double()
    pred, labels = pred.double() - origin, labels.double() - origin
    # Ties become one label of their weight: labels in whole minutes then cost what there are minutes.
    labels, place, ties = torch.unique_consecutive(labels, return_inverse=True, return_counts=True)
    top, weights = 0.0, ties.double()
    if log_weights is not None:
        top = float(log_weights.max())
        weights = torch.bincount(place, (log_weights.double() - top).exp_()[order])
    density = _Density(labels, weights, sigma)

    nearest = nearest_label(pred, labels)
    reference = labels[nearest]
    gap = reference - pred
    moments = pred.new_empty(3, len(pred))
    rest = _by_cells(pred, gap, density, moments)
    if len(rest):
        moments[:, rest] = _pair_by_pair(pred[rest], gap[rest], weights[nearest[rest]], density)
    return reference + origin, moments[0] + top, moments[1], moments[2]


def _by_cells(pred: Tensor, gap: Tensor, density: _Density, moments: Tensor) -> Tensor:
    """Fast Gauss transform into `moments` (3, B); returns the indices of the rows it could not answer."""
    sigma = density.sigma
    near = gap.abs() <= NEAR_SIGMAS * sigma
    rows = near.nonzero()[:, 0]
    everything = torch.arange(len(pred))
    if not len(rows):
        return everything
    pred, gap = pred[rows], gap[rows]
    label_place, pred_place = density.labels / (CELL_SIGMAS * sigma), pred / (CELL_SIGMAS * sigma)
    label_cell, pred_cell = label_place.floor(), pred_place.floor()
    cells, cell_of_label = torch.unique_consecutive(label_cell, return_inverse=True)
    targets, target_of_row = _numbered(pred_cell)
    # What the table costs for a cell buys some hundred pairs: with few candidates around, summing those is cheaper.
    pairs = len(rows) * (2.0 * CELLS_ASIDE + 1) * len(density.labels) / len(cells)
    if pairs < PAIRS_A_CELL * len(targets):
        return everything

    source = _chebyshev_moments(2 * (label_place - label_cell) - 1, density.weights, cell_of_label, len(cells))
    local = pred.new_zeros(len(targets), 3 * DEGREE)
    mass = pred.new_zeros(len(targets))
    for aside, table in enumerate(_transfer_tables(), start=-CELLS_ASIDE):
        at = torch.searchsorted(cells, targets + aside).clamp_(max=len(cells) - 1)
        around = source[at] * (cells[at] == targets + aside)[:, None]
        local.addmm_(around, table)
        mass += around[:, 0]

    local, offset = local.view(-1, 3, DEGREE), 2 * (pred_place - pred_cell) - 1
    sums = torch.cat(
        [
            (local[target_of_row[part]] * _chebyshev(offset[part])[:, None]).sum(2)
            for part in torch.arange(len(rows)).split(CHUNK_ROWS)  # type: ignore[no-untyped-call]
        ]
    )
    total, first, second = sums.unbind(1)
    sound = total * TOLERANCE >= ROUNDING * mass[target_of_row]
    answers = [
        total.log() + (gap / sigma).square() / 2,
        first / total * sigma - gap,
        second / total * sigma**2 - gap.square(),
    ]
    moments[:, rows] = torch.stack(answers)
    near[rows] = sound
    return (~near).nonzero()[:, 0]


def _numbered(cell: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct cells in ascending order, and each row's index among them."""
    lowest = cell.amin()
    span = int(cell.amax() - lowest) + 1
    if span > 8 * len(cell) + 1024:
        distinct, index = torch.unique(cell, return_inverse=True)
        return distinct, index
    # Counting into a table is an order of magnitude faster than sorting, as long as the table is not mostly air.
    slot = (cell - lowest).long()
    occupied = torch.bincount(slot, minlength=span) > 0
    return occupied.nonzero()[:, 0] + lowest, (occupied.cumsum(0) - 1)[slot]


def _chebyshev(x: Tensor) -> Tensor:
    """T_0 .. T_(DEGREE-1) at x (N,) in [-1, 1]: (N, DEGREE)."""
    values = x.new_empty(DEGREE, len(x))
    values[0], values[1] = 1.0, x
    twice = 2 * x
    for k in range(2, DEGREE):
        torch.mul(twice, values[k - 1], out=values[k])
        values[k] -= values[k - 2]
    return values.T


def _chebyshev_moments(x: Tensor, weights: Tensor, cell: Tensor, cells: int) -> Tensor:
    """Sum over each cell's labels of weight times T_k: (cells, DEGREE), from x (M,), weights (M,), cell (M,) int64."""
    return torch.stack([torch.bincount(cell, weights * t, cells) for t in _chebyshev(x).unbind(1)], 1)


@functools.cache
def _transfer_tables() -> Tensor:
    """What the moments of a cell add to the polynomials of the cell d below it, for d = -CELLS_ASIDE .. CELLS_ASIDE.

    (2 CELLS_ASIDE + 1, DEGREE, 3 DEGREE): row k, column (m, l) is the coefficient of T_k(u) T_l(x) in the Chebyshev
    series of z^m exp(-z^2 / 2), m = 0, 1, 2, where z = (label - prediction) / sigma = d CELL_SIGMAS + u - x.
    """
    nodes = 2 * DEGREE
    angle = (torch.arange(nodes, dtype=torch.float64) + 0.5) * (math.pi / nodes)
    transform = torch.cos(torch.arange(DEGREE, dtype=torch.float64)[:, None] * angle) * (2 / nodes)
    transform[0] /= 2
    x = angle.cos() * (CELL_SIGMAS / 2)
    tables = []
    for aside in range(-CELLS_ASIDE, CELLS_ASIDE + 1):
        z = aside * CELL_SIGMAS + x[:, None] - x
        kernel = torch.exp(-z * z / 2)
        tables.append(torch.cat([transform @ (z**m * kernel) @ transform.T for m in range(3)], 1))
    return torch.stack(tables)


def _pair_by_pair(pred: Tensor, gap: Tensor, nearest_weight: Tensor, density: _Density) -> Tensor:
    """Sum over the candidates in reach, relative to the nearest: (3, B) log sum, mean of t and of q."""
    labels, weights, sigma = density.labels, density.weights, density.sigma
    # Beyond the reach every term is below e^-18 of the nearest label's over their number.
    cut = 18 + math.log(len(labels)) + (weights.max() / nearest_weight).log()
    reach = (gap.square() + 2 * sigma**2 * cut).sqrt() * (1 + 1e-9)
    low = torch.searchsorted(labels, pred - reach)
    high = torch.searchsorted(labels, pred + reach, right=True)
    moments = pred.new_empty(3, len(pred))
    rows, level = torch.arange(len(pred)), 0
    while len(rows):
        # Either the pairs are few, or the cells have become so narrow that hardly one holds two labels.
        pairs = int((high[rows] - low[rows]).sum())
        if pairs <= 2 * len(labels) + PAIRS_A_ROW * len(rows) or level > MOST_LEVELS:
            moments[:, rows] = _windows(pred[rows], gap[rows], low[rows], high[rows], labels, weights, sigma)
            break
        # The farther the prediction, the steeper the exponential over the labels, the narrower the cells.
        near = gap[rows].abs() <= NEAR_SIGMAS * sigma * 4**level
        now, rows = rows[near], rows[~near]
        if len(now):
            used = slice(int(low[now].amin()), int(high[now].amax()))
            nodes, node_weights = _nodes(labels[used], weights[used], CELL_SIGMAS * sigma / 4**level)
            # A cell's nodes stand for its labels together only, so the cells at the ends of the reach are taken whole.
            first = torch.searchsorted(nodes, pred[now] - reach[now]) - DEGREE
            last = torch.searchsorted(nodes, pred[now] + reach[now], right=True) + DEGREE
            first, last = first.clamp_(min=0), last.clamp_(max=len(nodes))
            moments[:, now] = _windows(pred[now], gap[now], first, last, nodes, node_weights, sigma)
        level += 1
    return moments


def _nodes(labels: Tensor, weights: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """Fewer labels, with signed weights, that give the same sum of every polynomial of degree < DEGREE in each cell.

    Cells of no more than DEGREE labels keep them.
    """
    place = labels / width
    _, cell_of_label, count = torch.unique_consecutive(place.floor(), return_inverse=True, return_counts=True)
    full = count > DEGREE
    inside = full[cell_of_label]
    if not bool(inside.any()):
        return labels, weights
    cell = place[inside].floor()
    slot = (full.cumsum(0) - 1)[cell_of_label[inside]]
    moments = _chebyshev_moments(2 * (place[inside] - cell) - 1, weights[inside], slot, int(full.sum()))
    x = torch.cos((torch.arange(DEGREE, dtype=torch.float64) + 0.5) * (math.pi / DEGREE))
    basis = _chebyshev(x).T * (2 / DEGREE)
    basis[0] /= 2
    nodes = width * (torch.unique_consecutive(cell)[:, None] + (x + 1) / 2)
    merged, order = torch.cat([nodes.flatten(), labels[~inside]]).sort()
    return merged, torch.cat([(moments @ basis).flatten(), weights[~inside]])[order]


def _windows(
    pred: Tensor, gap: Tensor, low: Tensor, high: Tensor, labels: Tensor, weights: Tensor, sigma: float
) -> Tensor:
    """Sum row i over at least labels[low_i:high_i], rows with windows of like length together: (3, B)."""
    length, order = (high - low).sort()
    moments, start = pred.new_empty(3, len(pred)), 0
    lengths = length.tolist()
    while start < len(pred):
        # A window longer than a row needs adds labels beyond its reach, which does no harm.
        later, first = range(start + 1, len(pred)), start
        stop = start + 1 + bisect.bisect_right(later, CHUNK_PAIRS, key=lambda i: lengths[i] * (i + 1 - first))
        rows, size = order[start:stop], lengths[stop - 1]
        at = low[rows].clamp(max=len(labels) - size)
        shift = labels.unfold(0, size, 1)[at] - (pred + gap)[rows, None]
        excess = (shift + 2 * gap[rows, None]).mul_(shift)
        weight = (excess * (-0.5 / sigma**2)).clamp_(-600.0).exp_().mul_(weights.unfold(0, size, 1)[at])
        total = weight.sum(1)
        means = [value.mul_(weight).sum(1) / total for value in (shift, excess)]
        moments[:, rows] = torch.stack([total.log(), *means])
        start = stop
    return moments
