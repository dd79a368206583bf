"""Cross-entropy and its forms for classes that are not equally common."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.losses.rows import Reduction, finite_rows, reduce_rows


def class_rows(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Upcast the logits and replace the rows that cannot count.

    Args:
        logits: (B, C).
        target: (B,) int64 classes.

    Returns:
        Logits and classes, 0 in rows with a logit that is not finite or a class outside 0 .. C - 1; (B,) which rows
        are not such.

    Raises:
        ValueError: The shapes are not those of one batch.
    """
    if logits.dim() != 2 or target.shape != logits.shape[:1] or not len(target):
        raise ValueError(f"logits {tuple(logits.shape)} and classes {tuple(target.shape)} are not (B, C) and (B,)")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    keep = finite_rows(logits.detach()) & (target >= 0) & (target < logits.shape[1])
    return torch.where(keep[:, None], logits, 0), torch.where(keep, target, 0), keep


def cross_entropy_loss(
    logits: Tensor, target: Tensor, *, class_weights: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """-lambda_y log softmax(logits)[y]; the mean is over the rows, not over their weights.

    Args:
        logits: (B, C). Rows that are not finite have loss and gradient 0.
        target: (B,) int64 classes; a row with an unknown one has loss and gradient 0.
        class_weights: (C,) lambda, for instance `effective_number_weights`; None for 1.
        reduction: `mean` over the rows that count, `sum`, or `none` for (B,).

    Returns:
        0-dim or (B,), in nats.
    """
    logits, target, keep = class_rows(logits, target)
    loss = F.cross_entropy(logits, target, weight=class_weights, reduction="none")
    return reduce_rows(torch.where(keep, loss, 0), keep, reduction)


def logit_adjusted_loss(logits: Tensor, target: Tensor, log_prior: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Cross-entropy of logits + log prior; the logits then rank the classes as if all were equally common.

    Source: Menon et al., "Long-tail Learning via Logit Adjustment", ICLR 2021 (arXiv 2007.07314), the logit adjusted
    softmax cross-entropy with temperature 1.

    Args:
        logits: (B, C).
        target: (B,) int64 classes.
        log_prior: (C,), for instance `ClassCounts.log_prior`.
        reduction: `mean` over the rows that count, `sum`, or `none` for (B,).

    Returns:
        0-dim or (B,), in nats.
    """
    logits, target, keep = class_rows(logits, target)
    loss = F.cross_entropy(logits + log_prior.detach(), target, reduction="none")
    return reduce_rows(torch.where(keep, loss, 0), keep, reduction)


def balanced_log_probabilities(logits: Tensor, log_prior: Tensor, balance: float) -> Tensor:
    """What a model trained by `logit_adjusted_loss` answers: log softmax(logits + (1 - balance) log prior).

    Args:
        logits: (B, C).
        log_prior: (C,).
        balance: 0 for the stream's own prior, 1 for classes equally common.

    Returns:
        (B, C), in nats.
    """
    return torch.log_softmax(logits + (1 - balance) * log_prior, 1)


def focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    class_weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """-lambda_y (1 - p_y)^gamma log p_y.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017 (arXiv 1708.02002).

    Args:
        logits: (B, C).
        target: (B,) int64 classes.
        gamma: At least 0; 0 is cross-entropy.
        class_weights: (C,) lambda; None for 1.
        reduction: `mean` over the rows that count, `sum`, or `none` for (B,).

    Returns:
        0-dim or (B,), in nats.
    """
    logits, target, keep = class_rows(logits, target)
    log_p = torch.log_softmax(logits, 1).gather(1, target[:, None])[:, 0]
    # -expm1(log p) is 1 - p without the rounding at p near 1; away from 0, where a power below 1 has no derivative.
    loss = -(torch.expm1(log_p).neg().clamp(min=torch.finfo(log_p.dtype).tiny) ** gamma) * log_p
    if class_weights is not None:
        loss = loss * class_weights[target]
    return reduce_rows(torch.where(keep, loss, 0), keep, reduction)
