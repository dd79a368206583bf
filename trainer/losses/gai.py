"""Balanced MSE by GMM-based analytical integration (GAI), with the mixture fitted on the stream.

Source: Ren et al., "Balanced MSE for Imbalanced Visual Regression", CVPR 2022 (arXiv 2203.16427), GAI, whose mixture is
fitted to a data set beforehand. With v = sigma^2 and label components of weight w_k, mean mu_k and variance s_k:

    loss_i = 2 v ((p_i - y_i)^2 / 2v + log(v) / 2
                  + logsumexp_k(log w_k - log(s_k + v) / 2 - (p_i - mu_k)^2 / 2 (s_k + v))),   the factor 2 v detached
"""

import torch
from torch import Tensor

from trainer.losses.bmc import SMALLEST_SIGMA
from trainer.losses.label_mixture import LabelMixture
from trainer.losses.rows import Reduction, as_rows, finite_rows, reduce_rows
from trainer.losses.sigma_gradient import SigmaGradient, follows_moments, moment_gap


def gai_loss(
    pred: Tensor,
    target: Tensor,
    noise_sigma: Tensor | float,
    labels: LabelMixture,
    *,
    reduction: Reduction = "mean",
    sigma_gradient: SigmaGradient = "likelihood",
) -> Tensor:
    """Balanced MSE against a Gaussian mixture of all labels; it needs no candidates, so one row teaches as many do.

    Args:
        pred: (B,) or (B, 1) predictions, in the unit of the labels.
        target: (B,) or (B, 1) labels. Rows that are not finite have loss and gradients 0.
        noise_sigma: 0-dim, the noise's standard deviation in label units; its sign is ignored.
        labels: The mixture, which has observed labels in the same unit.
        reduction: `mean` over the finite rows, `sum`, or `none` for (B,).
        sigma_gradient: What a learned sigma follows; see `trainer.losses.sigma_gradient`.

    Returns:
        0-dim or (B,), in squared label units.

    Raises:
        ValueError: Shapes that do not belong together, labels of several dimensions, or an unknown reduction or
            gradient.
    """
    by_moments = follows_moments(sigma_gradient)
    pred, target = as_rows(pred, target)
    if pred.dim() != 1:
        raise ValueError(f"GAI is for one label a row, not {tuple(target.shape)}")
    keep = finite_rows(pred.detach(), target)
    pred, target = torch.where(keep, pred, 0).double(), torch.where(keep, target, 0).double()
    sigma = torch.as_tensor(noise_sigma, device=pred.device).reshape(()).abs().clamp(min=SMALLEST_SIGMA).double()
    variance = (sigma.detach() if by_moments else sigma).square()
    log_weights, means, variances = labels.parameters_of_mixture()
    width = variances + variance
    marginal = log_weights - 0.5 * width.log() - 0.5 * (pred[:, None] - means).square() / width
    loss = (pred - target).square() / (2 * variance) + 0.5 * variance.log() + marginal.logsumexp(1)
    loss = 2 * variance.detach() * loss
    if by_moments:
        with torch.no_grad():
            mean, spread = _posterior(pred, variance, marginal, means, variances)
            most = _moments(log_weights.softmax(0), means, variances)[1]
            slope = moment_gap(spread, (mean - target).square(), most, keep) * (2 / sigma)
        loss = loss + slope * (sigma - sigma.detach())  # which is 0, but for its derivative
    loss = loss.to(torch.float32)
    return reduce_rows(torch.where(keep, loss, 0), keep, reduction)


def _posterior(
    pred: Tensor, variance: Tensor, marginal: Tensor, means: Tensor, variances: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance (B,) of the labels given predictions (B,), from each component's part (B, K) in the loss."""
    width = variances + variance
    centres = (means * variance + pred[:, None] * variances) / width
    return _moments(marginal.softmax(1), centres, variances * variance / width)


def _moments(shares: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (...) of mixtures (..., K)."""
    mean = (shares * means).sum(-1)
    return mean, (shares * (variances + (means - mean[..., None]).square())).sum(-1)
