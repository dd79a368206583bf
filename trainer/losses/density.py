"""Balanced losses for a head that gives a density h(y|x): a mixture of K Gaussians around a shared location.

`density_bmc_loss` is Balanced MSE's batch-based Monte Carlo form (Ren et al., CVPR 2022, arXiv 2203.16427) with any
density in the place of its one Gaussian: the cross-entropy of log h(y_j | x_i) over candidate labels j. h then
estimates p(y|x) / p(y), as if every label were equally likely. `density_nll_loss` is the likelihood; h then estimates p(y|x) times
the row weights. Mixture density networks: Bishop, "Mixture Density Networks", Aston University NCRG/94/004, 1994.

The gradients need only responsibilities. With e_ijk = w_j pi_ik N(y_j; m_ik, s_ik^2), z = (y_j - m_ik) / s_ik and
E[x] = sum_j e_ijk x_j / sum_jk e_ijk, the derivatives of row i's cross-entropy are

    d / d log pi_k = E[1],    d / d m_k = E[z] / s_k,    d / d log s_k = E[z^2 - 1]

minus the same for the own label alone. They are computed with the loss, tile by tile: no (B, M, K) tensor outlives a
tile, and the backward holds three matrices (B, K).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.losses.candidates import candidate_labels, mask_candidates
from trainer.losses.dense_softmax import LOWEST_EXPONENT
from trainer.losses.rows import Reduction, finite_rows, reduce_rows

CPU_TILE_ELEMENTS, DEVICE_TILE_ELEMENTS = 1 << 18, 1 << 25  # rows x candidates x components
LOG_SQRT_2_PI = 0.5 * math.log(2 * math.pi)
LOCATION_WEIGHT = 2.0  # without the squared term a mixture explains the marginal before it learns the location


class Mixture(NamedTuple):
    """K Gaussians a row, in label standard deviations.

    Attributes:
        log_weights: (B, K) log pi, normalised over K.
        means: (B, K).
        log_scales: (B, K) log of the standard deviations.
        location: (B,) what the means are offsets from.
    """

    log_weights: Tensor
    means: Tensor
    log_scales: Tensor
    location: Tensor

    def spread(self) -> Tensor:
        """The mixture's own standard deviation (B,), without a gradient."""
        with torch.no_grad():
            weights = self.log_weights.exp()
            mean = (weights * self.means).sum(1, keepdim=True)
            variance = weights * (torch.exp(2 * self.log_scales) + (self.means - mean).square())
            return variance.sum(1).sqrt()


def mixture_log_density(mixture: Mixture, labels: Tensor) -> Tensor:
    """Log density log h(y_j | x_i) for labels (M,) shared by all rows: (B, M); differentiable by autograd, in O(B M K) memory."""
    z = (labels - mixture.means[:, :, None]) * torch.exp(-mixture.log_scales)[:, :, None]
    constant = mixture.log_weights - mixture.log_scales - LOG_SQRT_2_PI
    return torch.logsumexp(constant[:, :, None] - 0.5 * z.square(), 1)


def density_bmc_loss(
    mixture: Mixture,
    target: Tensor,
    *,
    memory: Tensor | None = None,
    memory_log_weights: Tensor | None = None,
    row_scale: Tensor | None = None,
    location_weight: float = LOCATION_WEIGHT,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy of the own label among the candidates, plus the squared error of the location.

    mean_i S_i (-log h(y_i|x_i) + logsumexp_j log h(y_j|x_i)) + location_weight (f_i - y_i)^2.

    With K = 1, one scale s for all rows, `row_scale` 2 s^2 and no location term it is `bmc_loss` with sigma = s.

    Args:
        mixture: The head's density for each row, in label standard deviations.
        target: (B,) labels, standardised. Each is a candidate exactly once.
        memory: (M,) further candidates, standardised, the rows' own not among them.
        memory_log_weights: (M,) log of each candidate's weight beside the batch's 0; -inf = masked out.
        row_scale: (B,) or 0-dim S, used without its gradient; None for the mixture's own standard deviation, without
            which rows would count by 1 / sigma^2.
        location_weight: Of the squared error of the location.
        reduction: `mean` over the finite rows, `sum`, or `none` for (B,).

    Returns:
        0-dim or (B,). Rows that are not finite have loss and gradients 0.

    Raises:
        ValueError: Shapes that do not belong together, or an unknown reduction.
    """
    target = _labels_like(mixture, target)
    labels, log_weights = candidate_labels(target, memory, memory_log_weights)
    labels, log_weights = mask_candidates(labels, log_weights)
    keep, mixture, target = _finite(mixture, target)
    normaliser: Tensor = _LogNormaliser.apply(*mixture[:3], labels, log_weights)  # type: ignore[no-untyped-call]
    surprise: Tensor = _NegativeLogDensity.apply(*mixture[:3], target)  # type: ignore[no-untyped-call]
    return _scaled(normaliser + surprise, mixture, target, keep, row_scale, location_weight, reduction)


def density_nll_loss(
    mixture: Mixture,
    target: Tensor,
    *,
    weights: Tensor | None = None,
    row_scale: Tensor | None = None,
    location_weight: float = LOCATION_WEIGHT,
    reduction: Reduction = "mean",
) -> Tensor:
    """Weighted likelihood, plus the squared error of the location.

    mean_i w_i S_i (-log h(y_i|x_i)) + location_weight (f_i - y_i)^2.

    Args:
        mixture: The head's density for each row, in label standard deviations.
        target: (B,) labels, standardised.
        weights: (B,) factors w, used without their gradient; None for 1.
        row_scale: (B,) or 0-dim S; None for the mixture's own standard deviation.
        location_weight: Of the squared error of the location.
        reduction: `mean` over the finite rows, `sum`, or `none` for (B,).

    Returns:
        0-dim or (B,). Rows that are not finite have loss and gradients 0.

    Raises:
        ValueError: Shapes that do not belong together, or an unknown reduction.
    """
    target = _labels_like(mixture, target)
    keep, mixture, target = _finite(mixture, target)
    surprise: Tensor = _NegativeLogDensity.apply(*mixture[:3], target)  # type: ignore[no-untyped-call]
    if weights is not None:
        surprise = surprise * torch.where(keep, weights.detach(), 0)
    return _scaled(surprise, mixture, target, keep, row_scale, location_weight, reduction)


def _labels_like(mixture: Mixture, target: Tensor) -> Tensor:
    """The labels as (B,) in the mixture's dtype."""
    target = target.detach().to(mixture.means.dtype)
    target = target[:, 0] if target.dim() == 2 and target.shape[1] == 1 else target
    if target.shape != mixture.location.shape or mixture.means.shape[:1] != target.shape or not len(target):
        raise ValueError(
            f"labels {tuple(target.shape)} are not one a row of a mixture with locations "
            f"{tuple(mixture.location.shape)} and means {tuple(mixture.means.shape)}"
        )
    return target


def _finite(mixture: Mixture, target: Tensor) -> tuple[Tensor, Mixture, Tensor]:
    """Which rows are finite, and mixture and labels with the others replaced by 0."""
    keep = finite_rows(*(part.detach() for part in mixture), target)
    parts = (torch.where(keep if part.dim() == 1 else keep[:, None], part, 0) for part in mixture)
    return keep, Mixture(*parts), torch.where(keep, target, 0)


def _scaled(
    loss: Tensor,
    mixture: Mixture,
    target: Tensor,
    keep: Tensor,
    row_scale: Tensor | None,
    location_weight: float,
    reduction: Reduction,
) -> Tensor:
    scale = mixture.spread() if row_scale is None else row_scale.detach()
    loss = scale * loss + location_weight * (mixture.location - target).square()
    return reduce_rows(torch.where(keep, loss, 0), keep, reduction)


class _LogNormaliser(torch.autograd.Function):
    """log sum_j w_j h(y_j | x_i) over the candidates (N,): (B,)."""

    @staticmethod
    def forward(
        ctx: Any, log_pi: Tensor, means: Tensor, log_scales: Tensor, labels: Tensor, log_weights: Tensor
    ) -> Tensor:
        on_cpu = labels.device.type == "cpu"
        weights: Tensor | None = log_weights
        if on_cpu:
            usable = log_weights > -torch.inf
            labels, log_weights = labels[usable], log_weights[usable]
            weights = log_weights if bool(log_weights.any()) else None
        rows = max(1, (CPU_TILE_ELEMENTS if on_cpu else DEVICE_TILE_ELEMENTS) // (len(labels) * means.shape[1]))
        constant = log_pi - log_scales - LOG_SQRT_2_PI
        precision = torch.exp(-log_scales)
        parts = zip(*(torch.split(x, rows) for x in (means, precision, constant)), strict=True)
        tiles = [_normaliser_tile(*part, labels, weights) for part in parts]
        ctx.save_for_backward(torch.cat([moments for _, moments in tiles], 1), precision)
        return torch.cat([log_sum for log_sum, _ in tiles])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        moments, precision = ctx.saved_tensors
        zeroth, first, second = (moments * grad[:, None]).unbind(0)
        return zeroth, first * precision, second - zeroth, None, None


def _normaliser_tile(
    means: Tensor, precision: Tensor, constant: Tensor, labels: Tensor, log_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log sum (R,), and E[1], E[z], E[z^2] (3, R, K), from means, 1 / scales and log peaks of the components (R, K)."""
    z = (labels - means[:, :, None]).mul_(precision[:, :, None])  # (R, K, N)
    base = constant[:, :, None]
    part = torch.addcmul(base if log_weights is None else base + log_weights, z, z, value=-0.5)
    peak = part.amax((1, 2))
    part.sub_(peak[:, None, None]).clamp_(min=LOWEST_EXPONENT).exp_()
    moments = torch.stack([part.sum(2), part.mul_(z).sum(2), part.mul_(z).sum(2)])
    total = moments[0].sum(1)
    return total.log() + peak, moments / total[:, None]


class _NegativeLogDensity(torch.autograd.Function):
    """-log h(y_i | x_i), (B,)."""

    @staticmethod
    def forward(ctx: Any, log_pi: Tensor, means: Tensor, log_scales: Tensor, target: Tensor) -> Tensor:
        precision = torch.exp(-log_scales)
        z = (target[:, None] - means) * precision
        exponent = log_pi - log_scales - LOG_SQRT_2_PI - 0.5 * z.square()
        log_density = exponent.logsumexp(1)
        responsibility = (exponent - log_density[:, None]).exp()
        ctx.save_for_backward(responsibility, z, precision)
        return -log_density

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        responsibility, z, precision = ctx.saved_tensors
        share = -grad[:, None] * responsibility
        return share, share * z * precision, share * (z.square() - 1), None
