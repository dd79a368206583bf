"""A loaded snapshot that answers: immutable, so that swapping models is one assignment.

An answer depends on nothing but the row, the snapshot and what is asked of it. Matrix kernels differ by size, and some
vector kernels treat the rows at the end of a tensor differently; so every tensor on the way has a multiple of 16 rows,
or of what `service.passes` found.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, Self

import msgspec
import numpy as np
import structlog
import torch

from service.answers import Answering, Asked, NumberAnswering, fresh_answering
from trainer.config import Settings
from trainer.errors import SnapshotError, TailstreamError
from trainer.manifest import Manifest, check_fits
from trainer.schema import Columns, FeatureSchema, Row
from trainer.snapshot import Snapshot, SnapshotStore

log = structlog.stdlib.get_logger(__name__)


class Question(NamedTuple):
    """The features of one request's rows, and what is asked about them."""

    columns: Columns
    asked: Asked

    @property
    def rows(self) -> int:
        """How many rows."""
        return len(self.columns.numeric)


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one request is answered; lists have a value for each row."""

    predictions: Sequence[float] | Sequence[str]  # label units, or classes
    balance: float
    model_version: int
    lower: Sequence[float] | None = None
    upper: Sequence[float] | None = None
    probabilities: Sequence[dict[str, float]] | None = None  # by class, from the most probable


class Density(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one row is answered where labels are numbers, and the distribution that the answer is read from."""

    prediction: float
    balance: float
    model_version: int
    edges: list[float]  # (G + 1,) of the cells, label units, increasing; empty before any label was seen
    probabilities: list[float]  # (G,) of the cells, summing to 1
    lower: float | None = None
    upper: float | None = None


class Predictor:
    """A snapshot's model on the CPU, ready to answer.

    Attributes:
        manifest: what the snapshot says of itself.
    """

    def __init__(self, manifest: Manifest, answering: Answering, schema: FeatureSchema) -> None:
        self.manifest = manifest
        self._answering = answering
        self._schema = schema

    @classmethod
    def from_snapshot(cls, snapshot: Snapshot, settings: Settings) -> Self:
        """Builds the model that the configuration describes and fills it from the snapshot.

        Raises:
            ConfigError: a body of the user's own cannot be imported.
            KeyError: what is known of the labels is not in the snapshot.
            RuntimeError: the tensors do not fit the model.
        """
        schema = FeatureSchema.of(settings)
        return cls(snapshot.manifest, fresh_answering(schema, settings).loaded(snapshot.model, schema.buckets), schema)

    @property
    def version(self) -> int:
        """The snapshot's version."""
        return self.manifest.version

    def predict(self, rows: Sequence[Row], balance: float, *asked: Any, **more: Any) -> Any:
        """Answers for B rows in the task's own form; the other arguments are those of `Asked`."""
        with torch.inference_mode():
            columns = Columns(self._schema.numeric(rows), self._schema.categorical(rows))
            return self._answering.answer(self._outputs([columns]), len(rows), Asked(balance, *asked, **more))

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers several requests by one forward pass."""
        with torch.inference_mode():
            outputs = self._outputs([question.columns for question in questions])
            places: dict[Asked, list[range]] = {}  # in the pass
            start = 0
            for question in questions:
                end = start + question.rows
                places.setdefault(question.asked, []).append(range(start, end))
                start = end
            if len(places) == 1:
                answered = {asked: self._lists(outputs, start, asked) for asked in places}
            else:
                answered = {
                    asked: self._lists(*self._select(outputs, chain.from_iterable(of)), asked)
                    for asked, of in places.items()
                }
        return [
            answered[question.asked].next(question.rows, balance=question.asked.balance, model_version=self.version)
            for question in questions
        ]

    def density(self, question: Question) -> Density:
        """Answers a question of one row as `answer` does, and says how probable each cell of the labels is."""
        assert isinstance(self._answering, NumberAnswering)
        with torch.inference_mode():
            outputs = self._outputs([question.columns])
            said = self._answering.answer(outputs, question.rows, question.asked)
            probabilities = self._answering.cells(outputs, question.asked.balance)
        return Density(
            prediction=said.point.item(),
            balance=question.asked.balance,
            model_version=self.version,
            edges=self._answering.grid.edges.tolist(),
            probabilities=probabilities[0].tolist(),
            lower=None if said.lower is None else said.lower.item(),
            upper=None if said.upper is None else said.upper.item(),
        )

    def _outputs(self, parts: Sequence[Columns]) -> Any:
        """The network's outputs for all rows of the parts, and for the rows of missing values that fill up the pass."""
        count = sum(len(part.numeric) for part in parts)
        size = self._answering.passes.padded(count)
        numeric = np.full((size, len(self._schema.numeric_columns)), np.nan, dtype=np.float32)
        categorical = np.zeros((size, len(self._schema.buckets)), dtype=np.int64)
        np.concatenate([part.numeric for part in parts], out=numeric[:count])
        np.concatenate([part.categorical for part in parts], out=categorical[:count])
        return self._answering.outputs(torch.from_numpy(numeric), torch.from_numpy(categorical))

    def _select(self, outputs: Any, places: Iterable[int]) -> tuple[Any, int]:
        """Outputs of some rows, filled up with those of row 0; and how many rows they are."""
        chosen = np.fromiter(places, dtype=np.int64)
        size = self._answering.passes.padded(len(chosen))
        index = torch.from_numpy(np.pad(chosen, (0, size - len(chosen))))
        return self._answering.select(outputs, index), len(chosen)

    def _lists(self, outputs: Any, rows: int, asked: Asked) -> "_Lists":
        return _Lists(self._answering.lists(self._answering.answer(outputs, rows, asked), asked))


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

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self._columns = columns
        self._taken = 0

    def next(self, rows: int, *, balance: float, model_version: int) -> Answer:
        part = slice(self._taken, self._taken + rows)
        self._taken += rows
        lists = {name: column[part] for name, column in self._columns.items()}
        return Answer(balance=balance, model_version=model_version, **lists)
