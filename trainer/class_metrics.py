"""Test-then-train metrics of classes, over the whole stream and fading; what `trainer.prequential` is for numbers.

Rows and right answers are counted by class, so that recalls, and with them all that weighs classes alike, can be had at
any time. All sums stay on the model's device; only `compute` waits for it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.prequential import MANY_SHARE, MEDIUM_SHARE, WINDOWS

MAJORITY: Final = "majority"  # always the class most often seen, its probabilities the shares of the classes
CONFIDENCE_BINS: Final = 15  # of equal width, for the calibration error
LEAST_ROWS: Final = 0.5  # a class of which less is left in the fading window says nothing
LEAST_LOG_PROBABILITY: Final = -20.0  # so that one class that nobody could know does not make a log loss infinite
RECALLS: Final = {"many": "recall_many", "medium": "recall_medium", "few": "recall_few"}  # as in `SHOTS`
SHOWN: Final = {
    "accuracy": "Share of rows answered right",
    "macro_recall": "Mean over classes of the share answered right",
    "g_mean": "Geometric mean over classes of the share answered right",
    "log_loss": "Mean of -log of the true class's probability, nats",
    "calibration_error": "Expected calibration error of the probability of what is answered",
}


class ClassMetrics:
    """Metrics of several answers to the same rows (one for each balance).

    Args:
        answers: their names.
        fading: weight that the fading window keeps per row.
        device: where probabilities are.
    """

    def __init__(self, answers: Sequence[str], fading: float, device: torch.device) -> None:
        self.answers = tuple(answers)
        self.fading = fading
        windows, count = len(WINDOWS), len(self.answers)
        # By class: rows, then right answers of each answer.
        self.by_class = torch.zeros(windows, 1 + count, 0, dtype=torch.float64, device=device)
        self.log_loss = torch.zeros(windows, count, dtype=torch.float64, device=device)
        # By bin of the confidence: rows, right answers, confidence.
        self.by_confidence = torch.zeros(windows, count, 3, CONFIDENCE_BINS, dtype=torch.float64, device=device)

    def grow(self, classes: int) -> None:
        """Makes room for classes up to a number."""
        more = classes - self.by_class.shape[2]
        self.by_class = torch.nn.functional.pad(self.by_class, (0, more))

    @torch.no_grad()
    def observe(self, target: Tensor, log_probabilities: Mapping[str, Tensor]) -> None:
        """Takes in rows that were predicted and not yet learned from.

        Args:
            target: (B,) int64 classes, all of which there is room for.
            log_probabilities: of each answer (B, C); classes that the model did not know yet may be missing.
        """
        right, confidence, log_loss = [], [], []
        for name in self.answers:
            answer = log_probabilities[name]
            top, chosen = answer.max(1)
            right.append((chosen == target).double())
            confidence.append(top.exp().double())
            log_loss.append(-true_log_probability(answer, target).double())
        correct, sure = torch.stack(right), torch.stack(confidence)  # (A, B)
        bins = (sure * CONFIDENCE_BINS).long().clamp(0, CONFIDENCE_BINS - 1)
        values = torch.stack([torch.ones_like(sure), correct, sure], 1)  # (A, 3, B)
        places = bins[:, None].expand_as(values)
        for sums in (self.by_class, self.log_loss, self.by_confidence):
            sums[1] *= self.fading ** len(target)
        counted = torch.cat([torch.ones_like(correct[:1]), correct])
        self.by_class.index_add_(2, target, counted.expand(len(WINDOWS), -1, -1))
        self.log_loss += torch.stack(log_loss).sum(1)
        self.by_confidence += torch.zeros_like(self.by_confidence[0]).scatter_add_(2, places, values)

    def compute(self) -> dict[str, Any]:
        """All metrics: `{window: {rows, classes, log_score, answer: {accuracy, macro_recall, g_mean, ...}}}`.

        The log score is that of the first answer, in nats; a metric without rows is None. Reads the sums off the
        device.
        """
        by_class, log_loss, by_confidence = (
            sums.cpu().numpy() for sums in (self.by_class, self.log_loss, self.by_confidence)
        )
        return {window: self._window(by_class[i], log_loss[i], by_confidence[i]) for i, window in enumerate(WINDOWS)}

    def _window(
        self, by_class: NDArray[np.float64], log_loss: NDArray[np.float64], by_confidence: NDArray[np.float64]
    ) -> dict[str, Any]:
        rows, total = by_class[0], float(by_class[0].sum())
        here = rows >= LEAST_ROWS
        result: dict[str, Any] = {
            "rows": total,
            "classes": int(here.sum()),
            "log_score": -float(log_loss[0]) / total if total else None,
        }
        if not total:
            return result
        share = rows / total
        regions = {
            "many": here & (share >= MANY_SHARE),
            "medium": here & (share < MANY_SHARE) & (share >= MEDIUM_SHARE),
            "few": here & (share < MEDIUM_SHARE),
        }
        for i, answer in enumerate(self.answers):
            recall = by_class[1 + i] / np.where(here, rows, 1.0)
            binned, right, sure = by_confidence[i]
            result[answer] = {
                "accuracy": float(by_class[1 + i].sum()) / total,
                "macro_recall": _mean(recall[here]),
                "g_mean": _geometric_mean(recall[here]),
                **{RECALLS[shots]: _mean(recall[of]) for shots, of in regions.items()},
                "log_loss": float(log_loss[i]) / total,
                "calibration_error": float(np.abs(right - sure).sum() / binned.sum()),
            }
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the sums."""
        return {
            "by_class": self.by_class.clone(),
            "log_loss": self.log_loss.clone(),
            "by_confidence": self.by_confidence.clone(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave."""
        self.by_class = state["by_class"].to(self.by_class.device, copy=True)
        self.log_loss.copy_(state["log_loss"])
        self.by_confidence.copy_(state["by_confidence"])


def true_log_probability(log_probabilities: Tensor, target: Tensor) -> Tensor:
    """What was said of the true classes: (B,) from (B, C) and (B,), no less than e^-20 where it was ruled out."""
    known = target < log_probabilities.shape[1]
    said = log_probabilities.gather(1, torch.where(known, target, 0)[:, None])[:, 0]
    return torch.where(known, said, -torch.inf).clamp_min(LEAST_LOG_PROBABILITY)


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(values.mean()) if len(values) else None


def _geometric_mean(recalls: NDArray[np.float64]) -> float | None:
    """0 as soon as one class is never right."""
    if not len(recalls):
        return None
    return math.exp(float(np.log(recalls).mean())) if recalls.all() else 0.0
