"""Which rows of a batch count, and how their losses become one number."""

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]


def as_rows(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Bring predictions and labels to the same shape, so that (B, 1) beside (B,) never broadcasts to (B, B).

    Args:
        pred: (B,), (B, 1) or (B, D) predictions. bfloat16 and float16 are upcast to float32.
        target: (B,), (B, 1) or (B, D) labels, in the same unit.

    Returns:
        Both as (B,) when there is one label a row, else both as (B, D); float64 if `pred` is, else float32.

    Raises:
        ValueError: The shapes are not those of one batch.
    """
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    pred, target = pred.to(dtype), target.detach().to(dtype)
    if pred.dim() == 2 and pred.shape[1] == 1:
        pred = pred[:, 0]
    if target.dim() == 2 and target.shape[1] == 1:
        target = target[:, 0]
    if pred.shape != target.shape or pred.dim() not in (1, 2) or not len(pred):
        raise ValueError(
            f"predictions {tuple(pred.shape)} and labels {tuple(target.shape)} are not one batch: "
            "give both as (B,), (B, 1) or (B, D), with at least one row"
        )
    return pred, target


def finite_rows(*tensors: Tensor) -> Tensor:
    """Mark the rows in which every value is finite; the others are left out of every loss here.

    `(~finite_rows(pred, target)).sum()` counts the rows left out, on the device they are on.

    Args:
        *tensors: (B,) or (B, ...) each, the same B.

    Returns:
        (B,) bool.
    """
    marks = [t.isfinite() if t.dim() == 1 else t.flatten(1).isfinite().all(1) for t in tensors]
    return torch.stack(marks).all(0)


def reduce_rows(loss: Tensor, keep: Tensor, reduction: Reduction) -> Tensor:
    """Sum or average the losses of the rows that count.

    Args:
        loss: (B,) losses, already 0 and finite in the rows that do not count.
        keep: (B,) bool, the rows that count.
        reduction: `mean` over the rows that count (0 if none does), `sum`, or `none` for (B,).

    Raises:
        ValueError: `reduction` is none of the three.
    """
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / keep.sum().clamp(min=1)
    raise ValueError(f"reduction {reduction!r} is not mean, sum or none")
