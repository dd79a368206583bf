"""A loaded snapshot that answers: immutable, so that swapping models is one assignment.

An answer depends on nothing but the row, the snapshot and what is asked of it. Matrix kernels differ by size, and some
vector kernels treat the rows at the end of a tensor differently; so every tensor on the way has a multiple of 64 rows.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Final, NamedTuple, Self

import msgspec
import numpy as np
import structlog
import torch

from trainer.calibration import LevelCalibration
from trainer.config import Settings
from trainer.errors import SnapshotError, TailstreamError
from trainer.label_density import LabelGrid
from trainer.model import Model, build_model, learned_prior, load_inference
from trainer.predictive import Components, LearnedPrior, Point, Predictive, predict
from trainer.schema import Columns, FeatureSchema, Row
from trainer.snapshot import Manifest, Snapshot, SnapshotStore, check_fits

PASS_MULTIPLE: Final = 64

log = structlog.stdlib.get_logger(__name__)


class Asked(NamedTuple):
    """What is asked about rows."""

    balance: float  # label prior of the answer: 0 the stream's own, 1 all labels alike
    interval: float | None = None  # probability of a central interval, None for none
    point: Point = "median"


class Question(NamedTuple):
    """The features of one request's rows, and what is asked about them."""

    columns: Columns
    asked: Asked

    @property
    def rows(self) -> int:
        """How many rows."""
        return len(self.columns.numeric)


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one request is answered; lists have a number for each row, in label units."""

    predictions: list[float]
    balance: float
    model_version: int
    lower: list[float] | None = None
    upper: list[float] | None = None


class Predictor:
    """A snapshot's model on the CPU, ready to answer.

    Attributes:
        manifest: what the snapshot says of itself.
    """

    def __init__(
        self, manifest: Manifest, model: Model, grid: LabelGrid, calibration: LevelCalibration, schema: FeatureSchema
    ) -> None:
        self.manifest = manifest
        self._model = model.eval().requires_grad_(False)
        self._grid = grid
        self._calibration = calibration
        self._schema = schema
        self._learned_prior: LearnedPrior = learned_prior(manifest.learner["loss"])

    @classmethod
    def from_snapshot(cls, snapshot: Snapshot, settings: Settings) -> Self:
        """Builds the model that the configuration describes and fills it from the snapshot.

        Raises:
            ConfigError: a body of the user's own cannot be imported.
            KeyError: the label density is not in the snapshot.
            RuntimeError: the tensors do not fit the model.
        """
        schema = FeatureSchema.of(settings)
        model = build_model(schema, settings.model, settings.learner)
        calibration = LevelCalibration()
        grid = load_inference(snapshot.model, model, calibration)
        return cls(snapshot.manifest, model, grid, calibration, schema)

    @property
    def version(self) -> int:
        """The snapshot's version."""
        return self.manifest.version

    def predict(
        self, rows: Sequence[Row], balance: float, interval: float | None = None, point: Point = "median"
    ) -> Predictive:
        """Answers for B rows, in label units."""
        with torch.inference_mode():
            columns = Columns(self._schema.numeric(rows), self._schema.categorical(rows))
            return self._answer(self._components([columns]), len(rows), Asked(balance, interval, point))

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers several requests by one forward pass."""
        with torch.inference_mode():
            components = self._components([question.columns for question in questions])
            places: dict[Asked, list[range]] = {}  # in the pass
            start = 0
            for question in questions:
                end = start + question.rows
                places.setdefault(question.asked, []).append(range(start, end))
                start = end
            if len(places) == 1:
                answered = {asked: _Lists(self._answer(components, start, asked)) for asked in places}
            else:
                answered = {
                    asked: _Lists(self._answer(*_select(components, chain.from_iterable(of)), asked))
                    for asked, of in places.items()
                }
        return [
            answered[question.asked].next(question.rows, balance=question.asked.balance, model_version=self.version)
            for question in questions
        ]

    def _components(self, parts: Sequence[Columns]) -> Components:
        """The head's density for all rows of the parts, and for the rows of missing values that fill up the pass."""
        count = sum(len(part.numeric) for part in parts)
        size = _padded(count)
        numeric = np.full((size, len(self._schema.numeric_columns)), np.nan, dtype=np.float32)
        categorical = np.zeros((size, len(self._schema.buckets)), dtype=np.int64)
        np.concatenate([part.numeric for part in parts], out=numeric[:count])
        np.concatenate([part.categorical for part in parts], out=categorical[:count])
        return self._model.components(self._model(torch.from_numpy(numeric), torch.from_numpy(categorical)))

    def _levels(self, asked: Asked) -> tuple[float, float] | None:
        """The levels of the ends of the interval asked for, as what happened on the stream has calibrated them."""
        if asked.interval is None:
            return None
        lower, upper = self._calibration.ends(asked.interval, asked.balance).tolist()
        return lower, upper

    def _answer(self, components: Components, rows: int, asked: Asked) -> Predictive:
        answer = predict(
            components,
            self._grid,
            learned_prior=self._learned_prior,
            balance=asked.balance,
            point=asked.point,
            interval=self._levels(asked),
        )
        if answer.lower is None or answer.upper is None:
            return Predictive(answer.point[:rows])
        return Predictive(answer.point[:rows], answer.lower[:rows], answer.upper[:rows])


def load_predictor(store: SnapshotStore, version: int, settings: Settings) -> Predictor:
    """Reads a version, verified, and runs what requests will: none pays for a first time, and each will be answered.

    Raises:
        SnapshotCorrupt: it is absent or damaged.
        SnapshotMismatch: it is of another model than the configuration describes.
        SnapshotError: it has learned from nothing, or cannot be loaded for a reason that nobody thought of, which the
            log has whole.
    """
    try:
        manifest = store.manifest(version)
        check_fits(manifest, settings)
        if not manifest.samples:
            raise SnapshotError(f"snapshot {version} has not learned from any sample yet")
        predictor = Predictor.from_snapshot(store.load(version, training=False), settings)
        predictor.predict([], balance=0.5, interval=0.9)
    except TailstreamError:
        raise
    except Exception as error:
        log.exception("snapshot cannot be loaded", model_version=version)
        raise SnapshotError(f"snapshot {version} cannot be loaded: {error!r}") from error
    return predictor


class _Lists:
    """Answers to one sort of question, handed out request by request in the order of the pass."""

    def __init__(self, answer: Predictive) -> None:
        self._columns = [
            None if column is None else column.tolist() for column in (answer.point, answer.lower, answer.upper)
        ]
        self._taken = 0

    def next(self, rows: int, *, balance: float, model_version: int) -> Answer:
        part = slice(self._taken, self._taken + rows)
        self._taken += rows
        point, lower, upper = (None if column is None else column[part] for column in self._columns)
        return Answer(point or [], balance, model_version, lower, upper)


def _padded(rows: int) -> int:
    return max(1, -(-rows // PASS_MULTIPLE)) * PASS_MULTIPLE


def _select(components: Components, places: Iterable[int]) -> tuple[Components, int]:
    """The components of some rows, filled up to a multiple of 64 with those of row 0; and how many rows they are."""
    chosen = np.fromiter(places, dtype=np.int64)
    index = torch.from_numpy(np.pad(chosen, (0, _padded(len(chosen)) - len(chosen))))
    some = Components(
        components.log_weights[index],
        components.means[index],
        components.scales[index],
        components.label_mean,
        components.label_sd,
    )
    return some, len(chosen)
