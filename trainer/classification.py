"""Classification: classes that come with the stream, losses for long tails, answers under any prior."""

import copy
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.batching import Batch
from trainer.class_calibration import LogitCalibration
from trainer.class_metrics import MAJORITY, ClassMetrics, true_log_probability
from trainer.class_model import (
    COUNTS_DECAY,
    Logits,
    build_class_model,
    classifier_state,
    names_from_tensor,
    names_to_tensor,
)
from trainer.class_predictive import ClassPriors, class_log_probabilities
from trainer.config import Settings
from trainer.losses import (
    StreamIBLoss,
    cross_entropy_loss,
    effective_number_weights,
    focal_loss,
    inverse_count_weights,
    logit_adjusted_loss,
)
from trainer.model import averaged_state, load_averaged, unprefixed
from trainer.prequential import BALANCES
from trainer.schema import FeatureSchema
from trainer.task import FORGETTING, Compared, Noise, Predicted, Tested

CALIBRATED: Final = ("focal", "influence_balanced")  # losses of which theory does not say what their logits carry
HEALTHY_RATIO: Final = 1.05  # largest share of wrong answers beside that of always answering the majority
HEALTHY_MARGIN: Final = 0.01  # added to that: where nearly all rows are of one class it is nearly never wrong


class ClassResult(NamedTuple):
    """What was predicted for B rows before they were learned from."""

    logits: Tensor  # (B, C), of the weights that answer
    priors: ClassPriors


class Classification:
    """Labels are classes by their numbers; the head has an output for each class seen or listed.

    Attributes:
        model: the current weights, with the running scalers and the class counts.
        averaged: the same network with averaged weights; scalers and counts are the model's own.
        names: of the classes, by number.
        prequential: metrics of each answer.
    """

    def __init__(self, settings: Settings, schema: FeatureSchema, device: torch.device) -> None:
        assert schema.classes is not None
        self._learner = settings.learner
        self._schema = schema
        self._device = device
        self.model = build_class_model(schema, settings.model).to(device)
        self.averaged = copy.deepcopy(self.model)
        self.averaged.features, self.averaged.labels = self.model.features, self.model.labels
        self.averaged.eval()
        self.phases = StreamIBLoss(self._learner.influence_after).to(device)
        self.calibration = LogitCalibration().to(device)
        answers = [*(f"{b:g}" for b in BALANCES), MAJORITY]
        self.prequential = ClassMetrics(answers, settings.learner.metrics_fading, device)
        self.names: list[str] = []
        self._add(settings.record_schema.classes)

    def sigma_parameters(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """None: a classifier has no sigma."""
        return []

    def grow(self, batch: Batch) -> bool:
        """Makes room for the classes that a batch brings; says whether the networks' weights are new ones."""
        if not batch.new_classes:
            return False
        self._add(batch.new_classes)
        return True

    def _add(self, names: Sequence[str]) -> None:
        self.names += names
        self.model.grow(len(self.names))
        self.averaged.head.grow(len(self.names))  # the counts are the model's own
        self.prequential.grow(len(self.names))

    @torch.no_grad()
    def predict(self, numeric: Tensor, categorical: Tensor, label: Tensor, averaged_is_better: Tensor) -> Predicted:
        """Predicts rows not yet learned from; see `Task.predict`. The columns are two log scores and the logits."""
        target, priors = label.long(), self._priors()
        both: list[Tensor] = []
        scores = []
        self.model.eval()
        columns = self.model.features(numeric)
        for model in (self.model, self.averaged):
            both.append(model.classify(columns, categorical).values)
            natural = class_log_probabilities(both[-1], priors, 0.0)
            scores.append(true_log_probability(natural, target))
        logits = torch.where(averaged_is_better, both[1], both[0])
        return Predicted(ClassResult(logits, priors), torch.cat([torch.stack(scores, 1), logits], 1))

    def score(self, columns: Tensor, label: Tensor, host_label: NDArray[np.float64]) -> Tested:
        """Takes the errors of predicted rows into the metrics; see `Task.score`."""
        target, priors = label.long(), self._priors()
        scores, logits = columns[:, :2], columns[:, 2:]
        answers = {f"{b:g}": class_log_probabilities(logits, priors, b) for b in BALANCES}
        answers[MAJORITY] = priors.log_stream.expand_as(logits)
        self.prequential.observe(target, answers)
        if self._learner.loss in CALIBRATED:
            self.calibration.observe(logits, priors.log_stream, priors.seen, target)
        missing = 1 - true_log_probability(answers["0"], target).exp()
        return Tested(answers["0"].argmax(1), scores.double().mean(0), missing)

    def observe(self, numeric: Tensor, label: Tensor, host_label: NDArray[np.float64], batches: int) -> None:
        """Takes rows into the running statistics."""
        self.model.features.observe(numeric)
        self.model.labels.observe(label.long())
        self.phases.observe(len(label))

    def forget(self, fast: bool) -> None:
        """The window of the class counts, as ever or `fast`."""
        self.model.labels.decay = COUNTS_DECAY**FORGETTING if fast else COUNTS_DECAY

    def columns(self, numeric: Tensor) -> Tensor:
        """Standardised columns; see `Task.columns`."""
        columns: Tensor = self.model.features(numeric)
        return columns

    def targets(self, label: Tensor) -> Tensor:
        """(B,) int64, the numbers of the classes."""
        return label.long()

    def loss(
        self, columns: Tensor, categorical: Tensor, target: Tensor, memory: Tensor, memory_weight: float
    ) -> tuple[Logits, Tensor]:
        """The logits of B rows, and the configured loss."""
        logits = self.model.classify(columns, categorical)
        return logits, self._loss_of(logits, target)

    def _loss_of(self, logits: Logits, target: Tensor) -> Tensor:
        counts = self.model.labels
        # A class that was only listed is no answer yet, so nothing is to be learned against it.
        values = logits.values.masked_fill(counts.counts == 0, torch.finfo(logits.values.dtype).min)
        match self._learner.loss:
            case "cross_entropy":
                return cross_entropy_loss(values, target)
            case "class_balanced":
                return cross_entropy_loss(values, target, class_weights=self._class_weights())
            case "focal":
                return focal_loss(values, target, gamma=self._learner.focal_gamma)
            case "influence_balanced":
                return self.phases.forward(values, target, logits.features, self._class_weights())
            case _:
                return logit_adjusted_loss(values, target, counts.log_prior())

    def _class_weights(self) -> Tensor:
        """(C,) float32, by the counts with their floor."""
        counts = self.model.labels.counts.clamp(min=self.model.labels.floor)
        weigh = effective_number_weights if self._learner.class_weights == "effective" else inverse_count_weights
        return weigh(counts).float()

    def _priors(self) -> ClassPriors:
        """The stream's prior and the one that logits carry, as of now."""
        log_stream, counts = self.model.labels.log_prior(), self.model.labels.counts
        scale = torch.ones((), device=self._device)
        match self._learner.loss:
            case "logit_adjusted":
                log_learned = torch.zeros_like(log_stream)
            case "cross_entropy":
                log_learned = log_stream
            case "class_balanced":
                log_learned = log_stream + self._class_weights().log()
            case _:
                scale, tilt = self.calibration.fitted.float().unbind()
                log_learned = (1 - tilt) * log_stream
        return ClassPriors(log_stream, log_learned, scale, counts > 0)

    @property
    def compared(self) -> Compared:
        """None: classes are counted."""
        return "none"

    def running(self) -> list[Tensor]:
        """What tells the phases of the influence-balanced loss."""
        phases = self.phases
        return [phases.steps, phases.plain, phases.plain_before, phases.raw]

    def metrics(self) -> dict[str, Any]:
        """`ClassMetrics.compute`."""
        return self.prequential.compute()

    def noise(self, averaged: bool) -> Noise | None:
        """None: a classifier has no sigma."""
        return None

    def is_healthy(self, errors: dict[str, Any], noise: Noise | None) -> bool:
        """Whether answers are not clearly more often wrong than the most frequent class would be."""
        wrong, wrong_majority = 1 - errors["0"]["accuracy"], 1 - errors[MAJORITY]["accuracy"]
        return bool(wrong <= HEALTHY_RATIO * wrong_majority + HEALTHY_MARGIN)

    def shown(self, labels: list[float]) -> list[str]:
        """Classes by their names."""
        return [self.names[int(number)] for number in labels]

    def inference_state(self, averaged: bool) -> dict[str, Tensor]:
        """What predicting needs: the weights, the scalers, the classes and their priors."""
        return classifier_state(self.averaged if averaged else self.model, self.names, self._priors())

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """All state, by part."""
        return {
            "model": self.model.state_dict(),
            "averaged": averaged_state(self.averaged),
            "classes": {"names": names_to_tensor(self.names)},
            "phases": self.phases.state_dict(),
            "calibration": self.calibration.state_dict(),
            "prequential": self.prequential.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave; the schema goes on counting classes from there.

        Raises:
            KeyError, RuntimeError: it is of another model.
        """
        names = names_from_tensor(state["classes.names"])
        self._add(names[len(self.names) :])
        self.names = names
        self.model.load_state_dict(unprefixed("model", state))
        load_averaged(unprefixed("averaged", state), self.averaged)
        self.phases.load_state_dict(unprefixed("phases", state))
        self.calibration.load_state_dict(unprefixed("calibration", state))
        self.prequential.load_state_dict(unprefixed("prequential", state))
        assert self._schema.classes is not None
        self._schema.classes.restore(names)
