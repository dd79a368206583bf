"""Balanced MSE by batch-based Monte Carlo (BMC), exact, without the B x M matrix.

Source: Ren, Zhang, Yu, Liu, "Balanced MSE for Imbalanced Visual Regression", CVPR 2022 (arXiv 2203.16427), BMC:

    loss_i = 2 v (-log softmax_j(-|p_i - y_j|^2 / 2 v))[own label],   v = sigma^2, the factor 2 v detached
           = q_i + 2 v log sum_j w_j exp(-q_ij / 2 v),                q_ij = |p_i - y_j|^2 - |p_i - r_i|^2

for any reference r_i. With r_i the candidate nearest to p_i nothing cancels. The gradients are means under the softmax,
so two vectors are all that the backward needs:

    d loss_i / d p_i = 2 (E[y_j] - y_i)
    d loss_i / d sigma = 2 (E[q_ij] - q_i) / sigma      (of the cross-entropy, times the detached 2 v)

Were 2 v not detached, the derivative by v would be 2 H(softmax) >= 0 whatever the data: sigma could only shrink, to 0,
where the loss is plain MSE. Detached, it settles where E[|p - y_j|^2] = mean |p - y|^2, at the noise level.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.losses import fused, kernel
from trainer.losses.candidates import all_finite, candidate_labels, drop_masked, mask_candidates
from trainer.losses.dense_softmax import SoftmaxMoments, dense_moments, wide
from trainer.losses.gauss_transform import LOG_WEIGHT_RANGE, near_linear_moments
from trainer.losses.rows import Reduction, as_rows, finite_rows, reduce_rows
from trainer.losses.sigma_gradient import SigmaGradient, follows_moments, moment_gap, weighted_variance

# Far below any noise, far above where sigma squared leaves float32.
SMALLEST_SIGMA = 1e-12

# Pairs (rows x candidates) from which sorting and binning cost less than a tile's exponentials, by torch or compiled.
NEAR_LINEAR_PAIRS = 1 << 18
NEAR_LINEAR_PAIRS_OF_KERNEL = 1 << 24

# Rounding of a few 1e-8 beside this share stays below 1e-5 of the rest.
FLOAT32_SHARE = 0.05


def bmc_loss(
    pred: Tensor,
    target: Tensor,
    noise_sigma: Tensor | float,
    *,
    memory: Tensor | None = None,
    memory_log_weights: Tensor | None = None,
    gather: bool = True,
    reduction: Reduction = "mean",
    sigma_gradient: SigmaGradient = "likelihood",
) -> Tensor:
    """Balanced MSE (BMC): each row's own label against the labels of the batch and of a memory.

    A row whose prediction or label is not finite has loss and gradient 0, and a label that is not finite is no
    candidate; `finite_rows` counts such rows. On any device but the CPU nothing waits for the host.

    Args:
        pred: (B,), (B, 1) or (B, D) predictions, in the unit of the labels. Half precision is upcast.
        target: (B,), (B, 1) or (B, D) labels. Each is a candidate exactly once.
        noise_sigma: 0-dim or (1,), the standard deviation of the noise in the unit of the labels; its sign is ignored.
        memory: (M,), (M, 1) or (M, D) further candidates, in the unit of the labels, the rows' own not among them.
        memory_log_weights: (M,) log of each candidate's weight beside the batch's log 1 = 0; -inf = masked out.
        gather: whether labels of other ranks are candidates too, where there are any; False where `memory` has them.
        reduction: `mean` over the finite rows, `sum`, or `none` for (B,).
        sigma_gradient: What a learned sigma follows: the `likelihood`, which is the derivative as published, or
            `moments`, which has the same root, gets there sooner and never runs away; see
            `trainer.losses.sigma_gradient`.

    Returns:
        The loss in squared label units, 0-dim or (B,); float64 if `pred` is, else float32.

    Raises:
        ValueError: Shapes that do not belong together, or an unknown reduction or gradient.
    """
    pred, target = as_rows(pred, target)
    sigma = usable_sigma(noise_sigma, pred.device)
    labels, log_weights = candidate_labels(target, memory, memory_log_weights, gather=gather)
    return loss_against(pred, target, sigma, labels, log_weights, reduction, sigma_gradient)


def usable_sigma(noise_sigma: Tensor | float, device: torch.device) -> Tensor:
    """Sigma as a 0-dim tensor above 0, with its gradient.

    Raises:
        ValueError: It is not one number.
    """
    sigma = torch.as_tensor(noise_sigma, device=device)
    if sigma.numel() != 1:
        raise ValueError(f"noise_sigma has shape {tuple(sigma.shape)}: give one number for the batch")
    sigma = sigma.reshape(()) if sigma.dim() else sigma
    if device.type == "cpu" and float(sigma.detach()) >= SMALLEST_SIGMA:
        return sigma  # a CPU may look, which costs less than what it spares
    return sigma.abs().clamp(min=SMALLEST_SIGMA)


def loss_against(
    pred: Tensor,
    target: Tensor,
    noise_sigma: Tensor,
    labels: Tensor,
    log_weights: Tensor | None,
    reduction: Reduction = "mean",
    sigma_gradient: SigmaGradient = "likelihood",
) -> Tensor:
    """Balanced MSE against candidates as given, whether or not the own labels are among them.

    Args:
        pred: (B,) or (B, D) predictions, float32 or float64.
        target: (B,) or (B, D) labels, of the same dtype.
        noise_sigma: 0-dim, above 0.
        labels: (N,) or (N, D) candidates.
        log_weights: (N,), -inf = masked out; or None for 0.
        reduction: `mean` over the finite rows, `sum`, or `none` for (B,).
        sigma_gradient: See `bmc_loss`.
    """
    by_moments = follows_moments(sigma_gradient)
    if log_weights is None and pred.dim() == 1 and fused.takes(pred, target, labels):
        rows, counts = _FusedRows.apply(pred, noise_sigma, target, labels, by_moments)  # type: ignore[no-untyped-call]
        return reduce_rows(rows, counts, reduction)
    # Only a CPU may look at the numbers, and then spares the common case all masking.
    if pred.device.type == "cpu":
        labels, log_weights = drop_masked(labels, log_weights)
        if log_weights is None and all_finite(pred, target, labels):
            average = reduction == "mean"
            given = pred, noise_sigma, target, labels, None
            loss: Tensor = _BalancedMSE.apply(*given, True, average, by_moments, None)  # type: ignore[no-untyped-call]
            return loss if average else reduce_rows(loss, torch.ones_like(loss, dtype=torch.bool), reduction)
    peak_is_zero = log_weights is None
    labels, log_weights = mask_candidates(labels, log_weights)
    keep = finite_rows(pred.detach(), target)
    # A row left out is moved onto a candidate, where all computed for it is finite; its results are then dropped.
    keep_values = keep if pred.dim() == 1 else keep[:, None]
    pred, target = (torch.where(keep_values, values, labels[0]) for values in (pred, target))
    masked = pred, noise_sigma, target, labels, log_weights
    loss = _BalancedMSE.apply(*masked, peak_is_zero, False, by_moments, keep)  # type: ignore[no-untyped-call]
    return reduce_rows(torch.where(keep, loss, 0), keep, reduction)


class BMCLoss(nn.Module):
    """Balanced MSE (BMC) with a learned sigma, a drop-in for the module of the same name in the paper's code.

    `criterion(pred, target)` takes (B,), (B, 1) or (B, D) of each; give sigma its own learning rate with
    `optimizer.add_param_group({"params": criterion.noise_sigma, "lr": 1e-2})`.

    Attributes:
        noise_sigma: 0-dim parameter, the noise's standard deviation in the unit of the labels.
        sigma_gradient: what it follows; see `bmc_loss`.
        nonfinite_rows: 0-dim int64 buffer, how many rows were left out because a value was not finite.
    """

    nonfinite_rows: Tensor

    def __init__(self, init_noise_sigma: float = 1.0, sigma_gradient: SigmaGradient = "likelihood") -> None:
        super().__init__()
        follows_moments(sigma_gradient)
        self.sigma_gradient = sigma_gradient
        self.noise_sigma = nn.Parameter(torch.tensor(float(init_noise_sigma)))
        self.register_buffer("nonfinite_rows", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        memory: Tensor | None = None,
        memory_log_weights: Tensor | None = None,
    ) -> Tensor:
        """Average loss of the batch, 0-dim, in squared label units: `bmc_loss` with this module's sigma."""
        self.nonfinite_rows += (~finite_rows(pred.detach(), target)).sum()
        return bmc_loss(
            pred,
            target,
            self.noise_sigma,
            memory=memory,
            memory_log_weights=memory_log_weights,
            sigma_gradient=self.sigma_gradient,
        )


class _BalancedMSE(torch.autograd.Function):
    """Losses of the rows (B,), or their mean. The gradients are computed with them: nothing of size B x M is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        sigma: Tensor,
        target: Tensor,
        labels: Tensor,
        log_weights: Tensor | None,
        peak_is_zero: bool,
        average: bool,
        by_moments: bool,
        keep: Tensor | None,
    ) -> Tensor:
        value = float(sigma) if pred.device.type == "cpu" else sigma
        if _near_linear_pays(pred, labels, log_weights):
            if log_weights is not None:
                usable = log_weights > -torch.inf
                labels, log_weights = labels[usable], log_weights[usable]
            reference, *sums = near_linear_moments(pred, labels, log_weights, float(sigma))
            moments = SoftmaxMoments(reference, torch.sub(reference, pred, alpha=2), 0.0, *sums)
            own_shift, own_excess = _own_terms(target, moments)
        else:
            narrow = peak_is_zero and pred.dim() == 1
            parts = (pred, labels, log_weights) if narrow else (wide(pred), wide(labels), log_weights)
            settings = {"peak_is_zero": peak_is_zero, "with_excess": ctx.needs_input_grad[1]}
            moments = dense_moments(*parts, value**2, **settings)
            own_shift, own_excess = _own_terms(target, moments)
            # Only a CPU may look at the numbers.
            if narrow and pred.device.type == "cpu" and _sigma_cancels(own_excess, moments):
                moments = dense_moments(wide(pred), wide(labels), log_weights, value**2, **settings)
                own_shift, own_excess = _own_terms(target, moments)
        error = moments.mean_shift - own_shift
        if pred.dim() == 2:
            own_excess = own_excess.sum(1)
        loss = own_excess + moments.log_sum * (2 * value**2)
        share = 1 / len(pred) if average else 1.0
        sigma_grad = None
        if ctx.needs_input_grad[1] and moments.mean_excess is not None:
            if by_moments:
                square = error.square() if pred.dim() == 1 else error.square().sum(1)
                gap = moment_gap(_spread(pred, moments), square, weighted_variance(labels, log_weights), keep)
            else:
                gap = moments.mean_excess - own_excess
            sigma_grad = gap.mul_(2 * share / value)
            sigma_grad = sigma_grad.sum() if average else sigma_grad  # rows cancel in their sum: not yet rounded
        ctx.save_for_backward(error.mul_(2 * share).to(pred.dtype), sigma_grad)
        return (loss.mean() if average else loss).to(pred.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pred_grad, sigma_grad = ctx.saved_tensors
        grad_pred = (grad[:, None] if pred_grad.dim() > 1 and grad.dim() else grad) * pred_grad
        grad_sigma = None if sigma_grad is None else (grad * sigma_grad).sum().to(pred_grad.dtype)
        return grad_pred, grad_sigma, *[None] * 7


class _FusedRows(torch.autograd.Function):
    """Losses of the rows (B,), and which of them count (B,), by one kernel."""

    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, sigma: Tensor, target: Tensor, labels: Tensor, by_moments: bool
    ) -> tuple[Tensor, Tensor]:
        found = fused.balanced_rows(pred, target, labels, sigma)
        by_sigma = found.by_sigma
        if ctx.needs_input_grad[1] and by_moments:
            most = weighted_variance(*mask_candidates(labels, None))
            gap = moment_gap(found.spread, (found.by_pred.double() / 2).square(), most, found.counts)
            by_sigma = torch.where(found.counts, gap * (2 / sigma), 0)
        ctx.save_for_backward(found.by_pred, by_sigma)
        ctx.mark_non_differentiable(found.counts)
        return found.loss, found.counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        by_pred, by_sigma = ctx.saved_tensors
        grad_sigma = (grad * by_sigma).sum().to(by_pred.dtype) if ctx.needs_input_grad[1] else None
        return grad * by_pred, grad_sigma, None, None, None


def _own_terms(target: Tensor, moments: SoftmaxMoments) -> tuple[Tensor, Tensor]:
    """The own label's t and the terms, (B,) or (B, D), that its q is the sum of, in float64."""
    target = wide(target)
    own_shift = target - moments.reference
    return own_shift, (target + moments.mirror).add_(moments.mirror_rest).mul_(own_shift)


def _spread(pred: Tensor, moments: SoftmaxMoments) -> Tensor:
    """(B,) variance of the candidates, summed over dimensions, under each row's softmax: E[|t|^2] - |E[t]|^2."""
    assert moments.mean_excess is not None
    shift = moments.mean_shift
    other = (2 * (moments.reference - pred) + shift) * shift
    return (moments.mean_excess - (other if pred.dim() == 1 else other.sum(1))).clamp(min=0)


def _sigma_cancels(own_excess: Tensor, moments: SoftmaxMoments) -> bool:
    """Whether what float32 rounds off the means of q is too much beside sigma's gradient, their sum less the own q's.

    So it is at sigmas far above the labels' deviation, where a few outliers' q are a hundred times that sum.
    """
    if moments.mean_excess is None or moments.mirror.dtype == torch.float64:
        return False
    gradient = float((moments.mean_excess - own_excess).sum())
    return abs(gradient) < FLOAT32_SHARE * float(torch.linalg.vector_norm(moments.mean_excess))


def _near_linear_pays(pred: Tensor, labels: Tensor, log_weights: Tensor | None) -> bool:
    """Only a CPU may look at the numbers to choose; a device's tiles are wide, and asking it would stall it."""
    if pred.device.type != "cpu" or pred.dim() != 1:
        return False
    compiled = log_weights is None and kernel.takes(pred, labels)
    if len(pred) * len(labels) < (NEAR_LINEAR_PAIRS_OF_KERNEL if compiled else NEAR_LINEAR_PAIRS):
        return False
    if log_weights is None:
        return True
    finite = log_weights[log_weights > -torch.inf]
    return len(finite) > 0 and float(finite.max() - finite.min()) <= LOG_WEIGHT_RANGE
