"""The softmax over candidate labels, tile by tile: any number of label dimensions, any device, no host sync."""

import torch
from torch import Tensor

# Elements of one tile (rows x candidates). On a CPU the few buffers of a tile then stay in the second-level cache; a
# CUDA device needs large tiles to fill it, and at this size holds 64 MiB a buffer.
CPU_TILE_ELEMENTS = 1 << 15
DEVICE_TILE_ELEMENTS = 1 << 24

# e^-60 is below the rounding of any sum here, even times 2^32 candidates, and is never subnormal, which would slow a
# CPU severalfold.
LOWEST_EXPONENT = -60.0


def nearest_label(pred: Tensor, labels: Tensor) -> Tensor:
    """Find the label nearest to each prediction.

    Args:
        pred: (B,) predictions.
        labels: (M,) labels in ascending order.

    Returns:
        (B,) int64 indices into `labels`.
    """
    above = torch.searchsorted(labels, pred).clamp(max=len(labels) - 1)
    below = (above - 1).clamp(min=0)
    return torch.where((pred - labels[below]).abs() <= (labels[above] - pred).abs(), below, above)


def softmax_moments_1d(
    pred: Tensor, reference: Tensor, labels: Tensor, log_weights: Tensor | None, variance: Tensor, peak_is_zero: bool
) -> Tensor:
    """One tile of `dense_moments` for one-dimensional labels.

    Args:
        pred: (R,) predictions.
        reference: (R,) the label nearest to each, among those not masked out.
        labels: (M,) candidates.
        log_weights: (M,) or None for all 0.
        variance: 0-dim, sigma squared.
        peak_is_zero: Whether the largest exponent of every row is known to be 0.

    Returns:
        (3, R): log of the weighted sum, mean of t, mean of q.
    """
    shift = labels - reference[:, None]
    # Not (y + r - 2p): that rounds at the size of the labels' offset, this at the size of the distance.
    excess = (shift + 2 * (reference - pred)[:, None]).mul_(shift)
    exponent = excess * (-0.5 / variance)
    if log_weights is not None:
        exponent += log_weights
    peak: Tensor | float = 0.0
    if not peak_is_zero:
        peak = exponent.amax(1)
        exponent -= peak[:, None]
    weight = exponent.clamp_(min=LOWEST_EXPONENT).exp_()
    total = weight.sum(1)
    mean_shift = shift.mul_(weight).sum(1) / total
    mean_excess = excess.mul_(weight).sum(1) / total
    return torch.stack([total.log() + peak, mean_shift, mean_excess])


def softmax_moments_nd(
    pred: Tensor, reference: Tensor, labels: Tensor, log_weights: Tensor | None, variance: Tensor
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


def nearest_label_nd(pred: Tensor, labels: Tensor, log_weights: Tensor | None) -> Tensor:
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


def dense_moments(
    pred: Tensor, labels: Tensor, log_weights: Tensor | None, variance: Tensor, peak_is_zero: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax moments of the candidates around each prediction, in O(B + M) memory and O(B M) time.

    With r the candidate nearest to p, t_j = y_j - r and q_j = |p - y_j|^2 - |p - r|^2 = t_j . (t_j + 2 (r - p)), the
    softmax has the weights w_j exp(-q_j / 2 sigma^2): no exponent is above the largest log weight and nothing cancels,
    however far the prediction lies from the labels.

    Args:
        pred: (B,) or (B, D) predictions, finite.
        labels: (M,) or (M, D) candidates, finite.
        log_weights: (M,) log weights, -inf = masked out; None = all 0. A masked label must repeat one that is not.
        variance: 0-dim, sigma squared, in squared label units.
        peak_is_zero: One-dimensional labels: every log weight is 0 or -inf, so the largest exponent is 0.

    Returns:
        The reference r (B,) or (B, D), log of the weighted sum (B,), mean of t (B,) or (B, D), mean of q (B,).
    """
    elements = CPU_TILE_ELEMENTS if pred.device.type == "cpu" else DEVICE_TILE_ELEMENTS
    rows = max(1, elements // len(labels))
    if pred.dim() == 1:
        ascending = labels.sort().values
        reference = ascending[nearest_label(pred, ascending)]
        tiles = [
            softmax_moments_1d(p, r, labels, log_weights, variance, peak_is_zero)
            for p, r in zip(torch.split(pred, rows), torch.split(reference, rows), strict=True)
        ]
        log_sum, mean_shift, mean_excess = torch.cat(tiles, 1)
        return reference, log_sum, mean_shift, mean_excess
    references, tiles = [], []
    for p in torch.split(pred, rows):
        r = labels[nearest_label_nd(p, labels, log_weights)]
        references.append(r)
        tiles.append(softmax_moments_nd(p, r, labels, log_weights, variance))
    moments = torch.cat(tiles, 1)
    return torch.cat(references), moments[0], moments[2:].T, moments[1]
