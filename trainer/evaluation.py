"""Prequential evaluation of a learner over a file: the trainer's own learner, no broker, exact metrics."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.batching import Batch
from trainer.config import Settings
from trainer.learner import Learner
from trainer.prequential import BINS, LEAST_ROWS
from trainer.schema import FeatureSchema

GAUSSIAN_ONLY: Final = ("gai", "bni", "mse", "l1", "huber")
Floats = NDArray[np.float64]


class Answers(NamedTuple):
    """Predictions of one run, each made before its row was learned from; label units."""

    label: Floats  # (N,)
    median: Mapping[float, Floats]  # by balance, (N,)
    mean: Mapping[float, Floats]  # by balance, (N,)
    log_score: Floats  # (N,) at balance 0
    covered: NDArray[np.bool_]  # (N,) whether the label lay in its 90% interval at balance 0
    rows_per_second: float  # predicted at the trainer's balances and learned from

    def summary(self, balance: float) -> dict[str, float | None]:
        """Metrics at one balance: medians for absolute errors, means for the squared one; label units."""
        label = self.label
        error = np.abs(label - self.median[balance])
        squared = np.square(label - self.mean[balance])
        return {
            "mae": float(error.mean()),
            "rmse": float(np.sqrt(squared.mean())),
            "balanced_mae": balanced_mae(label, error),
            "mae_top_1_percent": float(error[label >= np.quantile(label, 0.99)].mean()),
            "mae_top_5_percent": float(error[label >= np.quantile(label, 0.95)].mean()),
            "log_score": float(self.log_score.mean()),
            "coverage_second_half": float(self.covered[len(label) // 2 :].mean()),
            "constant_balanced_mae": constant_balanced_mae(label),
        }

    def curves(self, regions: int) -> "Curves":
        """Mean absolute error by equal-width label region."""
        values: dict[float, Floats] = {}
        for balance, median in self.median.items():
            middles, values[balance], rows = error_by_region(self.label, abs(self.label - median), regions)
        return Curves("mean absolute error", middles, values, rows)


class Curves(NamedTuple):
    """How good the answers are by what the label is."""

    measure: str
    places: Sequence[str] | Floats  # of the labels
    values: Mapping[float, Floats]  # by balance
    rows: Floats


class Stopwatch:
    """How fast rows are learned from, whatever else is done with them.

    Attributes:
        rows: learned from.
        seconds: that it took to predict them at the trainer's balances and to learn from them.
    """

    def __init__(self) -> None:
        self.rows, self.seconds = 0, 0.0

    @property
    def rows_per_second(self) -> float:
        """Rows a second so far."""
        return self.rows / max(self.seconds, 1e-9)


def learned(
    learner: Learner, batches: Iterable[Batch], watch: Stopwatch, progress: Callable[[int], None]
) -> Iterator[tuple[Batch, Any]]:
    """Learns from batches in order; yields each that was predicted before, and what the learner's task said of it."""
    for batch in batches:
        began = time.perf_counter()
        result = learner.step(batch)
        while learner.may_replay:  # as in a trainer that always has the time
            learner.replay_when_idle()
        watch.seconds += time.perf_counter() - began
        watch.rows += len(batch)
        progress(len(batch))
        if result is not None:
            yield batch, result


def for_loss(settings: Settings, loss: str) -> Settings:
    """The settings with another loss of the same task, and with the head that it needs."""
    if settings.task == "classification":
        return settings.model_copy(update={"learner": settings.learner.model_copy(update={"loss": loss})})
    head = "gaussian" if loss in GAUSSIAN_ONLY else "mixture" if loss == "nll" else settings.model.head
    return settings.model_copy(
        update={
            "learner": settings.learner.model_copy(update={"loss": loss}),
            "model": settings.model.model_copy(update={"head": head}),
        }
    )


def run(
    settings: Settings,
    schema: FeatureSchema,
    batches: Iterable[Batch],
    balances: Sequence[float],
    device: torch.device,
    progress: Callable[[int], None],
) -> Answers:
    """Learns from batches in order and keeps what was predicted.

    Args:
        settings: loss, head, seed and all the rest.
        schema: what the batches were decoded by.
        batches: of one file.
        balances: label priors to answer at.
        device: to learn on.
        progress: told the rows of each batch.
    """
    learner = Learner(settings, schema, device)
    labels, scores, covered = [], [], []
    medians: dict[float, list[Floats]] = {balance: [] for balance in balances}
    means: dict[float, list[Floats]] = {balance: [] for balance in balances}
    watch = Stopwatch()
    for batch, result in learned(learner, batches, watch, progress):
        labels.append(batch.label)
        scores.append(result.log_score.double().cpu().numpy())
        covered.append(result.covered.cpu().numpy())
        for balance in balances:
            medians[balance].append(result.density.answer(balance).point.cpu().numpy())
            means[balance].append(result.density.answer(balance, point="mean").point.cpu().numpy())
    return Answers(
        _joined(labels),
        {balance: _joined(parts) for balance, parts in medians.items()},
        {balance: _joined(parts) for balance, parts in means.items()},
        _joined(scores),
        np.concatenate(covered) if covered else np.zeros(0, dtype=bool),
        watch.rows_per_second,
    )


def balanced_mae(label: Floats, error: Floats) -> float | None:
    """Mean over 50 equal-width bins of the label range of each bin's mean absolute error.

    Args:
        label: (N,).
        error: (N,) absolute errors.

    Returns:
        The mean over bins with at least 10 rows; None where there is no such bin.
    """
    bins, rows = _bins(label)
    enough = rows >= LEAST_ROWS
    sums = np.bincount(bins, error, BINS)
    return float((sums[enough] / rows[enough]).mean()) if enough.any() else None


def constant_balanced_mae(label: Floats) -> float | None:
    """Balanced MAE of the best constant answer, chosen in hindsight: a median with weights 1 / (rows of the bin)."""
    bins, rows = _bins(label)
    weight = np.where(rows[bins] >= LEAST_ROWS, 1.0 / rows[bins], 0.0)
    if not weight.any():
        return None
    order = np.argsort(label, kind="stable")
    cumulative = weight[order].cumsum()
    best = label[order][np.searchsorted(cumulative, cumulative[-1] / 2)]
    return balanced_mae(label, np.abs(label - best))


def error_by_region(label: Floats, error: Floats, regions: int) -> tuple[Floats, Floats, Floats]:
    """Mean absolute error by equal-width label region: middles, errors, rows; regions under 10 rows are left out."""
    edges = np.linspace(label.min(), label.max(), regions + 1)
    index = np.clip(np.searchsorted(edges, label, side="right") - 1, 0, regions - 1)
    rows = np.bincount(index, minlength=regions).astype(np.float64)
    enough = rows >= LEAST_ROWS
    mean = np.bincount(index, error, regions)[enough] / rows[enough]
    return ((edges[1:] + edges[:-1]) / 2)[enough], mean, rows[enough]


def averaged(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Means over seeds of every metric; None where a run has none."""
    names = [name for name, value in runs[0].items() if isinstance(value, float) or value is None]
    columns = {name: [run[name] for run in runs] for name in names}
    return {name: None if None in values else float(np.mean(values)) for name, values in columns.items()}


def _bins(label: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The bin of each row, (N,), and the rows of each bin, (50,)."""
    width = (label.max() - label.min()) / BINS or 1.0
    bins = np.clip(((label - label.min()) / width).astype(np.int64), 0, BINS - 1)
    return bins, np.bincount(bins, minlength=BINS)


def _joined(parts: Sequence[Floats]) -> Floats:
    return np.concatenate(parts) if parts else np.zeros(0)
