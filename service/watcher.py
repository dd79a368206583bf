"""Follows the snapshot store: loads, verifies and warms up each new model off the event loop, then swaps it in."""

import threading
from collections.abc import Iterator
from typing import Final

import structlog

from service.predictor import Predictor, load_predictor
from trainer.config import Settings
from trainer.errors import SnapshotCorrupt, SnapshotError, StoreUnavailable, TailstreamError
from trainer.snapshot import SnapshotStore
from trainer.storage import SnapshotKey

STOP_S: Final = 10.0  # longest wait for a load that runs while the service stops

log = structlog.stdlib.get_logger(__name__)


class Watcher:
    """Keeps `predictor` at the newest healthy snapshot that fits the configuration, or at the pinned one.

    A snapshot that is corrupt, does not fit or is unhealthy is passed over, and the model at hand goes on answering. As
    long as no snapshot has been healthy, the newest unhealthy one answers.

    Attributes:
        predictor: the model to use; replaced by one assignment, None before the first.
        pinned: the version to stay with, None where the newest is followed.
        trouble: why the newest snapshot, or any, is not in use; None when all is well.
    """

    def __init__(self, store: SnapshotStore, settings: Settings) -> None:
        self.predictor: Predictor | None = None
        self.pinned: int | None = None
        self.trouble: str | None = f"there is no snapshot in {store.where}"
        self._store = store
        self._settings = settings
        self._loaded: SnapshotKey | None = None
        self._refused: dict[SnapshotKey, str] = {}
        self._health: dict[SnapshotKey, bool] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def start(self) -> None:
        """Looks once, then goes on in a thread of its own."""
        self.poll()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join(STOP_S)

    def poll(self) -> None:
        """Looks at the store once, and takes what it should."""
        try:
            trouble = self._follow()
        except SnapshotError as error:
            trouble = str(error)
        if trouble != self.trouble:
            version = self._loaded and self._loaded.version
            if trouble is None:
                log.info("model follows the newest snapshot", model_version=version)
            else:
                log.warning("model does not follow the newest snapshot", why=trouble, model_version=version)
        self.trouble = trouble

    def _run(self) -> None:
        while not self._stop.wait(self._settings.service.poll_interval_s):
            try:
                self.poll()
            except Exception:  # a thread that died would freeze the model without a word
                log.exception("looking at the snapshot store failed", store=self._store.where)

    def _follow(self) -> str | None:
        """Takes the best snapshot there is.

        Returns:
            Why the newest one (or the pinned one) is not in use or should not be, None if all is well.
        """
        unreadable = None
        try:
            self.pinned = self._store.active()
        except SnapshotError as error:  # what was pinned stays so
            unreadable = str(error)
        pinned = self.pinned
        keys = [key for key in reversed(self._store.snapshots()) if pinned is None or key.version == pinned]
        self._refused = {key: why for key, why in self._refused.items() if key in keys}
        self._health = {key: healthy for key, healthy in self._health.items() if key in keys}
        if not keys:
            what = "no snapshot" if pinned is None else f"no snapshot {pinned}, which is the pinned one,"
            return f"there is {what} in {self._store.where}"
        for key in keys if pinned is not None else self._candidates(keys):
            if key == self._loaded or (key not in self._refused and self._take(key)):
                break
        if unreadable is not None:
            return unreadable
        if keys[0] in self._refused:
            return self._refused[keys[0]]
        if not self._is_healthy(keys[0]):
            return f"snapshot {keys[0].version} is unhealthy: its recent error is no better than a constant answer's"
        return None

    def _candidates(self, keys: list[SnapshotKey]) -> Iterator[SnapshotKey]:
        """Snapshots that may replace the model at hand, the best first."""
        has_healthy = self.predictor is not None and self.predictor.manifest.healthy
        if has_healthy and self._loaded is not None and keys[0] >= self._loaded:
            # Never back in time; only where a store was begun anew are all its numbers lower.
            keys = [key for key in keys if key > self._loaded]
        yield from (key for key in keys if self._is_healthy(key))
        if not has_healthy:
            yield from (key for key in keys if not self._is_healthy(key))

    def _is_healthy(self, key: SnapshotKey) -> bool:
        if key not in self._health:
            try:
                self._health[key] = self._store.manifest(key.version).healthy
            except SnapshotCorrupt as error:
                self._refuse(key, str(error))
                self._health[key] = False
        return self._health[key]

    def _take(self, key: SnapshotKey) -> bool:
        """Loads a snapshot, checks that it answers, and swaps it in."""
        try:
            predictor = load_predictor(self._store, key.version, self._settings)
        except StoreUnavailable:
            raise  # it says nothing of the snapshot
        except TailstreamError as error:
            self._refuse(key, str(error))
            return False
        self.predictor, self._loaded = predictor, key
        return True

    def _refuse(self, key: SnapshotKey, why: str) -> None:
        """Remembers not to try again what is broken for good; what retention has just removed is not."""
        if key in self._store.snapshots():
            self._refused[key] = why
