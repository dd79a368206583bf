"""The softmax over candidate labels, tile by tile: any number of label dimensions, any device, no host sync."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.losses import kernel

# Elements of one tile (rows x candidates). On a CPU a training step's rows are then one tile, whose few buffers stay in
# the cache; a CUDA device needs large tiles to fill it, and at this size holds 64 MiB a buffer.
CPU_TILE_ELEMENTS = 1 << 16
DEVICE_TILE_ELEMENTS = 1 << 24

# e^-60 is below the rounding of any sum here, even times 2^32 candidates, and is never subnormal, which would slow a
# CPU severalfold.
LOWEST_EXPONENT = -60.0

# On a CPU exp2 takes half the time of exp.
LOG2_E = 1 / math.log(2)


def nearest_label(pred: Tensor, labels: Tensor) -> Tensor:
    """Find the label nearest to each prediction.

    Args:
        pred: (B,) predictions.
        labels: (M,) labels in ascending order.

    Returns:
        (B,) int64 indices into `labels`.
    """
    # The label whose stretch, from midpoint to midpoint, the prediction lies in. Distances would not do: in float32 two
    # of 30 sd round to the same even where an exponent of hundreds lies between them.
    labels = wide(labels)
    return torch.searchsorted(labels[1:] + labels[:-1], 2 * wide(pred))


def wide(values: Tensor) -> Tensor:
    """The values in float64; Apple's devices alone have none and keep what they are."""
    return values if values.device.type == "mps" else values.double()


class SoftmaxMoments(NamedTuple):
    """What the losses need of a softmax over candidate labels y_j, for each prediction p.

    Attributes:
        reference: (B,) or (B, D) the label r nearest to p.
        mirror: (B,) or (B, D) r - 2p, rounded to the predictions' precision.
        mirror_rest: The same shape, what that rounding left out.
        log_sum: (B,) log of the weighted sum of exp(-q_j / 2 sigma^2).
        mean_shift: (B,) or (B, D) mean of t_j = y_j - r under the softmax.
        mean_excess: (B,) mean of q_j = |p - y_j|^2 - |p - r|^2 under it, or None if not asked for.
    """

    reference: Tensor
    mirror: Tensor
    mirror_rest: Tensor | float
    log_sum: Tensor
    mean_shift: Tensor
    mean_excess: Tensor | None


def _tile_1d(
    reference: Tensor,
    mirror: Tensor,
    mirror_rest: Tensor,
    labels: Tensor,
    log_weights: Tensor | None,
    variance: Tensor | float,
    peak_is_zero: bool,
    with_excess: bool,
) -> tuple[Tensor, ...]:
    """Log sum, mean of t and, if asked for, mean of q, (R,) each, of a tile of rows with one-dimensional labels."""
    shift = labels - reference[:, None]
    # q = (y - r) (y + r - 2p). Where the second factor cancels, its first sum is exact (Sterbenz), so both factors,
    # and with them the exponent, have the relative error of a rounding, even for labels that p is midway between.
    excess = (labels + mirror[:, None]).add_(mirror_rest[:, None]).mul_(shift)
    scale = -0.5 * LOG2_E / variance
    weight = excess * scale if with_excess else excess.mul_(scale)
    if log_weights is not None:
        weight += log_weights * LOG2_E
    peak: Tensor | None = None
    if not peak_is_zero:
        peak = weight.amax(1)
        weight -= peak[:, None]
    weight = weight.clamp_(min=LOWEST_EXPONENT * LOG2_E).exp2_()
    # On a CPU sums in float64 take six times as long, on a CUDA device no longer.
    dtype = torch.float64 if labels.device.type not in ("cpu", "mps") else None
    total = weight.sum(1, dtype=dtype)
    moments = [
        value.mul_(weight).sum(1, dtype=dtype).div_(total) for value in ((shift, excess) if with_excess else (shift,))
    ]
    return total.log_() if peak is None else total.log_().add_(peak, alpha=1 / LOG2_E), *moments


def _moments_1d(
    pred: Tensor,
    labels: Tensor,
    log_weights: Tensor | None,
    variance: Tensor | float,
    peak_is_zero: bool,
    with_excess: bool,
) -> SoftmaxMoments:
    """`dense_moments` for labels of one dimension."""
    ascending, p = wide(labels.sort().values), wide(pred)
    nearest = ascending.index_select(0, nearest_label(p, ascending))
    exact = torch.sub(nearest, p, alpha=2)
    mirror = exact.to(pred.dtype)
    columns = nearest.to(pred.dtype), mirror, (exact - mirror).to(pred.dtype)
    rows = tile_rows(labels)
    if peak_is_zero and log_weights is None and kernel.takes(*columns, labels):
        parts = kernel.shifted_rows(*columns, labels, -0.5 * LOG2_E / float(variance))
    elif len(pred) <= rows:
        parts = _tile_1d(*columns, labels, log_weights, variance, peak_is_zero, with_excess)
    else:
        tiles = [
            _tile_1d(r, m, rest, labels, log_weights, variance, peak_is_zero, with_excess)
            for r, m, rest in zip(*(torch.split(column, rows) for column in columns), strict=True)
        ]
        parts = tuple(torch.cat(part) for part in zip(*tiles, strict=True))
    return SoftmaxMoments(*columns, parts[0], parts[1], parts[2] if with_excess else None)


def _tile_nd(
    pred: Tensor, reference: Tensor, labels: Tensor, log_weights: Tensor | None, variance: Tensor | float
) -> Tensor:
    """One tile of `dense_moments` for labels of D dimensions.

    Args:
        pred: (R, D) predictions.
        reference: (R, D) the label nearest to each.
        labels: (M, D) candidates.
        log_weights: (M,) or None for all 0.
        variance: 0-dim, sigma squared.

    Returns:
        (2 + D, R): log of the weighted sum, mean of q, and the D means of t.
    """
    dims = pred.shape[1]
    gap = 2 * (reference - pred)
    # A loop over the few dimensions keeps every buffer a matrix (R, M); a (R, M, D) tensor would be D times as large.
    shifts = [labels[:, d] - reference[:, d, None] for d in range(dims)]
    excess = torch.zeros_like(shifts[0])
    for d, shift in enumerate(shifts):
        excess.addcmul_(shift + gap[:, d, None], shift)
    exponent = excess * (-0.5 / variance)
    if log_weights is not None:
        exponent = exponent + log_weights
    peak = exponent.amax(1)
    weight = (exponent - peak[:, None]).clamp_(min=LOWEST_EXPONENT).exp_()
    total = weight.sum(1)
    means = [moment.mul_(weight).sum(1) / total for moment in (excess, *shifts)]
    return torch.stack([total.log() + peak, *means])


def _nearest_label_nd(pred: Tensor, labels: Tensor, log_weights: Tensor | None) -> Tensor:
    """Find the label nearest to each prediction among those not masked out, in D dimensions.

    Args:
        pred: (R, D) predictions.
        labels: (M, D) labels.
        log_weights: (M,), -inf where masked out; or None.

    Returns:
        (R,) int64 indices into `labels`.
    """
    distance = torch.zeros((len(pred), len(labels)), dtype=pred.dtype, device=pred.device)
    for d in range(pred.shape[1]):
        gap = labels[:, d] - pred[:, d, None]
        distance.addcmul_(gap, gap)
    if log_weights is not None:
        distance.masked_fill_(log_weights == -torch.inf, torch.inf)
    return distance.argmin(1)


def _moments_nd(pred: Tensor, labels: Tensor, log_weights: Tensor | None, variance: Tensor | float) -> SoftmaxMoments:
    """`dense_moments` for labels of several dimensions."""
    references, tiles = [], []
    for p in torch.split(pred, tile_rows(labels)):
        r = labels[_nearest_label_nd(p, labels, log_weights)]
        references.append(r)
        tiles.append(_tile_nd(p, r, labels, log_weights, variance))
    reference, moments = torch.cat(references), torch.cat(tiles, 1)
    return SoftmaxMoments(reference, reference - 2 * pred, 0.0, moments[0], moments[2:].T, moments[1])


def tile_rows(labels: Tensor) -> int:
    """How many rows of a tile against labels (M,) or (M, D) fit the device's fast memory."""
    elements = CPU_TILE_ELEMENTS if labels.device.type == "cpu" else DEVICE_TILE_ELEMENTS
    return max(1, elements // len(labels))


def dense_moments(
    pred: Tensor,
    labels: Tensor,
    log_weights: Tensor | None,
    variance: Tensor | float,
    *,
    peak_is_zero: bool,
    with_excess: bool = True,
) -> SoftmaxMoments:
    """Softmax moments of the candidates around each prediction, in O(B + M) memory and O(B M) time.

    With r the candidate nearest to p, t_j = y_j - r and q_j = |p - y_j|^2 - |p - r|^2 = t_j . (t_j + 2 (r - p)), the
    softmax has the weights w_j exp(-q_j / 2 sigma^2): no exponent is above the largest log weight and nothing cancels,
    however far the prediction lies from the labels.

    Args:
        pred: (B,) or (B, D) predictions, finite. For D > 1 or weights other than 0 and 1 give float64: the exponent of
            the largest term may then be a large number, or a difference of such.
        labels: (M,) or (M, D) candidates, finite, of the same dtype.
        log_weights: (M,) log weights, -inf = masked out; None = all 0. A masked label must repeat one that is not.
        variance: 0-dim, sigma squared, in squared label units.
        peak_is_zero: One-dimensional labels: every log weight is 0 or -inf, so the largest exponent is 0.
        with_excess: Whether the mean of q is wanted.
    """
    if pred.dim() == 1:
        return _moments_1d(pred, labels, log_weights, variance, peak_is_zero, with_excess)
    return _moments_nd(pred, labels, log_weights, variance)
