"""The losses that learn the stream's own label distribution: squared, absolute, and Huber's error."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.losses.rows import Reduction, as_rows, finite_rows, reduce_rows


def _reduced(error: Tensor, keep: Tensor, weights: Tensor | None, reduction: Reduction) -> Tensor:
    """Sum the dimensions of a row, weigh the rows, drop those that are not finite."""
    loss = error if error.dim() == 1 else error.sum(1)
    if weights is not None:
        loss = loss * torch.where(keep, weights, 0)
    return reduce_rows(loss, keep, reduction)


def _finite_residual(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction minus label, 0 in the rows that are not finite, and which rows are."""
    pred, target = as_rows(pred, target)
    keep = finite_rows(pred.detach(), target)
    mask = keep if pred.dim() == 1 else keep[:, None]
    # The rows are replaced before the subtraction: inf - inf behind a `where` would still leave a NaN gradient.
    return torch.where(mask, pred, 0) - torch.where(mask, target, 0), keep


def mse_loss(pred: Tensor, target: Tensor, *, weights: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    """Squared error (p - y)^2, the squared distance for labels of D dimensions.

    Args:
        pred: (B,), (B, 1) or (B, D) predictions in label units.
        target: Labels of the same shape. Rows that are not finite have loss and gradient 0.
        weights: (B,) factors, for instance those of `InverseDensityWeights`; None for 1.
        reduction: `mean` over the finite rows, `sum`, or `none` for (B,).

    Returns:
        0-dim or (B,), in squared label units.
    """
    residual, keep = _finite_residual(pred, target)
    return _reduced(residual.square(), keep, weights, reduction)


def l1_loss(pred: Tensor, target: Tensor, *, weights: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    """Absolute error |p - y|, summed over the dimensions of a label; arguments as in `mse_loss`, in label units."""
    residual, keep = _finite_residual(pred, target)
    return _reduced(residual.abs(), keep, weights, reduction)


def huber_loss(
    pred: Tensor,
    target: Tensor,
    *,
    delta: float = 1.0,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Huber's error: r^2 / 2 up to |r| = delta, delta (|r| - delta / 2) beyond, summed over the dimensions of a label.

    Source: Huber, "Robust Estimation of a Location Parameter", Annals of Mathematical Statistics 35, 1964.

    Args:
        pred: (B,), (B, 1) or (B, D) predictions in label units.
        target: Labels of the same shape. Rows that are not finite have loss and gradient 0.
        delta: Where the square turns into a line, in label units, above 0.
        weights: (B,) factors; None for 1.
        reduction: `mean` over the finite rows, `sum`, or `none` for (B,).

    Returns:
        0-dim or (B,), in squared label units.
    """
    residual, keep = _finite_residual(pred, target)
    return _reduced(
        F.huber_loss(residual, torch.zeros_like(residual), reduction="none", delta=delta), keep, weights, reduction
    )
