"""Prequential evaluation of classes over a file; what `trainer.evaluation` is for numbers."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from trainer.batching import Batch
from trainer.class_metrics import ClassMetrics
from trainer.class_predictive import class_log_probabilities
from trainer.config import Settings
from trainer.evaluation import Curves, Stopwatch, learned
from trainer.learner import Learner
from trainer.schema import FeatureSchema


class ClassAnswers(NamedTuple):
    """What became of one run: every row was predicted before it was learned from."""

    metrics: ClassMetrics  # of an answer for each balance
    names: Sequence[str]  # of the classes, by number
    rows_per_second: float  # predicted at the trainer's balances and learned from

    def summary(self, balance: float) -> dict[str, float | None]:
        """Metrics at one balance over the whole file."""
        found: dict[str, float | None] = self.metrics.compute()["whole"][f"{balance:g}"]
        log_loss = found["log_loss"]
        return {**found, "log_score": None if log_loss is None else -log_loss}

    def curves(self, regions: int) -> Curves:
        """Recall by class, from the most common one; of more classes than `regions`, the most common."""
        rows, *right = self.metrics.by_class[0].cpu().numpy()
        order = [number for number in (-rows).argsort(kind="stable")[:regions] if rows[number]]
        recalls = {
            float(name): (of / rows.clip(1))[order] for name, of in zip(self.metrics.answers, right, strict=True)
        }
        return Curves("recall", [self.names[number] for number in order], recalls, rows[order])


def run_classes(
    settings: Settings,
    schema: FeatureSchema,
    batches: Iterable[Batch],
    balances: Sequence[float],
    device: torch.device,
    progress: Callable[[int], None],
) -> ClassAnswers:
    """Learns from batches in order and counts what was predicted; the arguments are those of `evaluation.run`."""
    learner = Learner(settings, schema, device)
    metrics = ClassMetrics([f"{balance:g}" for balance in balances], settings.learner.metrics_fading, device)
    names = list(settings.record_schema.classes)
    watch = Stopwatch()
    for batch in batches:
        names += batch.new_classes
        metrics.grow(len(names))
        for tested, result in learned(learner, [batch], watch, progress):
            answers = {f"{b:g}": class_log_probabilities(result.logits, result.priors, b) for b in balances}
            metrics.observe(torch.from_numpy(tested.label).to(device).long(), answers)
    return ClassAnswers(metrics, names, watch.rows_per_second)
