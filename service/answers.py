"""From a forward pass to what requests are told: the one place where serving depends on what a label is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol, Self, TypeVar

from torch import Tensor

from service.passes import CHOICES, Passes, passes_of
from trainer.calibration import LevelCalibration
from trainer.class_model import ClassModel, build_class_model, load_classifier
from trainer.class_predictive import ClassPriors, class_log_probabilities
from trainer.config import Settings
from trainer.label_density import LabelGrid
from trainer.model import Model, build_model, frozen, learned_prior, load_inference
from trainer.predictive import Components, LearnedPrior, Point, Predictive, TiltedGrid, cell_probabilities, predict
from trainer.schema import FeatureSchema

MOST_KEPT: Final = 64  # balances, and intervals at them, that are ready for the next request

Key = TypeVar("Key")
Value = TypeVar("Value")


class Asked(NamedTuple):
    """What is asked about rows."""

    balance: float  # label prior of the answer: 0 the stream's own, 1 all labels alike
    interval: float | None = None  # probability of a central interval, None for none; of numbers alone
    point: Point = "median"  # of numbers alone
    top: int | None = None  # how many classes are told the probability of, from the most probable; None for all


class ClassPredictive(NamedTuple):
    """Answers for B rows."""

    label: Tensor  # (B,) int64 class
    probabilities: Tensor  # (B, C) float64


class Answering(Protocol):
    """What a loaded model answers with; `Any` is the task's own form of a forward pass's outputs."""

    @property
    def passes(self) -> Passes:
        """How rows go through the network."""

    def outputs(self, numeric: Tensor, categorical: Tensor) -> Any:
        """What the network says of rows (B, F) and (B, C)."""

    def select(self, outputs: Any, rows: Tensor) -> Any:
        """The outputs of some rows, by their places."""

    def answer(self, outputs: Any, rows: int, asked: Asked) -> Any:
        """The answer for the first rows."""

    def lists(self, answer: Any, asked: Asked) -> Mapping[str, Sequence[Any]]:
        """An answer as the fields of a response, each with a value for each row."""


@dataclass(frozen=True)
class NumberAnswering:
    """Labels are numbers: point and interval from a density, under any label prior."""

    model: Model
    grid: LabelGrid
    calibration: LevelCalibration
    learned_prior: LearnedPrior
    # Of the label, in its own units; and what requests that ask for the same need alike. None of it changes.
    mean: Tensor
    sd: Tensor
    passes: Passes = CHOICES[0]
    tilts: dict[float, TiltedGrid] = field(default_factory=dict)  # by balance
    ends: dict[tuple[float, float], Tensor] = field(default_factory=dict)  # by interval and balance

    @classmethod
    def fresh(cls, schema: FeatureSchema, settings: Settings) -> Self:
        """Of a model that has learned nothing."""
        model = build_model(schema, settings.model, settings.learner)
        prior = learned_prior(settings.learner.loss)
        return cls(model, LabelGrid.empty(), LevelCalibration(), prior, model.labels.mean, model.labels.sd)

    def loaded(self, state: dict[str, Tensor], buckets: tuple[int, ...]) -> Self:
        """With the state of a snapshot, which fills the model at hand; `buckets` are the schema's."""
        grid = load_inference(state, self.model, self.calibration)
        model = frozen(self.model)
        passes, labels = passes_of(model, buckets), model.labels
        return type(self)(model, grid, self.calibration, self.learned_prior, labels.mean, labels.sd, passes)

    def outputs(self, numeric: Tensor, categorical: Tensor) -> Components:
        """The head's density for rows."""
        mixture = self.passes.run(self.model, numeric, categorical)
        return Components(mixture.log_weights, mixture.means, mixture.log_scales.exp(), self.mean, self.sd)

    def select(self, outputs: Components, rows: Tensor) -> Components:
        """The density of some rows."""
        return Components(
            outputs.log_weights[rows],
            outputs.means[rows],
            outputs.scales[rows],
            outputs.label_mean,
            outputs.label_sd,
        )

    def answer(self, outputs: Components, rows: int, asked: Asked) -> Predictive:
        """Points and intervals of the first rows, label units."""
        if not len(self.grid):
            answer = predict(
                outputs,
                self.grid,
                learned_prior=self.learned_prior,
                balance=asked.balance,
                point=asked.point,
                interval=asked.interval,
            )
        else:
            ends = None if asked.interval is None else self._ends(asked.interval, asked.balance)
            answer = self._tilted(asked.balance).predict(outputs, asked.point, ends)
        if answer.lower is None or answer.upper is None:
            return Predictive(answer.point[:rows])
        return Predictive(answer.point[:rows], answer.lower[:rows], answer.upper[:rows])

    def lists(self, answer: Predictive, asked: Asked) -> dict[str, list[float]]:
        """Points, and the ends of intervals where they were asked for."""
        columns = {"predictions": answer.point, "lower": answer.lower, "upper": answer.upper}
        return {name: column.tolist() for name, column in columns.items() if column is not None}

    def cells(self, outputs: Components, balance: float) -> Tensor:
        """The probability of each cell of the grid: (B, G), rows summing to 1."""
        return cell_probabilities(outputs, self.grid, learned_prior=self.learned_prior, balance=balance)

    def _tilted(self, balance: float) -> TiltedGrid:
        found = self.tilts.get(balance)
        if found is None:
            found = TiltedGrid.of(self.grid, self.mean, self.sd, self.learned_prior, balance)
            _keep(self.tilts, balance, found)
        return found

    def _ends(self, interval: float, balance: float) -> Tensor:
        """The levels of the ends of an interval, as what happened on the stream has calibrated them."""
        found = self.ends.get((interval, balance))
        if found is None:
            found = self.calibration.ends(interval, balance).float()
            _keep(self.ends, (interval, balance), found)
        return found


def _keep(known: dict[Key, Value], key: Key, value: Value) -> None:
    """Keeps a value for requests that ask for the same; of many that all differ, not too many."""
    if len(known) >= MOST_KEPT:
        known.clear()
    known[key] = value


@dataclass(frozen=True)
class ClassAnswering:
    """Labels are classes: the most probable one and the probabilities, under any label prior."""

    model: ClassModel
    names: Sequence[str]
    priors: ClassPriors | None
    passes: Passes = CHOICES[0]

    @classmethod
    def fresh(cls, schema: FeatureSchema, settings: Settings) -> Self:
        """Of a model that has learned nothing."""
        return cls(build_class_model(schema, settings.model), (), None)

    def loaded(self, state: dict[str, Tensor], buckets: tuple[int, ...]) -> Self:
        """With the state of a snapshot, which fills the model at hand; `buckets` are the schema's."""
        names, priors = load_classifier(state, self.model)
        model = frozen(self.model)
        return type(self)(model, names, priors, passes_of(model, buckets))

    def outputs(self, numeric: Tensor, categorical: Tensor) -> Tensor:
        """Logits (B, C)."""
        logits: Tensor = self.passes.run(self.model, numeric, categorical).values
        return logits

    def select(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """The logits of some rows."""
        return outputs[rows]

    def answer(self, outputs: Tensor, rows: int, asked: Asked) -> ClassPredictive:
        """Labels and probabilities of the first rows."""
        assert self.priors is not None
        probabilities = class_log_probabilities(outputs.double(), self.priors, asked.balance).exp()[:rows]
        return ClassPredictive(probabilities.argmax(1), probabilities)

    def lists(self, answer: ClassPredictive, asked: Asked) -> dict[str, list[Any]]:
        """Names of the labels, and probabilities by name from the most probable; classes never seen have none."""
        assert self.priors is not None
        count = int(self.priors.seen.sum())
        top, order = answer.probabilities.sort(stable=True, dim=1, descending=True)
        told = slice(min(asked.top or count, count))
        return {
            "predictions": [self.names[number] for number in answer.label.tolist()],
            "probabilities": [
                {self.names[number]: p for number, p in zip(numbers, of, strict=True)}
                for numbers, of in zip(order[:, told].tolist(), top[:, told].tolist(), strict=True)
            ],
        }


def fresh_answering(schema: FeatureSchema, settings: Settings) -> NumberAnswering | ClassAnswering:
    """What answers for the configuration's task, with a model that has learned nothing.

    Raises:
        ConfigError: a body of the user's own cannot be used.
    """
    return (ClassAnswering if settings.task == "classification" else NumberAnswering).fresh(schema, settings)
