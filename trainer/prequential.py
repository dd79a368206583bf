"""Test-then-train metrics: each row is predicted before it is learned from (Dawid 1984, "The prequential approach").

Errors are summed by cells of a fine grid over the labels seen, so that the error of any label region, and hence the
balanced and the many-, medium- and few-shot errors, can be had at any time from bounded memory. All sums stay on the
model's device; only `compute` waits for it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CELLS: Final = 2048
BINS: Final = 50  # equal-width bins of the label range, for the balanced error
LEAST_ROWS: Final = 10  # a bin with fewer says nothing
MANY_SHARE: Final = 1 / 50
MEDIUM_SHARE: Final = 1 / 500
SHOTS: Final = {
    "all": "mae",
    "many": "mae_many",
    "medium": "mae_medium",
    "few": "mae_few",
}  # names of an answer's errors
BALANCES: Final = (0.0, 1.0)  # label priors that metrics are kept for
WINDOWS: Final = ("whole", "fading")
ERRORS: Final = 3  # where the rows of errors begin in `PrequentialMetrics.sums`
MEDIAN: Final = "median"  # the error of always answering the running median: what a model must beat


class PrequentialMetrics:
    """Errors of several answers to the same rows (one for each balance), over the whole stream and fading.

    Args:
        answers: names of the answers, for instance `["0", "1"]` for two balances.
        fading: weight that the fading window keeps per row; 0.9999 forgets half in 6,931 rows.
        device: where predictions are.
    """

    def __init__(self, answers: Sequence[str], fading: float, device: torch.device) -> None:
        self.answers = (*answers, MEDIAN)
        self.fading = fading
        # Rows of `sums`: rows, rows inside their interval, log score, then absolute and squared error of each answer.
        rows = ERRORS + 2 * len(self.answers)
        self.sums = torch.zeros(len(WINDOWS), rows, CELLS, dtype=torch.float64, device=device)
        self.low, self.high = math.inf, -math.inf  # range of the labels seen
        self.origin, self.width = 0.0, 0.0  # the grid: cell i covers origin + [i, i + 1) width

    @torch.no_grad()
    def observe(
        self, label: NDArray[np.float64], predictions: Mapping[str, Tensor], covered: Tensor, log_score: Tensor
    ) -> None:
        """Takes in rows that were predicted and not yet learned from; all of it finite.

        Args:
            label: (B,) on the host, label units.
            predictions: of each answer (B,), on the device, label units; the running median (`MEDIAN`) is one.
            covered: (B,) bool, whether the label lay in its interval.
            log_score: (B,) log density of the label, natural logs per label unit.
        """
        if not len(label):
            return
        self._cover(float(label.min()), float(label.max()))
        device = self.sums.device
        cells = torch.from_numpy(self._cells(label)).to(device, non_blocking=True)
        truth = torch.from_numpy(label).to(device, non_blocking=True)
        stacked = torch.stack([predictions[name].double() for name in self.answers])
        error = (stacked - truth).abs()
        others = torch.stack([torch.ones_like(error[0]), covered.double(), log_score.double()])
        values = torch.cat([others, torch.stack([error, error.square()], 1).flatten(0, 1)])
        self.sums[1] *= self.fading ** len(label)
        if device.type == "cpu":
            self.sums.index_add_(2, cells, values.expand(2, -1, -1))
        else:  # in an order of its own each time, where this always adds up in the same one
            rows = torch.arange(len(values), device=device)[:, None]
            for window in self.sums:
                window.index_put_((rows, cells), values, accumulate=True)

    def compute(self) -> dict[str, Any]:
        """All metrics: `{window: {rows, coverage, log_score, answer: {mae, rmse, balanced_mae, ...}, regions}}`.

        Errors are in label units, the log score in natural logs per label unit; a metric without rows is None.
        `regions` are the bins of the balanced error, `{low, high, rows: [...], answer: [its mean absolute errors]}`,
        with None for an error of too few rows; absent before the first row. Reads the sums off the device.
        """
        sums = self.sums.cpu().numpy()
        return {window: self._window(sums[i]) for i, window in enumerate(WINDOWS)}

    def _window(self, sums: NDArray[np.float64]) -> dict[str, Any]:
        count = sums[0]
        result: dict[str, Any] = {
            "rows": float(count.sum()),
            "coverage": _ratio(sums[1].sum(), count.sum()),
            "log_score": _ratio(sums[2].sum(), count.sum()),
        }
        if not self.width:
            return result
        centres = self.origin + (np.arange(CELLS) + 0.5) * self.width
        bin_width = (self.high - self.low) / BINS or 1.0
        bins = np.clip(((centres - self.low) / bin_width).astype(np.int64), 0, BINS - 1)
        rows = np.bincount(bins, count, BINS)
        share = rows / max(rows.sum(), 1e-300)
        shots = {
            "many": share >= MANY_SHARE,
            "medium": (share < MANY_SHARE) & (share >= MEDIUM_SHARE),
            "few": (share < MEDIUM_SHARE) & (rows > 0),
        }
        enough = rows >= LEAST_ROWS - 1e-6
        regions: dict[str, Any] = {"low": self.low, "high": self.high, "rows": _shown(rows)}
        for i, answer in enumerate(self.answers):
            absolute, squared = sums[ERRORS + 2 * i], sums[ERRORS + 1 + 2 * i]
            by_bin = np.bincount(bins, absolute, BINS)
            regions[answer] = _shown(np.divide(by_bin, rows, out=np.full(BINS, np.nan), where=enough))
            result[answer] = {
                "mae": _ratio(absolute.sum(), count.sum()),
                "rmse": None if count.sum() <= 0 else math.sqrt(squared.sum() / count.sum()),
                "balanced_mae": float((by_bin[enough] / rows[enough]).mean()) if enough.any() else None,
                **{f"mae_{name}": _ratio(by_bin[of].sum(), rows[of].sum()) for name, of in shots.items()},
            }
        return {**result, "regions": regions}

    def _cells(self, label: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.floor((label - self.origin) / self.width).astype(np.int64).clip(0, CELLS - 1)

    def _cover(self, low: float, high: float) -> None:
        """Makes the grid span the labels: widths are powers of two, so coarser cells are unions of finer ones."""
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.width and self.origin <= self.low and self.high < self.origin + CELLS * self.width:
            return
        # Twice the range seen, so that a growing range is not followed cell by cell.
        span = max(self.high - self.low, 1e-12 * max(abs(self.low), abs(self.high)), 1e-12)
        width = max(self.width, 2.0 ** math.ceil(math.log2(2 * span / CELLS)))
        origin = math.floor((self.low + self.high) / 2 / width - CELLS / 2) * width
        if self.width:
            old = self.origin + (np.arange(CELLS) + 0.5) * self.width
            index = np.floor((old - origin) / width).astype(np.int64).clip(0, CELLS - 1)
            moved = torch.zeros_like(self.sums)
            self.sums = moved.index_add_(2, torch.from_numpy(index).to(self.sums.device, non_blocking=True), self.sums)
        self.origin, self.width = origin, width

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the sums and the grid."""
        grid = torch.tensor([self.low, self.high, self.origin, self.width], dtype=torch.float64)
        return {"sums": self.sums.clone(), "grid": grid}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave."""
        self.sums.copy_(state["sums"])
        self.low, self.high, self.origin, self.width = state["grid"].tolist()


def _ratio(total: float, count: float) -> float | None:
    return float(total / count) if count > 0 else None


def _shown(values: NDArray[Any]) -> list[float | None]:
    """Numbers as a chart needs them, of few digits: manifests have hundreds and are written twice a second."""
    return [None if math.isnan(value) else float(f"{value:.5g}") for value in values.tolist()]
