"""A source of records made up, whose polls are counted in a file: a test sees them from another process too."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from trainer.batching import Batcher, Progress, Record
from trainer.config import Settings
from trainer.errors import OffsetsLost
from trainer.kafka_client import TopicDescription
from trainer.schema import FeatureSchema
from trainer.source import Standing

SIZE = 4
IDENTITY = TopicDescription(None, "prices", None, (0,))
VALUE = b'{"id": 1, "size": 0.5, "age": null, "kind": "tin", "price": 12.5, "grade": "new"}'
SETTINGS: dict[str, Any] = {
    "kafka": {"bootstrap_servers": ["127.0.0.1:1"], "topic": "prices"},
    "schema": {"label": "price", "features": {"size": "numeric", "age": "numeric", "kind": "categorical"}},
    "model": {"category_buckets": 16},
}
AtEnd = Literal["ends", "expired", "unforeseen", "dies", "hangs"]


class Polled:
    """One batch of `SIZE` records a poll: endless, or ending as `at_end` says once `polls` of them were made.

    Args:
        folder: where `polls` grows by a byte a poll, and `committed` and `closed` say what was asked.
        polls: how many.
        at_end: what happens then.
        value: of every record; the last of a poll is `last_value` where there is one.
    """

    def __init__(
        self,
        folder: Path,
        stop: threading.Event,
        polls: int | None = None,
        at_end: AtEnd = "ends",
        value: bytes = VALUE,
        last_value: bytes | None = None,
    ) -> None:
        self.identity = IDENTITY
        self.exhausted = False
        self._folder = folder
        self._stop = stop
        self._limit = polls
        self._at_end = at_end
        self._values = [*[value] * (SIZE - 1), last_value or value]
        self._polls = 0

    def open(self, progress: Progress) -> dict[int, int]:
        self._next = progress[0].next_offset if 0 in progress else 0
        return {0: self._next}

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        if self._polls == self._limit:
            match self._at_end:
                case "expired":
                    raise OffsetsLost("they have expired")
                case "unforeseen":
                    raise ZeroDivisionError("a mistake")
                case "dies":
                    import os

                    os._exit(9)
                case "hangs":
                    time.sleep(timeout_s)
                    return []
            self.exhausted = True
            return []
        self._polls += 1
        with (self._folder / "polls").open("ab") as file:
            file.write(b".")
        first, self._next = self._next, self._next + SIZE
        return [Record(0, first + n, 100.0 + n, b"key", value, [("h", b"1")]) for n, value in enumerate(self._values)]

    def standing(self) -> Standing:
        return Standing(broker_up=True, lost_records=7)

    def commit(self, progress: Progress) -> None:
        with (self._folder / "committed").open("a") as file:
            file.write(f"{progress[0].next_offset}\n")

    def close(self) -> None:
        (self._folder / "closed").touch()


def make_settings(task: str = "regression") -> Settings:
    schema = {**SETTINGS["schema"], "label": "grade" if task == "classification" else "price"}
    return Settings(**{**SETTINGS, "schema": schema, "task": task})


def make(task: str, options: dict[str, Any], folder: Path, stop: threading.Event) -> tuple[Polled, Batcher]:
    return Polled(folder, stop, **options), Batcher(FeatureSchema.of(make_settings(task)), SIZE)


def polls(folder: Path) -> int:
    path = folder / "polls"
    return path.stat().st_size if path.exists() else 0


def wait_until(done: Callable[[], bool], timeout_s: float = 60.0) -> None:
    until = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)
