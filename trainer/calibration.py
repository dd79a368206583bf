"""Interval levels that follow what happened: running conformal calibration of the predictive distribution.

With F(y|x) the predicted distribution function, u = F(y|x) of the label that came is uniform if the prediction is
right (Dawid 1984, "The prequential approach"). Where it is not, the share p of the labels lies below the level q(p),
the p-quantile of the u seen so far: an interval from q(lower) to q(upper) holds what the one from lower to upper
promised. It is conformal prediction with u as the score (Chernozhukov, Wuethrich and Zhu 2021, "Distributional
conformal prediction"), here with a fading count of the scores, so that the levels follow a stream that changes.
"""

import math
from typing import Final

import torch
from torch import Tensor, nn

BINS: Final = 1024
REACH: Final = 6.0  # bins are equal in normal scores from -REACH to REACH: fine where levels come near 0 and 1
WINDOW_ROWS: Final = 2000.0  # a row seen this long ago counts 1/e
EDGE: Final = 2.0**-52  # nearest that a level may come to 0 and to 1
UNIFORM_ROWS: Final = 50.0  # always counted, evenly spread: until there are more, levels stay near those asked for


class LevelCalibration(nn.Module):
    """The distribution of the levels that labels were seen at, old ones fading; on the model's device.

    Attributes:
        counts: (BINS,) float64, faded rows by the normal score of the level that their label had.
    """

    counts: Tensor
    _uniform: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.float64))
        share = torch.special.ndtr(torch.linspace(-REACH, REACH, BINS + 1, dtype=torch.float64)).diff()
        self.register_buffer("_uniform", UNIFORM_ROWS * share, persistent=False)

    @torch.no_grad()
    def observe(self, levels: Tensor) -> None:
        """Counts the levels (B,) of labels under predictions made before they were learned from; each in [0, 1]."""
        scores = torch.special.ndtri(levels.double()).clamp_(-REACH, REACH)
        bins = ((scores + REACH) * (BINS / (2 * REACH))).long().clamp_(0, BINS - 1)
        self.counts.mul_(math.exp(-len(levels) / WINDOW_ROWS))
        self.counts.index_add_(0, bins, torch.ones_like(levels, dtype=torch.float64))

    @torch.no_grad()
    def ends(self, interval: float, balance: float = 0.0) -> Tensor:
        """Levels of the ends of a central interval, (2,) float64, within (0, 1) and never decreasing.

        What comes of the stream says nothing about labels that are all alike, so the levels go linearly from the
        calibrated ones at balance 0 to those asked for at balance 1.

        Args:
            interval: probability that the interval should hold the label with, in (0, 1).
            balance: 0 for the stream's own label prior, 1 for all labels alike.
        """
        tail = (1 - interval) / 2
        nominal = torch.cat([self.counts.new_full((1,), level) for level in (tail, 1 - tail)])  # no copy from the host
        cumulative = (self.counts + self._uniform).cumsum(0)
        wanted = nominal * cumulative[-1]
        bins = torch.searchsorted(cumulative, wanted).clamp_max_(BINS - 1)
        above = cumulative[bins]
        below = torch.where(bins > 0, cumulative[(bins - 1).clamp_min(0)], 0.0)
        scores = (bins + (wanted - below) / (above - below)) * (2 * REACH / BINS) - REACH
        calibrated = torch.special.ndtr(scores)
        return torch.lerp(calibrated, nominal, balance).clamp_(EDGE, 1 - EDGE)
