"""Balanced losses for a head that gives a density h(y|x): a mixture of K Gaussians around a shared location.

`density_bmc_loss` is Balanced MSE's batch-based Monte Carlo form (Ren et al., CVPR 2022, arXiv 2203.16427) with any
density in the place of its one Gaussian: the cross-entropy of log h(y_j | x_i) over candidate labels j. h then
estimates p(y|x) / p(y), as if every label were equally likely. `density_nll_loss` is the likelihood; h then estimates
p(y|x) times the row weights. The head: Bishop, "Mixture Density Networks", Aston University NCRG/94/004, 1994.

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

from trainer.losses import fused, kernel
from trainer.losses.candidates import all_finite, candidate_labels, drop_masked, mask_candidates
from trainer.losses.mixture import LOG_SQRT_2_PI, Mixture
from trainer.losses.mixture_softmax import mixture_moments
from trainer.losses.rows import Reduction, finite_rows, reduce_rows

LOCATION_WEIGHT = 2.0  # without the squared term a mixture explains the marginal before it learns the location


def density_bmc_loss(
    mixture: Mixture,
    target: Tensor,
    *,
    memory: Tensor | None = None,
    memory_log_weights: Tensor | None = None,
    memory_weight: float = 1.0,
    memory_variances: Tensor | None = None,
    gather: bool = True,
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
        memory_weight: How often each label of the memory counts, where they are a sample of more: a rare label counts
            once among the batch's, and with few candidates that alone would be all there is to its row's normaliser.
        memory_variances: (M,) of Gaussians around the labels of the memory, where each stands for those near it too: a
            Gaussian component is then summed over all of them. None for 0. Among labels as they are, a narrow component
            costs nothing between two of them, and learns nothing there.
        gather: Whether labels of other ranks are candidates too, where there are any; False where `memory` has them.
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
    labels, log_weights = candidate_labels(target, memory, memory_log_weights, gather=gather)
    return _density_loss(
        mixture,
        target,
        (labels, log_weights),
        None,
        row_scale,
        location_weight,
        reduction,
        _Memory(0 if memory is None else len(memory), memory_weight, memory_variances),
    )


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
    return _density_loss(mixture, target, None, weights, row_scale, location_weight, reduction)


class _Memory(NamedTuple):
    """The last candidates."""

    rows: int = 0
    weight: float = 1.0
    variances: Tensor | None = None  # (rows,)


_NO_MEMORY = _Memory()


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


def _density_loss(
    mixture: Mixture,
    target: Tensor,
    candidates: tuple[Tensor, Tensor | None] | None,
    weights: Tensor | None,
    row_scale: Tensor | None,
    location_weight: float,
    reduction: Reduction,
    memory: _Memory = _NO_MEMORY,
) -> Tensor:
    """Mask what is not finite, and reduce the losses of the rows; without candidates they are likelihoods."""
    labels, log_weights = (None, None) if candidates is None else candidates
    average = reduction == "mean"
    scale, factors = (None if t is None else t.detach().to(target.dtype) for t in (row_scale, weights))
    if fused.takes(*mixture, target) and mixture.means.shape[1] <= fused.MOST_COMPONENTS:
        scales = None if scale is None else scale.expand_as(target)
        blur = None if memory.variances is None else memory.variances.detach().to(target.dtype)
        others = labels, log_weights, blur, scales, factors
        rows, counts, gradients = fused.mixture_rows(
            *mixture, target, *others, memory.rows, memory.weight, location_weight
        )
        return reduce_rows(_KnownGradients.apply(*mixture, rows, gradients), counts, reduction)  # type: ignore[no-untyped-call]
    if log_weights is None and kernel.takes(*mixture, target) and mixture.means.shape[1] <= kernel.MOST_COMPONENTS:
        scales = None if scale is None else scale.expand_as(target)
        share = 1 / len(target) if average else 1.0
        blur = None if memory.variances is None else memory.variances.detach().to(target.dtype)
        known = kernel.mixture_rows(
            *mixture, target, labels, blur, scales, factors, memory.rows, memory.weight, location_weight, share
        )
        if known is not None:
            rows, mean, *gradients = known
            loss: Tensor = _KnownGradients.apply(*mixture, mean if average else rows, gradients)  # type: ignore[no-untyped-call]
            return loss if average else reduce_rows(loss, torch.ones_like(target, dtype=torch.bool), reduction)
    if labels is not None and memory.rows and memory.weight != 1.0:
        log_weights = labels.new_zeros(len(labels)) if log_weights is None else log_weights.clone()
        log_weights[-memory.rows :] += math.log(memory.weight)
    variances = None
    if labels is not None and memory.rows and memory.variances is not None:
        variances = labels.new_zeros(len(labels))
        variances[-memory.rows :] = memory.variances.detach()
    keep = None
    # Only a CPU may look at the numbers, and then spares the common case all masking.
    clean = target.device.type == "cpu"
    if clean:
        if labels is not None:
            if variances is not None and log_weights is not None:
                variances = variances[log_weights > -torch.inf]
            labels, log_weights = drop_masked(labels, log_weights)
        clean = _is_finite(mixture, target if labels is None else labels)
        clean = clean and (log_weights is None or all_finite(log_weights))
    if not clean:
        keep = finite_rows(*(part.detach() for part in mixture), target)
        if labels is not None:
            labels, log_weights = mask_candidates(labels, log_weights)
        mixture = Mixture(*(torch.where(keep if part.dim() == 1 else keep[:, None], part, 0) for part in mixture))
        target = torch.where(keep, target, 0)
    scale = mixture.spread() if scale is None else scale
    if factors is not None:
        scale = scale * (factors if keep is None else torch.where(keep, factors, 0))
    average = average and keep is None
    loss = _DensityLoss.apply(*mixture, target, labels, log_weights, variances, scale, location_weight, average)  # type: ignore[no-untyped-call]
    if keep is not None:
        return reduce_rows(torch.where(keep, loss, 0), keep, reduction)
    return loss if average else reduce_rows(loss, torch.ones_like(target, dtype=torch.bool), reduction)


def _is_finite(mixture: Mixture, labels: Tensor) -> bool:
    """Whether all numbers are finite, on a CPU only; may say no where a product or a sum overflows."""
    with torch.no_grad():
        # A product is not finite if a factor is not, even beside 0: one sum for three matrices.
        components = torch.addcmul(mixture.log_weights, mixture.means, mixture.log_scales).sum()
        return math.isfinite(float(components) + float(mixture.location.sum()) + float(labels.sum()))


class _KnownGradients(torch.autograd.Function):
    """Losses computed beforehand, (B,) or 0-dim, with their gradients by the four parts of a mixture."""

    @staticmethod
    def forward(
        ctx: Any,
        log_weights: Tensor,
        means: Tensor,
        log_scales: Tensor,
        location: Tensor,
        loss: Tensor,
        gradients: list[Tensor],
    ) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *by_components, by_location = ctx.saved_tensors
        if grad.is_cpu and not grad.dim() and float(grad) == 1.0:  # of a loss that is not part of another
            return *by_components, by_location, None, None
        column = grad[:, None] if grad.dim() else grad
        return (*(column * part for part in by_components), grad * by_location, None, None)


class _DensityLoss(torch.autograd.Function):
    """scale (log normaliser - log h(y_i | x_i)) + location_weight (f_i - y_i)^2 of the rows, (B,), or the mean."""

    @staticmethod
    def forward(
        ctx: Any,
        log_pi: Tensor,
        means: Tensor,
        log_scales: Tensor,
        location: Tensor,
        target: Tensor,
        labels: Tensor | None,
        log_weights: Tensor | None,
        variances: Tensor | None,
        scale: Tensor,
        location_weight: float,
        average: bool,
    ) -> Tensor:
        precision = (log_scales * -2).exp_()
        base = log_pi - log_scales
        distance = target[:, None] - means
        square = distance * distance
        exponent = torch.addcmul(base, square, precision, value=-0.5)
        peak = exponent.amax(1, keepdim=True)
        own = exponent.sub_(peak).exp_()
        total = own.sum(1, keepdim=True)
        log_own = total.log().add_(peak)[:, 0]
        rows = 1 / len(target) if average else 1.0
        column = scale[:, None] * rows if scale.dim() else scale * rows
        own.mul_(column / total)  # responsibilities for the own label, times the row's factor
        if labels is None:
            surprise = LOG_SQRT_2_PI - log_own
            gradients = [torch.zeros_like(own) for _ in range(3)]
        else:
            log_sum, *moments = mixture_moments(base, means, precision, labels, log_weights, variances)
            surprise = log_sum - log_own
            gradients = [moment.mul_(column) for moment in moments]
        by_log_pi, by_means, by_log_scales = gradients
        by_log_pi.sub_(own)
        by_means.addcmul_(own, distance.mul_(precision), value=-1)
        by_log_scales.addcmul_(own, square.mul_(precision).sub_(1), value=-1)
        error = location - target
        ctx.save_for_backward(by_log_pi, by_means, by_log_scales, error * (2 * location_weight * rows))
        if not average:
            return torch.addcmul(scale * surprise, error, error, value=location_weight)
        return torch.addcmul(scale * surprise, error, error, value=location_weight).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *by_components, by_location = ctx.saved_tensors
        column = grad[:, None] if grad.dim() else grad
        return (*(column * part for part in by_components), grad * by_location, *[None] * 7)
