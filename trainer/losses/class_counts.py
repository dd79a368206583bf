"""How often each class was seen on a stream, and what follows from it: weights and log priors."""

import torch
from torch import Tensor, nn


class ClassCounts(nn.Module):
    """Fading counts of C classes; a buffer, so that it is part of a snapshot. Nothing waits for the host.

    Args:
        classes: C to begin with; `grow` adds more.
        decay: What one row leaves of the counts before it, in (0, 1].
        floor: Counts below it are taken for it, above 0: otherwise one class of a few rows takes nearly all weight.

    Raises:
        ValueError: A value outside its range.

    Attributes:
        counts: (C,) fading counts, without the floor.
    """

    counts: Tensor

    def __init__(self, classes: int, decay: float = 1 - 1e-5, floor: float = 10.0) -> None:
        super().__init__()
        if classes < 0 or not 0 < decay <= 1 or not floor > 0:
            raise ValueError(f"classes {classes} must be 0 or more, decay {decay} in (0, 1], floor {floor} above 0")
        self.decay, self.floor = decay, floor
        self.register_buffer("counts", torch.zeros(classes, dtype=torch.float64))

    def grow(self, classes: int) -> None:
        """Makes room for classes up to a number, none of them seen yet."""
        self.counts = torch.cat([self.counts, self.counts.new_zeros(classes - len(self.counts))])

    @torch.no_grad()
    def observe(self, target: Tensor) -> None:
        """Take in a batch of classes (B,) int64; those outside 0 .. C - 1 are left out."""
        known = (target >= 0) & (target < len(self.counts))
        self.counts.mul_(self.decay ** known.sum())
        self.counts.scatter_add_(0, torch.where(known, target, 0), known.double())

    def weights(self) -> Tensor:
        """`inverse_count_weights` of the counts, floored: (C,) float32."""
        return inverse_count_weights(self.counts.clamp(min=self.floor)).float()

    def log_prior(self) -> Tensor:
        """Log of each class's share of the rows, floored: (C,) float32."""
        counts = self.counts.clamp(min=self.floor)
        return (counts / counts.sum()).log().float()


def inverse_count_weights(counts: Tensor) -> Tensor:
    """lambda_k = C / n_k / sum_j 1 / n_j: 1 / n_k, scaled to sum to C. Counts 100, 200, 50: .8571, .4286, 1.7143.

    Source: Park et al., "Influence-Balanced Loss for Imbalanced Visual Classification", ICCV 2021 (arXiv 2110.02444).

    Args:
        counts: (C,) rows of each class, above 0.
    """
    inverse = 1 / counts
    return inverse * (len(counts) / inverse.sum())


def effective_number_weights(counts: Tensor, beta: float = 0.999) -> Tensor:
    """(1 - beta) / (1 - beta^n_k), scaled to sum to C.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019 (arXiv 1901.05555).

    Args:
        counts: (C,) rows of each class, above 0.
        beta: In (0, 1); towards 1 the weights tend to `inverse_count_weights`.
    """
    weights = (1 - beta) / (1 - beta**counts)
    return weights * (len(counts) / weights.sum())
