"""A fading histogram of the labels of a stream, whose range follows them."""

import torch
from torch import Tensor, nn

from trainer.losses.rows import finite_rows


class LabelHistogram(nn.Module):
    """Equal bins over the labels seen, each with its fading count and the mean of its labels; buffers only.

    When labels leave the range it grows, by a quarter at least, and each bin's content moves to where its mean falls.
    Nothing waits for the host.

    Args:
        bins: How many, at least 2.
        decay: What one label of a batch leaves of the counts before it, in (0, 1]; 1 - 1e-5 remembers about 100,000.

    Raises:
        ValueError: A value outside its range.

    Attributes:
        mass: (bins,) fading counts.
        moment: (bins,) the same, each label times its value.
        low, high: 0-dim, the ends of the range, in the unit of the labels; high < low before the first label.
    """

    mass: Tensor
    moment: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, bins: int = 512, decay: float = 1 - 1e-5) -> None:
        super().__init__()
        if bins < 2 or not 0 < decay <= 1:
            raise ValueError(f"bins {bins} must be at least 2 and decay {decay} in (0, 1]")
        self.decay = decay
        self.register_buffer("mass", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("moment", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("low", torch.tensor(torch.inf, dtype=torch.float64))
        self.register_buffer("high", torch.tensor(-torch.inf, dtype=torch.float64))

    @torch.no_grad()
    def observe(self, labels: Tensor) -> None:
        """Take in a batch of labels (B,); those that are not finite are left out."""
        keep = finite_rows(labels)
        labels = torch.where(keep, labels, 0).double()
        self._grow(torch.where(keep, labels, torch.inf).amin(), torch.where(keep, labels, -torch.inf).amax())
        fade = self.decay ** keep.sum()
        index, one = self.index(labels), keep.double()
        self.mass.mul_(fade).scatter_add_(0, index, one)
        self.moment.mul_(fade).scatter_add_(0, index, one * labels)

    def _grow(self, least: Tensor, most: Tensor) -> None:
        empty = self.low > self.high
        margin = torch.where(empty, most - least, self.high - self.low).clamp(min=1e-6) / 4
        low = torch.where(least < self.low, least - margin, self.low)
        high = torch.where(most > self.high, most + margin, self.high)
        centres = self.centres()
        self.low.copy_(low)
        self.high.copy_(high)
        index = self.index(centres)
        for content in (self.mass, self.moment):
            content.copy_(torch.zeros_like(content).scatter_add_(0, index, content))

    def index(self, labels: Tensor) -> Tensor:
        """The bin of each label (B,), int64; the nearest one outside the range."""
        place = (labels.double() - self.low) / (self.high - self.low) * len(self.mass)
        return place.nan_to_num(0.0).clamp(0, len(self.mass) - 1).long()

    def centres(self) -> Tensor:
        """The mean of each bin's labels, (bins,); the range's low end where it is empty."""
        low = torch.where(self.low.isfinite(), self.low, 0)
        return torch.where(self.mass > 0, self.moment / self.mass, low)

    def log_weights(self) -> Tensor:
        """Log of each bin's share of the labels, (bins,); -inf where it is empty."""
        return (self.mass / self.mass.sum()).log().nan_to_num(nan=-torch.inf, neginf=-torch.inf)

    @torch.no_grad()
    def rescale(self, ratio: Tensor | float, shift: Tensor | float = 0.0) -> None:
        """Follow a change of the label's unit: what was y is now ratio * y + shift, ratio above 0."""
        self.moment.copy_(ratio * self.moment + shift * self.mass)
        for end in (self.low, self.high):
            end.copy_(ratio * end + shift)
