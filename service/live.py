"""What every open page shows, as one stream of server-sent events: looked up and encoded once, however many look on."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any, Final

import msgspec
import structlog

from service.history import History, point_of
from service.metrics import age_s
from service.predictor import Predictor
from service.problems import OVERLOADED, Problem
from service.watcher import Watcher
from trainer.manifest import Manifest

log = structlog.stdlib.get_logger(__name__)

INTERVAL_S: Final = 1.0  # between two events; nobody reads faster, and a trainer writes two versions a second
MOST_STREAMS: Final = 64  # open pages; each holds a connection
SHOWN: Final = frozenset(
    {
        *("version", "step", "samples", "samples_per_second", "lag_records", "healthy", "train_loss"),
        *("noise_sigma", "noise_sigma_label_units", "drift_alarms", "metrics", "newest"),
    }
)  # of a manifest


class Live:
    """Sends what the service knows to every open page: first all of it, then once a second what may have changed.

    `page` and `history` come once, `model` whenever another version answers, `now` at every beat: its ages move on, and
    a page that hears nothing for some seconds knows that the service is gone. The history is kept also while nobody
    looks on, and begins with what the store has kept of the time before.

    Args:
        watcher: has the model.
        page: what never changes: the schema's fields and the like.
        not_ready: why the service should get no requests, None if it may.
        past: the manifests of earlier models, from the oldest; asked for once, on another thread.
    """

    def __init__(
        self,
        watcher: Watcher,
        page: dict[str, Any],
        not_ready: Callable[[], str | None],
        past: Callable[[], Iterable[Manifest]] = tuple,
    ) -> None:
        self._watcher = watcher
        self._past = past
        self._history = History()
        self._noted: Predictor | None = None  # the newest in the history
        self._not_ready = not_ready
        self._page = _event("page", page)
        self._model = b""  # the newest event of its kind, encoded; so is `_now`
        self._now = b""
        self._shown: Predictor | None = None  # what `_model` describes
        self._beat = asyncio.Event()  # set, and replaced, when there is something new
        self._streams = 0
        self._ended = False

    def check_room(self) -> None:
        """Whether one more page may look on.

        Raises:
            Problem: too many do already.
        """
        if self._streams >= MOST_STREAMS:
            raise Problem(OVERLOADED, f"{self._streams} pages are open already; close one, or try again later.")

    async def events(self) -> AsyncGenerator[bytes]:
        """Events for one page until it leaves or the service ends; what a slow one misses is left out."""
        self._streams += 1
        try:
            if self._streams == 1:
                self._look()
            yield self._page + _event("history", self._history.columns())
            sent = b""
            while not self._ended:
                beat, model = self._beat, self._model
                yield self._now if model is sent else model + self._now
                sent = model
                if not self._ended:
                    await beat.wait()
        finally:
            self._streams -= 1

    async def follow(self) -> None:
        """Looks at the model once a second, until it is cancelled."""
        for manifest in await asyncio.to_thread(self._past):
            self._history.add(manifest)
        while True:
            try:
                self._note()
                if self._streams:
                    self._look()
            except Exception:  # a task that died would leave every page as it is, without a word
                log.exception("the live page could not be brought up to date")
            self._beat.set()
            self._beat = asyncio.Event()
            await asyncio.sleep(INTERVAL_S)

    def end(self) -> None:
        """Ends every stream; a server that stops waits for its connections, and these would never close."""
        self._ended = True
        self._beat.set()

    def _note(self) -> None:
        predictor = self._watcher.predictor
        if predictor is not None and predictor is not self._noted:
            self._history.add(predictor.manifest)
            self._noted = predictor

    def _look(self) -> None:
        predictor = self._watcher.predictor
        manifest = None if predictor is None else predictor.manifest
        if predictor is not self._shown or not self._model:
            shown = manifest and {
                **manifest.model_dump(include=set(SHOWN)),
                "loss": manifest.learner["loss"],
                "point": point_of(manifest),
            }
            self._model = _event("model", shown)
            self._shown = predictor
        now = {
            "trouble": self._watcher.trouble,
            "not_ready": self._not_ready(),
            "pinned": self._watcher.pinned,
            "age_s": manifest and age_s(manifest),
            "freshness_s": manifest and max(0.0, time.time() - manifest.newest_append_s),
        }
        self._now = _event("now", now)


def _event(kind: str, data: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(data))
