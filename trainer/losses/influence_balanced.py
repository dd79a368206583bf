"""Influence-Balanced loss: cross-entropy, each row divided by its influence on the last layer.

Source: Park, Lim, Jeon, Choi, "Influence-Balanced Loss for Imbalanced Visual Classification", ICCV 2021
(arXiv 2110.02444):

    loss_i = lambda_y alpha / (||softmax(z_i) - onehot(y_i)||_1 ||h_i||_1 + eps) (-log softmax(z_i)[y_i])

with h the features that the last layer sees. Plain cross-entropy comes first; the loss is for the second phase.
"""

from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.losses.classification import class_rows, cross_entropy_loss
from trainer.losses.rows import Reduction, finite_rows, reduce_rows

EPSILON = 1e-3
ALPHA = 1000.0
FAST_SHARE: Final = 0.01  # of one step in a running mean over a hundred steps
SLOW_SHARE: Final = 0.002  # over five hundred
LEAST_STEPS: Final = 500  # before a plateau is looked for
PLATEAU_RATIO: Final = 0.95  # of the recent loss to the one before
SMALLEST_MEAN: Final = 1e-12


def influence_balanced_loss(
    logits: Tensor,
    target: Tensor,
    features: Tensor,
    *,
    class_weights: Tensor | None = None,
    alpha: float = ALPHA,
    epsilon: float = EPSILON,
    detach_influence: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy over influence.

    Args:
        logits: (B, C). Rows that are not finite have loss and gradients 0.
        target: (B,) int64 classes; a row with an unknown one has loss and gradients 0.
        features: (B, H) what the last layer sees, or (B,) or (B, 1) their L1 norms, as the paper's code passes them.
        class_weights: (C,) lambda, for instance `inverse_count_weights`; None for 1.
        alpha: Brings the loss back to the scale of cross-entropy.
        epsilon: Keeps the factor finite where the influence is 0.
        detach_influence: Whether the factor is a weight (default), or is itself differentiated as in the paper's code.
        reduction: `mean` over the rows that count, `sum`, or `none` for (B,).

    Returns:
        0-dim or (B,).

    Raises:
        ValueError: Shapes that do not belong together, or an unknown reduction.
    """
    if features.shape[:1] != logits.shape[:1]:
        raise ValueError(f"features {tuple(features.shape)} are not one a row of logits {tuple(logits.shape)}")
    features = features.to(torch.float64 if features.dtype == torch.float64 else torch.float32).reshape(len(logits), -1)
    logits, target, keep = class_rows(logits, target)
    keep = keep & finite_rows(features.detach())
    logits = torch.where(keep[:, None], logits, 0)
    features = torch.where(keep[:, None], features, 0)
    norm = features.abs().sum(1)
    error = (torch.softmax(logits, 1) - F.one_hot(target, logits.shape[1])).abs().sum(1)
    influence = error * norm
    if detach_influence:
        influence = influence.detach()
    entropy = F.cross_entropy(logits, target, weight=class_weights, reduction="none")
    loss = alpha / (influence + epsilon) * entropy
    return reduce_rows(torch.where(keep, loss, 0), keep, reduction)


class IBLoss(nn.Module):
    """Influence-Balanced loss with given class weights, a drop-in for the module of the paper's code.

    Args:
        weight: (C,) class weights lambda, or None for 1.
        alpha: As in `influence_balanced_loss`.
        epsilon: As in `influence_balanced_loss`.
        detach_influence: As in `influence_balanced_loss`.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        alpha: float = ALPHA,
        epsilon: float = EPSILON,
        detach_influence: bool = True,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.alpha, self.epsilon, self.detach_influence = alpha, epsilon, detach_influence

    def forward(self, input: Tensor, target: Tensor, features: Tensor) -> Tensor:
        """Mean loss of logits (B, C), classes (B,) and features (B, H), 0-dim."""
        return influence_balanced_loss(
            input,
            target,
            features,
            class_weights=self.weight,
            alpha=self.alpha,
            epsilon=self.epsilon,
            detach_influence=self.detach_influence,
        )


class StreamIBLoss(nn.Module):
    """Both phases on a stream: cross-entropy first, then influence-balanced, brought to the scale of cross-entropy.

    Alpha is the running mean of cross-entropy over that of the influence-balanced loss, so the loss, and with it the
    size of the gradients, does not jump when the phase changes: an optimiser's running moments stay valid. Which phase
    it is, is decided on the device.

    Args:
        after: How many rows cross-entropy teaches first; or `plateau`, until its running mean over a hundred steps is
            no longer clearly below that over five hundred.

    Attributes:
        rows: 0-dim int64 buffer, rows observed.
        steps: 0-dim int64 buffer, losses computed.
        balanced: 0-dim bool buffer, whether the second phase has begun.
        plain: 0-dim float32 buffer, running mean of cross-entropy over a hundred steps.
        plain_before: The same over five hundred.
        raw: 0-dim float32 buffer, running mean of the influence-balanced loss at alpha 1.
    """

    rows: Tensor
    steps: Tensor
    balanced: Tensor
    plain: Tensor
    plain_before: Tensor
    raw: Tensor

    def __init__(self, after: int | Literal["plateau"]) -> None:
        super().__init__()
        self.after = after
        for name in ("rows", "steps"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("balanced", torch.zeros((), dtype=torch.bool))
        for name in ("plain", "plain_before", "raw"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def observe(self, rows: int) -> None:
        """Take in that so many fresh rows came; replayed ones are not observed."""
        self.rows += rows
        if self.after == "plateau":
            flat = (self.steps >= LEAST_STEPS) & (self.plain > PLATEAU_RATIO * self.plain_before)
        else:
            flat = self.rows > self.after
        self.balanced |= flat

    def forward(self, logits: Tensor, target: Tensor, features: Tensor, class_weights: Tensor) -> Tensor:
        """Mean loss of logits (B, C), classes (B,) and features (B, H) at class weights (C,), 0-dim."""
        raw = influence_balanced_loss(logits, target, features, class_weights=class_weights, alpha=1.0)
        plain = cross_entropy_loss(logits, target)
        with torch.no_grad():
            self.steps += 1
            for mean, value, share in (
                (self.plain, plain, FAST_SHARE),
                (self.plain_before, plain, SLOW_SHARE),
                (self.raw, raw, FAST_SHARE),
            ):
                weight = (1 / self.steps).clamp(min=share)  # at first the plain mean of all steps
                mean.copy_(torch.where(value.isfinite(), mean + weight * (value - mean), mean))
        return torch.where(self.balanced, raw * (self.plain / self.raw.clamp(min=SMALLEST_MEAN)), plain)
