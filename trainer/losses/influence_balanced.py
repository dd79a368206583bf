"""Influence-Balanced loss: cross-entropy, each row divided by its influence on the last layer.

Source: Park, Lim, Jeon, Choi, "Influence-Balanced Loss for Imbalanced Visual Classification", ICCV 2021
(arXiv 2110.02444):

    loss_i = lambda_y alpha / (||softmax(z_i) - onehot(y_i)||_1 ||h_i||_1 + eps) (-log softmax(z_i)[y_i])

with h the features that the last layer sees. Plain cross-entropy comes first; the loss is for the second phase.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.losses.class_counts import ClassCounts
from trainer.losses.classification import class_rows
from trainer.losses.rows import Reduction, finite_rows, reduce_rows

EPSILON = 1e-3
ALPHA = 1000.0


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
    """Both phases on a stream: cross-entropy for the first rows, then influence-balanced with online class weights.

    Args:
        counts: Class counts; this module observes into them.
        first_phase_rows: How many rows cross-entropy teaches first.
        alpha: As in `influence_balanced_loss`.

    Attributes:
        rows: 0-dim int64 buffer, rows observed.
    """

    rows: Tensor

    def __init__(self, counts: ClassCounts, first_phase_rows: int, alpha: float = ALPHA) -> None:
        super().__init__()
        self.counts, self.first_phase_rows, self.alpha = counts, first_phase_rows, alpha
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64))

    def observe(self, target: Tensor) -> None:
        """Take in the classes (B,) of fresh rows; replayed ones are not observed again."""
        self.counts.observe(target)
        self.rows += len(target)

    def forward(self, logits: Tensor, target: Tensor, features: Tensor) -> Tensor:
        """Mean loss, 0-dim; which phase is decided on the device."""
        balanced = influence_balanced_loss(
            logits, target, features, class_weights=self.counts.weights().to(logits.dtype), alpha=self.alpha
        )
        clean, classes, keep = class_rows(logits, target)
        plain = F.cross_entropy(clean, classes, reduction="none")
        plain = reduce_rows(torch.where(keep, plain, 0), keep, "mean")
        return torch.where(self.rows <= self.first_phase_rows, plain, balanced)
