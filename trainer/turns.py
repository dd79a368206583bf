"""Turns: what the loop does next, the same on all ranks of a job, each with a batch of its own or without one."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np

from trainer.batching import LONGEST_POLL_S, Batch
from trainer.errors import SourceError
from trainer.ranks import Ranks
from trainer.schema import FeatureSchema

LETTERS_POLL_S: Final = 0.05  # between looks whether dead letters have gone that hold a rank up
BESIDE_OTHERS_S: Final = 0.01  # that a rank lets the others wait for a batch of its own, once after each it had
IDLE_S: Final = 0.02  # the same where no rank had one


class Turn(NamedTuple):
    """What is to be done next.

    Attributes:
        batch: this rank's, perhaps without rows; None where no rank has one.
        rows: of the batch of each rank.
        said: by each rank as the turn began; see `Turns.of`.
    """

    batch: Batch | None
    rows: Sequence[int]
    said: Sequence[Sequence[int]]


class Turns:
    """One turn after the other.

    A rank without a batch takes part with one of no rows: it holds the others up for a moment at most, and that once.
    When one is told to stop, or can read no more, all end after the same turn; else when all have come to an end.

    Args:
        ranks: that take turns together.
        schema: of the records; the classes that it knows by now are numbered alike on all ranks.
        held: whether this rank should take no batch for now.
        eager: whether there is something to do without a batch; the same on all ranks.
        stop: whether this rank was told to stop.
    """

    def __init__(
        self,
        ranks: Ranks,
        schema: FeatureSchema,
        held: Callable[[], bool],
        eager: Callable[[], bool],
        stop: Callable[[], bool],
    ) -> None:
        self._ranks = ranks
        self._held, self._eager, self._stop = held, eager, stop
        self._had_one = self._others_had = False
        self._without_rows = _without_rows(schema)
        self._classes = None if schema.classes is None or ranks.alone else _Classes(tuple(schema.classes))

    def patience_s(self) -> float:
        """How long to wait for a batch before a turn without."""
        if self._eager():
            return 0.0
        if self._ranks.alone:
            return LONGEST_POLL_S
        if self._had_one:
            return BESIDE_OTHERS_S
        return 0.0 if self._others_had else IDLE_S

    def of(self, batches: Iterator[Batch | None], says: Callable[[], Sequence[int]] = tuple) -> Iterator[Turn]:
        """Turns with this rank's batches, until all ranks have come to an end.

        Args:
            batches: of this rank, None where there was none for a while.
            says: numbers that the others are to know as a turn begins, as many on all ranks: that needs no exchange of
                its own.

        Raises:
            SourceError: this rank or another can read no more; raised after the same turn on all.
        """
        going, begun = True, False
        while True:
            batch, failure = None, None
            try:
                if begun and self._held():  # what holds it up came with a batch, and goes with a save of it
                    time.sleep(LETTERS_POLL_S)
                elif going:
                    batch = next(batches)
            except StopIteration:
                going = False
            except SourceError as error:
                failure = error
            flags = going, batch is not None, self._stop(), failure is not None
            said = self._ranks.numbers(*flags, 0 if batch is None else len(batch), *says())
            any_going, any_batch, any_stop, any_failed = (
                any(of) for of in zip(*(own[:4] for own in said), strict=True)
            )
            if failure is not None:
                raise failure
            if any_failed:
                raise SourceError("another rank of this job can read no more; its own log says why")
            if not any_going:
                return
            self._had_one, self._others_had = batch is not None, any_batch
            begun = begun or self._had_one
            batch = self._agreed(self._without_rows if batch is None else batch) if any_batch else None
            yield Turn(batch, [own[4] for own in said], [own[5:] for own in said])
            if any_stop:
                return

    def _agreed(self, batch: Batch) -> Batch:
        return batch if self._classes is None else self._classes.agree(batch, self._ranks)


class _Classes:
    """Each rank numbers the classes in the order in which it sees them; here they get the numbers that all use."""

    def __init__(self, known: tuple[str, ...]) -> None:
        self._own = list(known)
        self._numbers = {name: number for number, name in enumerate(known)}

    def agree(self, batch: Batch, ranks: Ranks) -> Batch:
        """A batch with labels, and new classes, as all ranks have them."""
        self._own += batch.new_classes
        new: list[str] = []
        (any_new,) = ranks.any(bool(batch.new_classes))
        if any_new:
            for said in ranks.texts(json.dumps(batch.new_classes).encode()):
                new += [name for name in json.loads(said) if name not in self._numbers and name not in new]
            self._numbers |= {name: len(self._numbers) + at for at, name in enumerate(new)}
        numbers = np.array([self._numbers[name] for name in self._own], dtype=np.float64)
        return replace(batch, label=numbers[batch.label.astype(np.int64)], new_classes=tuple(new))


def _without_rows(schema: FeatureSchema) -> Batch:
    """A batch that brings nothing."""
    none = np.zeros(0)
    return Batch(
        numeric=np.zeros((0, len(schema.numeric_columns)), dtype=np.float32),
        categorical=np.zeros((0, len(schema.buckets)), dtype=np.int64),
        label=none,
        time_s=none,
        progress={},
    )
