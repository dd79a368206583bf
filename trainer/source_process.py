"""Fetching and decoding in a process of its own: neither a step waits for a poll, nor a poll for a step.

Whole decoded batches lie in a ring of shared memory, and what else belongs to them (offsets, rejected records) comes
through a pipe. A slot of the ring is filled again once the trainer says that it has taken what was there: where it does
not, the fetching stands still. The process ends with the trainer, however that ends.
"""

import ctypes
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from trainer.batching import LONGEST_POLL_S, Batch, Batcher, Progress, Rejection
from trainer.errors import ConfigError, SourceError, TailstreamError
from trainer.kafka_client import TopicDescription
from trainer.log import LogFormat, configure_logging
from trainer.memory import freeze_heap
from trainer.prefetch import BATCHES_AHEAD, JOIN_S, Patience, a_moment, fetched
from trainer.schema import FeatureSchema
from trainer.source import RecordSource, Standing

STANDING_S: Final = 0.2  # between reports of what the source knows besides
SHARED_MEMORY: Final = Path("/dev/shm")  # where Linux keeps it; writing to one that is full kills the writer
ALIGNMENT_BYTES: Final = 64
PR_SET_PDEATHSIG: Final = 1  # of prctl(2)

MakeSource = Callable[[threading.Event], tuple[RecordSource, Batcher]]


# What the trainer says


class _Open(NamedTuple):
    progress: Progress
    classes: tuple[str, ...]  # known so far


class _Taken(NamedTuple):
    slot: int


class _Commit(NamedTuple):
    progress: Progress


class _Stop(NamedTuple):
    pass


# What the process says, beside `Standing`


class _Opened(NamedTuple):
    begun: dict[int, int]


class _Filled(NamedTuple):
    """A batch whose columns lie in a slot."""

    slot: int
    rows: int
    progress: Progress
    rejected: tuple[Rejection, ...]
    newest_append_s: float
    new_classes: tuple[str, ...]


class _Ended(NamedTuple):
    pass


class _Failed(NamedTuple):
    error: BaseException
    trace: str


class _Ring:
    """Slots of shared memory, each with room for the columns of one batch.

    Args:
        memory: at least `size_bytes` of it.
        rows: of a full batch.
        numeric: columns F.
        categorical: columns C.
    """

    def __init__(self, memory: memoryview, rows: int, numeric: int, categorical: int) -> None:
        self._slots: list[list[NDArray[Any]]] = []
        start = 0
        for _ in range(BATCHES_AHEAD):
            columns: list[NDArray[Any]] = []
            for shape, dtype in _columns(rows, numeric, categorical):
                columns.append(np.frombuffer(memory, dtype, math.prod(shape), start).reshape(shape))
                start += _aligned(columns[-1].nbytes)
            self._slots.append(columns)

    @staticmethod
    def size_bytes(rows: int, numeric: int, categorical: int) -> int:
        """What all slots take."""
        columns = _columns(rows, numeric, categorical)
        return BATCHES_AHEAD * sum(_aligned(math.prod(shape) * dtype().itemsize) for shape, dtype in columns)

    def write(self, slot: int, batch: Batch) -> None:
        """Puts a batch's columns into a slot."""
        given = (batch.label, batch.time_s, batch.categorical, batch.numeric)
        for column, values in zip(self._slots[slot], given, strict=True):
            column[: len(batch)] = values

    def read(self, filled: _Filled) -> Batch:
        """The batch that was put into a slot; a copy, so that the slot may be filled again."""
        label, time_s, categorical, numeric = (column[: filled.rows].copy() for column in self._slots[filled.slot])
        return Batch(numeric, categorical, label, time_s, *filled[2:])

    def release(self) -> None:
        """Lets go of the memory, which cannot be closed while arrays lie in it."""
        self._slots.clear()


def _columns(rows: int, numeric: int, categorical: int) -> tuple[tuple[tuple[int, ...], type[np.generic]], ...]:
    """Shapes and types."""
    return (
        ((rows,), np.float64),
        ((rows,), np.float64),
        ((rows, categorical), np.int64),
        ((rows, numeric), np.float32),
    )


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class SourceProcess:
    """A `BatchSource` in a process of its own, which starts at once and reads from `open` on.

    Args:
        make: makes the source and what batches it, in that process; a function that can be pickled, and needs no torch.
        schema: of the records; the classes it knows when the source is opened are where that process goes on.
        rows: of a full batch.
        identity: of the topic.
        stop: ends waiting for the broker.
        log_format: as the trainer's own.

    Raises:
        ConfigError: there is not enough shared memory.
    """

    def __init__(
        self,
        make: MakeSource,
        schema: FeatureSchema,
        rows: int,
        max_wait_s: float,
        identity: TopicDescription,
        stop: threading.Event,
        log_format: LogFormat = "auto",
    ) -> None:
        self.identity = identity
        self._schema = schema
        self._stop = stop
        self._standing = Standing(broker_up=True)
        shape = rows, len(schema.numeric_columns), len(schema.buckets)
        self._memory = _shared_memory(_Ring.size_bytes(*shape))
        self._ring = _Ring(cast("memoryview", self._memory.buf), *shape)
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        given = (theirs, make, self._memory.name, shape, max_wait_s, os.getpid(), log_format)
        self._process = context.Process(target=_run, args=given, name="source", daemon=True)
        with _signals_held_back():  # a Ctrl-C is for the trainer, which then stops this one
            self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return self._process.pid

    def standing(self) -> Standing:
        """What was last heard."""
        return self._standing

    def open(self, progress: Progress) -> dict[int, int]:
        """Begins after `progress`, as `RecordSource.open` does."""
        classes = () if self._schema.classes is None else tuple(self._schema.classes)
        self._send(_Open(progress, classes))
        told = False
        while not self._connection.poll(LONGEST_POLL_S):
            if self._stop.is_set() and not told:
                self._send(_Stop())
                told = True
        match self._receive():
            case _Opened(begun):
                return begun
            case other:
                raise RuntimeError(f"the source's process answered {other!r}")

    @contextmanager
    def batches(self, patience_s: Patience = a_moment) -> Iterator[Iterator[Batch | None]]:
        """See `BatchSource`."""
        yield self._taken(patience_s)

    def _taken(self, patience_s: Patience) -> Iterator[Batch | None]:
        while True:
            if not self._connection.poll(patience_s()):
                yield None
                continue
            match self._receive():
                case _Filled() as filled:
                    batch = self._ring.read(filled)
                    self._send(_Taken(filled.slot))
                    yield batch
                case _Ended():
                    return

    def commit(self, progress: Progress) -> None:
        """Says from outside how far a durable snapshot has come."""
        self._send(_Commit(progress))

    def close(self) -> None:
        """Ends the process, the last commit made if the broker is there; a second time does nothing."""
        if self._connection.closed:
            return
        self._send(_Stop())
        until = time.monotonic() + JOIN_S
        with suppress(EOFError, OSError):
            while time.monotonic() < until:  # what it still says would else hold it up
                if self._connection.poll(LONGEST_POLL_S):
                    self._connection.recv()
        self._process.join(max(0.0, until - time.monotonic()) + LONGEST_POLL_S)
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._ring.release()
        self._memory.close()
        self._memory.unlink()

    def _send(self, message: Any) -> None:
        with suppress(OSError):  # it is gone: what it said before, and why it ended, is still to be received
            self._connection.send(message)

    def _receive(self) -> Any:
        """The next message but for errors, which are raised, and what is kept here."""
        try:
            message = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if isinstance(message, Standing):
            self._standing = message
        if isinstance(message, _Failed):
            if not isinstance(message.error, TailstreamError):
                message.error.add_note(f"in the source's process:\n{message.trace}")
            raise message.error
        return message

    def _died(self) -> SourceError:
        self._process.join(1.0)
        code = self._process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
        return SourceError(
            f"the process that reads {self.identity.topic!r} (pid {self._process.pid}) {how}; what was learned is safe "
            "up to the last snapshot, and the next start goes on from there"
        )


def _shared_memory(size_bytes: int) -> SharedMemory:
    if SHARED_MEMORY.exists() and shutil.disk_usage(SHARED_MEMORY).free < 2 * size_bytes:
        raise ConfigError(
            f"batches on their way take {size_bytes >> 20} MiB of shared memory, and {SHARED_MEMORY} has little more; "
            "make it larger (in Docker: --shm-size), or set source.process = false"
        )
    return SharedMemory(create=True, size=max(1, size_bytes))


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """What is started here inherits that SIGINT and SIGTERM wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# In the process


def _run(
    connection: Connection,
    make: MakeSource,
    memory_name: str,
    shape: tuple[int, int, int],
    max_wait_s: float,
    parent: int,
    log_format: LogFormat,
) -> None:
    _live_as_long_as(parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach a whole group; the trainer says when to stop
        signal.signal(number, signal.SIG_IGN)
    configure_logging(log_format)
    memory = SharedMemory(memory_name)
    stop = threading.Event()
    with suppress(OSError):  # the trainer is gone: nobody is left to tell
        try:
            source, batcher = make(stop)
            freeze_heap()
            _Fetching(connection, source, _Ring(cast("memoryview", memory.buf), *shape), stop).run(batcher, max_wait_s)
            connection.send(_Ended())
        except BaseException as error:
            connection.send(_sendable(error))
    # Nothing is left to clean up: the trainer owns the memory.
    sys.stderr.flush()
    os._exit(0)


class _Fetching:
    """The source at work; a thread hears what the trainer says meanwhile."""

    def __init__(self, connection: Connection, source: RecordSource, ring: _Ring, stop: threading.Event) -> None:
        self._connection = connection
        self._source = source
        self._ring = ring
        self._stop = stop
        self._free: SimpleQueue[int] = SimpleQueue()
        self._standing: Standing | None = None
        self._next_standing_s = 0.0

    def run(self, batcher: Batcher, max_wait_s: float) -> None:
        """Opens the source when told to, and reads it to its end or a stop."""
        match self._connection.recv():
            case _Open(progress, classes):
                batcher.know(classes)
            case _Stop():
                return
        for slot in range(BATCHES_AHEAD):
            self._free.put(slot)
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        try:
            self._connection.send(_Opened(self._source.open(progress)))
            for batch in fetched(self._source, batcher, max_wait_s, self._stop):
                if batch is not None:
                    self._put(batch)
                self._report()
        finally:
            self._source.close()

    def _listen(self) -> None:
        try:
            while True:
                match self._connection.recv():
                    case _Taken(slot):
                        self._free.put(slot)
                    case _Commit(progress):
                        self._source.commit(progress)
                    case _Stop():
                        self._stop.set()
        except (EOFError, OSError):
            os._exit(1)  # the trainer is gone

    def _put(self, batch: Batch) -> None:
        while not self._stop.is_set():
            try:
                slot = self._free.get(timeout=LONGEST_POLL_S)
            except Empty:
                self._report()
                continue
            self._ring.write(slot, batch)
            rest = (batch.progress, batch.rejected, batch.newest_append_s, batch.new_classes)
            self._connection.send(_Filled(slot, len(batch), *rest))
            return

    def _report(self) -> None:
        if time.monotonic() < self._next_standing_s:
            return
        self._next_standing_s = time.monotonic() + STANDING_S
        standing = self._source.standing()
        if standing != self._standing:
            self._standing = standing
            self._connection.send(standing)


def _sendable(error: BaseException) -> _Failed:
    """An error as the trainer can have it: some cannot be pickled, or not be made again."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = SourceError(f"{type(error).__name__}: {error}")
    return _Failed(error, trace)


def _live_as_long_as(parent: int) -> None:
    """Has the kernel kill this process when the trainer ends; elsewhere than on Linux the pipe's end does, later."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
