"""The softmax over candidate labels where the logits are the log densities of a mixture of Gaussians, tile by tile."""

import torch
from torch import Tensor

from trainer.losses.dense_softmax import LOG2_E, LOWEST_EXPONENT

CPU_TILE_ELEMENTS, DEVICE_TILE_ELEMENTS = 1 << 18, 1 << 25  # rows x candidates x components

# Terms below 2^-120 of a component's peak count as that: exp2 of less is subnormal, which slows a CPU severalfold.
LOWEST_POWER = -120.0
# Sums below this share of the highest peak may be made of such terms. The nearest label is then 8 scales away or more.
LOWEST_SUM = 2.0**-50


def mixture_moments(
    base: Tensor,
    means: Tensor,
    precision: Tensor,
    labels: Tensor,
    log_weights: Tensor | None,
    variances: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log of the candidates' sum, and its derivatives, in O(B K + M) memory.

    With e_ijk = w_j (s_ik^2 / v_ijk)^(1/2) exp(base_ik - d_ijk^2 / 2 v_ijk), d_ijk = y_j - m_ik and v_ijk = s_ik^2 +
    variance_j:

    Args:
        base: (B, K) log of the components' peaks.
        means: (B, K).
        precision: (B, K) 1 / s^2.
        labels: (M,) candidates.
        log_weights: (M,) log w, -inf = masked out; None for 0.
        variances: (M,) of the Gaussians that candidates stand for; None for 0.

    Returns:
        log sum_jk e_ijk (B,), and its derivatives (B, K) by log pi, m and log s: sums over j of e_ijk, e_ijk d_ijk / v
        and e_ijk (d_ijk^2 / v - 1) s^2 / v, over sum_jk e_ijk.
    """
    elements = CPU_TILE_ELEMENTS if labels.device.type == "cpu" else DEVICE_TILE_ELEMENTS
    rows = max(1, elements // (len(labels) * means.shape[1]))
    if means.shape[0] <= rows:
        return _tile(base, means, precision, labels, log_weights, variances)
    tiles = [
        _tile(b, m, p, labels, log_weights, variances)
        for b, m, p in zip(*(torch.split(x, rows) for x in (base, means, precision)), strict=True)
    ]
    log_sum, zeroth, first, second = (torch.cat(part) for part in zip(*tiles, strict=True))
    return log_sum, zeroth, first, second


def _tile(
    base: Tensor,
    means: Tensor,
    precision: Tensor,
    labels: Tensor,
    log_weights: Tensor | None,
    variances: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One tile of `mixture_moments`."""
    peak = base.amax(1, keepdim=True)
    if log_weights is None and variances is None and labels.device.type == "cpu":
        answer = _unweighted_tile(base - peak, means, precision, labels)
        if answer is not None:
            return answer[0].add_(peak[:, 0]), *answer[1:]
    distance = labels - means[:, :, None]  # (R, K, M)
    square = distance * distance
    part = base[:, :, None] if log_weights is None else base[:, :, None] + log_weights
    inverse, share = precision[:, :, None], None
    if variances is not None:
        share = 1 / (1 + variances * inverse)  # s^2 / v
        inverse, part = inverse * share, part + 0.5 * share.log()
    weight = torch.addcmul(part, square, inverse, value=-0.5)
    peak = weight.amax((1, 2), keepdim=True)
    weight.sub_(peak).clamp_(min=LOWEST_EXPONENT).exp_()
    zeroth = weight.sum(2)
    total = zeroth.sum(1, keepdim=True)
    pull = square.mul_(inverse).sub_(1)
    pull = pull if share is None else pull.mul_(share)
    first, second = (x.mul_(weight).sum(2).div_(total) for x in (distance.mul_(inverse), pull))
    return total[:, 0].log() + peak[:, 0, 0], zeroth / total, first, second


def _unweighted_tile(
    base: Tensor, means: Tensor, precision: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """A tile on a CPU that takes each component relative to its own peak, and so never looks for a largest exponent.

    `base` is 0 for a row's highest component. None where the nearest label is so many scales away that the terms are
    lost; only a CPU may look at the numbers.
    """
    distance = labels - means[:, :, None]  # (R, K, M)
    scale = precision * (-0.5 * LOG2_E)
    # Everything in place: two buffers stay in the cache where three do not.
    weight = (distance * distance).mul_(scale[:, :, None]).clamp_(min=LOWEST_POWER).exp2_()
    height = base.exp_()
    zeroth = weight.sum(2).mul_(height)
    total = zeroth.sum(1, keepdim=True)
    if not float(total.amin()) > LOWEST_SUM:
        return None
    height.div_(total)
    first = weight.mul_(distance).sum(2).mul_(height)
    second = weight.mul_(distance).sum(2).mul_(height)
    zeroth = zeroth.div_(total)
    return total[:, 0].log(), zeroth, first.mul_(precision), second.mul_(precision).sub_(zeroth)
