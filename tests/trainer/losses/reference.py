"""The losses as their papers write them, every matrix in full: what the package is measured against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_bmc(
    pred: Tensor, target: Tensor, sigma: Tensor, memory: Tensor | None = None, log_weights: Tensor | None = None
) -> Tensor:
    """(B, D) or (B,) predictions and labels -> mean loss, with the factor 2 sigma^2 detached."""
    pred, target = (x[:, None] if x.dim() == 1 else x for x in (pred, target))
    labels = target
    if memory is not None:
        labels = torch.cat([target, memory[:, None] if memory.dim() == 1 else memory])
    logits = -(pred[:, None] - labels).square().sum(2) / (2 * sigma**2)
    if log_weights is not None:
        logits = logits + torch.cat([torch.zeros(len(target), dtype=logits.dtype), log_weights])
    return F.cross_entropy(logits, torch.arange(len(pred))) * (2 * sigma**2).detach()


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Largest |a - b| / (|b| + median |b|)."""
    exact = exact.double()
    return float(((value.double() - exact).abs() / (exact.abs() + exact.abs().median() + 1e-300)).max())
