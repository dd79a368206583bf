"""Inverse-density weighting, the usual baseline: rows count by how rare their label is."""

import torch
from torch import Tensor, nn

from trainer.losses.label_histogram import LabelHistogram
from trainer.losses.rows import finite_rows


class InverseDensityWeights(nn.Module):
    """Weights (count of the label's bin) ^ -power, mean 1 over a batch, from a fading histogram.

    Source: the re-weighting baseline of Yang et al., "Delving into Deep Imbalanced Regression", ICML 2021
    (arXiv 2102.09554); power .5 is its square-root inverse form.

    Args:
        bins: Of the histogram.
        power: 1 for inverse counts, .5 for their square root, 0 for none.
        largest: A weight beside the mean before it is cut; the mean is 1 after that.
        decay: As in `LabelHistogram`.

    Raises:
        ValueError: A value outside its range.
    """

    def __init__(self, bins: int = 64, power: float = 1.0, largest: float = 100.0, decay: float = 1 - 1e-5) -> None:
        super().__init__()
        if power < 0 or not largest >= 1:
            raise ValueError(f"power {power} must not be negative, and the largest weight {largest} at least 1")
        self.power, self.largest = power, largest
        self.histogram = LabelHistogram(bins, decay)

    def observe(self, labels: Tensor) -> None:
        """Take in a batch of labels (B,)."""
        self.histogram.observe(labels)

    def rescale(self, ratio: Tensor | float, shift: Tensor | float = 0.0) -> None:
        """Follow a change of the label's unit: what was y is now ratio * y + shift."""
        self.histogram.rescale(ratio, shift)

    @torch.no_grad()
    def forward(self, labels: Tensor) -> Tensor:
        """Weights (B,) for `mse_loss` and its like, in the labels' dtype; 0 where a label is not finite."""
        keep = finite_rows(labels)
        count = self.histogram.mass[self.histogram.index(labels)].clamp(min=1.0)
        weights = torch.where(keep, count**-self.power, 0)
        rows = keep.sum().clamp(min=1)
        weights = weights.clamp(max=self.largest * weights.sum() / rows)
        return (weights * rows / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)).to(labels.dtype)
