"""Drift: an alarm when the prequential error rises above what it has been, by the test of Page and Hinkley.

Page 1954, "Continuous inspection schemes"; Hinkley 1971, "Inference about the change-point from cumulative sum tests";
on prequential errors Gama, Sebastiao and Rodrigues 2013, "On evaluating stream learning algorithms".
"""

from typing import Final

import torch
from torch import Tensor, nn

WARM_UP_ROWS: Final = 2000.0  # before there is a baseline to compare with, at the start and after an alarm
BASELINE_ROWS: Final = 5000.0  # that the baseline remembers: a model that goes on improving lowers it
TOLERANCE: Final = 0.05  # standard deviations by which the error may be above the baseline
LARGEST_SCORE: Final = 5.0  # standard deviations; a row further out counts as this, so that no single one raises alarm
ACTION_ROWS: Final = 5000.0  # for which what is done about an alarm lasts


class PageHinkley(nn.Module):
    """The sum of how far the errors of rows are above their running mean, started anew whenever it falls below zero.

    Errors are standardised by their own running mean and deviation, so the threshold has no unit: it is the number of
    rows that are one standard deviation too bad. All state is on the device of the errors, which is never waited for.

    Attributes:
        threshold: the sum that raises an alarm, after which everything begins anew.
        rows, mean, variance: 0-dim float64, of the errors since the last alarm; `mean` and `variance` fade.
        statistic: 0-dim float64, the sum, as a share of the threshold.
        alarms: 0-dim int64, how many there were.
        since: 0-dim float64, rows since the last alarm; infinite before the first.
    """

    rows: Tensor
    mean: Tensor
    variance: Tensor
    statistic: Tensor
    alarms: Tensor
    since: Tensor

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        for name in ("rows", "mean", "variance", "statistic"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        self.register_buffer("alarms", torch.zeros((), dtype=torch.int64))
        self.register_buffer("since", torch.full((), torch.inf, dtype=torch.float64))

    @torch.no_grad()
    def observe(self, error: Tensor) -> None:
        """Takes the errors (B,) of rows that were predicted and not yet learned from, finite and in any unit."""
        error = error.double()
        warm = self.rows >= WARM_UP_ROWS
        sd = self.variance.sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        score = ((error - self.mean) / sd).clamp_(-LARGEST_SCORE, LARGEST_SCORE)
        rise = (score - TOLERANCE).sum() / self.threshold
        self.statistic.copy_(torch.where(warm, (self.statistic + rise).clamp_min(0.0), 0.0))
        alarm = self.statistic >= 1.0
        self.alarms += alarm
        self.since.copy_(torch.where(alarm, 0.0, self.since + len(error)))

        usual = torch.where(warm, torch.minimum(error, self.mean + LARGEST_SCORE * sd), error)
        share = len(error) / (self.rows.clamp(max=BASELINE_ROWS) + len(error))
        shift = usual.mean() - self.mean
        self.variance.mul_(1 - share).add_(share * (usual.var(correction=0) + (1 - share) * shift.square()))
        self.mean += share * shift
        self.rows += len(error)
        for value in (self.rows, self.mean, self.variance, self.statistic):
            value.mul_(~alarm)

    @property
    def acting(self) -> Tensor:
        """0-dim bool, whether an alarm is so recent that something should be done about it."""
        return self.since < ACTION_ROWS
