"""Several processes that answer at one address: started, watched, replaced when they die, and stopped together.

Each has the whole service: its own watcher, model and queue. They share the listening socket, and their counters by
files in a folder, so that each answers `/metrics` for all of them.
"""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Final

import structlog
from prometheus_client.multiprocess import mark_process_dead

from service.serve import STOP_S, answer_at
from trainer.config import Settings
from trainer.errors import TailstreamError
from trainer.log import configure_logging

SHARED_COUNTERS: Final = "PROMETHEUS_MULTIPROC_DIR"  # names the folder to prometheus_client
# One that ends by itself so soon after its start would do so again.
SETTLED_S: Final = 10.0
RESTART_PAUSE_S: Final = 1.0

log = structlog.stdlib.get_logger(__name__)


def serve_by_workers(settings: Settings, listener: socket.socket, count: int) -> None:
    """Answers at a socket by so many processes, until SIGTERM or SIGINT. To be called in the main thread.

    Raises:
        TailstreamError: a worker could not start; the log says why.
    """
    woken, wake = os.pipe()

    def stop(number: int, frame: FrameType | None) -> None:
        os.write(wake, b"s")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    with tempfile.TemporaryDirectory(prefix="tailstream-metrics-") as folder:
        os.environ[SHARED_COUNTERS] = folder
        workers = [_Worker(settings, listener) for _ in range(count)]
        try:
            while woken not in (ready := wait([woken, *(worker.process.sentinel for worker in workers)])):
                for place, worker in enumerate(workers):
                    if worker.process.sentinel in ready:
                        workers[place] = worker.replaced(settings, listener, folder)
        finally:
            for worker in workers:
                worker.process.terminate()
            deadline = time.monotonic() + settings.service.drain_s + STOP_S + 5
            for worker in workers:
                worker.process.join(max(0.0, deadline - time.monotonic()))
                worker.process.kill()
                worker.process.join()
            del os.environ[SHARED_COUNTERS]
            os.close(woken)
            os.close(wake)


class _Worker:
    """A running process.

    Attributes:
        process: it.
    """

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        # Not forked: what prometheus_client counts with is decided when it is imported, and torch has threads.
        self.process: BaseProcess = multiprocessing.get_context("spawn").Process(
            target=_work, args=(settings, listener)
        )
        self._started_s = time.monotonic()
        self.process.start()

    def replaced(self, settings: Settings, listener: socket.socket, folder: str) -> "_Worker":
        """Another in place of this one, which has ended.

        Raises:
            TailstreamError: it could not even start.
        """
        self.process.join()
        pid, code = self.process.pid, self.process.exitcode or 0
        if code > 0 and time.monotonic() - self._started_s < SETTLED_S:
            raise TailstreamError(f"a worker ended with exit code {code} as soon as it was started; the log says why")
        mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]  # its counts stay in the sum
        time.sleep(RESTART_PAUSE_S)
        new = _Worker(settings, listener)
        log.error("a worker died and was replaced", pid=pid, exit_code=code, new_pid=new.process.pid)
        return new


def _work(settings: Settings, listener: socket.socket) -> None:
    configure_logging(settings.trainer.log_format)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_the_parent() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow_the_parent, name="parent", daemon=True).start()
    try:
        answer_at(listener, settings)
    except TailstreamError as error:
        log.error("the worker cannot serve", why=str(error))
        sys.exit(error.exit_code)
