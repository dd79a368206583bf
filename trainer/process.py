"""The trainer process: its parts put together, its signals, its end."""

import itertools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from queue import SimpleQueue
from types import FrameType
from typing import Final

import structlog
import torch

from trainer import decoding, tilting
from trainer.batching import Batcher
from trainer.checkpoint import Checkpoint, Parts, check_same_topic
from trainer.config import Settings
from trainer.dead_letter import FLUSH_S, DeadLetters
from trainer.errors import ConfigError
from trainer.kafka_client import Producer, create_topic
from trainer.learner import Learner
from trainer.loop import train
from trainer.losses import kernel
from trainer.memory import freeze_heap, keep_freed
from trainer.metrics import TrainerMetrics
from trainer.prefetch import BatchSource, ThreadedSource
from trainer.ranks import joined, local_rank
from trainer.schema import FeatureSchema
from trainer.snapshot import open_store
from trainer.source import KafkaSource, Share, kafka_batches
from trainer.source_process import SourceProcess
from trainer.turns import Turns

ABORTED: Final = 130  # exit code after a second signal
OVERDUE: Final = 3  # exit code when a clean stop took longer than trainer.stop_grace_s

log = structlog.get_logger()


def run(settings: Settings) -> None:
    """Trains until SIGTERM or SIGINT, then saves and returns. A second signal, or an overdue stop, ends it at once.

    Raises:
        TailstreamError: it cannot start, or cannot go on.
    """
    torch.set_num_threads(settings.threads)
    keep_freed()
    schema = FeatureSchema.of(settings)
    store = open_store(settings.store)
    metrics = TrainerMetrics()
    with ExitStack() as stack:
        stop = stack.enter_context(_stop_on_signals(settings.trainer.stop_grace_s))
        ranks = stack.enter_context(joined())
        device = choose_device(settings.device, None if ranks.alone else local_rank())
        if ranks.number == 0:
            stack.enter_context(store.lock())
        port = metrics.serve(settings.trainer.metrics_host, _port_of_rank(settings.trainer.metrics_port))
        log.info("trainer started", device=str(device), store=store.where, metrics_port=port, pid=os.getpid())
        on_cpu = kernel.is_loaded() and tilting.is_loaded()  # which a CUDA device does without
        if not decoding.is_loaded() or (device.type == "cpu" and not on_cpu):
            log.warning("not all is compiled: learning is slower; install again where there is a C compiler")
        share = Share(ranks.number, ranks.count)
        topic = KafkaSource(settings.kafka, stop, share)
        metrics.watch_broker(lambda: topic.broker_up)
        learner = Learner(settings, schema, device, ranks)
        topic.wait()
        if stop.is_set():
            return
        source = _batch_source(settings, schema, topic, stop, share)
        stack.callback(source.close)
        producer = topic.insist(lambda: _dead_letter_producer(settings))
        if producer is None:
            return
        stack.callback(producer.close)
        metrics.watch_broker(lambda: source.standing().broker_up)
        dead_letters = DeadLetters(producer, settings.kafka.topic, settings.kafka.dead_letters)
        parts = Parts(source, learner, store, dead_letters, metrics, ranks)
        checkpoint = Checkpoint(settings, parts)
        manifest = checkpoint.restore()
        if manifest is not None:
            check_same_topic(manifest, source.identity)
        turns = Turns(ranks, schema, lambda: dead_letters.full, lambda: learner.may_replay, stop.is_set)
        freeze_heap()
        train(parts, checkpoint, turns)
        log.info("trainer stopped", samples=learner.samples)


def _batch_source(
    settings: Settings, schema: FeatureSchema, topic: KafkaSource, stop: threading.Event, share: Share
) -> BatchSource:
    """A topic that was waited for, in batches, made where `source.process` says."""
    rows, max_wait_s = settings.batch.size, settings.batch.max_wait_s
    if not settings.source.process:
        return ThreadedSource(topic, Batcher(schema, rows), max_wait_s)
    make = partial(kafka_batches, settings, topic.identity, share)
    return SourceProcess(make, schema, rows, max_wait_s, topic.identity, stop, settings.trainer.log_format)


def _port_of_rank(port: int) -> int:
    """Each rank of a machine answers at a port of its own, the first at the one that is configured."""
    return port + local_rank() if port else 0


def choose_device(name: str, local: int | None = None) -> torch.device:
    """The device that a setting names; `auto` is CUDA where there is one.

    Args:
        name: the setting.
        local: number of a rank on its machine: each takes a CUDA device of its own, unless one is named by its number.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device("cuda", local) if name == "cuda" and local is not None else torch.device(name)
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise ConfigError(f'device: {str(device)!r} is not there; use "auto" or "cpu", or start fewer ranks')
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def _dead_letter_producer(settings: Settings) -> Producer:
    """A producer, its topic made where it is missing."""
    if create_topic(settings.kafka, settings.kafka.dead_letters):
        log.info("made the dead-letter topic", topic=settings.kafka.dead_letters)
    return Producer(settings.kafka, idempotent=False, block_s=FLUSH_S)


def _stacks() -> dict[str, str]:
    """Where each thread is, by its name: what holds a stop up cannot be asked afterwards."""
    frames = sys._current_frames()  # noqa: SLF001 - public in all but its name
    return {
        thread.name: "".join(traceback.format_stack(frames[thread.ident]))
        for thread in threading.enumerate()
        if thread.ident in frames and thread is not threading.current_thread()
    }


@contextmanager
def _stop_on_signals(grace_s: float) -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets; a second ends the process, and so does a stop that takes long."""
    stop, ended = threading.Event(), threading.Event()
    # A handler runs between any two instructions of the main thread, which may hold the event's lock or be writing a
    # log line: it only counts and queues, and another thread does the rest.
    received: SimpleQueue[int | None] = SimpleQueue()
    signals = itertools.count(1)

    def handle(number: int, frame: FrameType | None) -> None:
        if next(signals) > 1:
            os._exit(ABORTED)  # snapshots are whole or not there, so nothing is torn
        received.put(number)

    def watch() -> None:
        number = received.get()
        if number is None:
            return
        stop.set()
        log.info("stopping", signal=signal.Signals(number).name)
        if not ended.wait(grace_s):
            log.error("the stop took too long", grace_s=grace_s, threads=_stacks())
            os._exit(OVERDUE)

    threading.Thread(target=watch, name="signals", daemon=True).start()
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        ended.set()
        received.put(None)
        for number, handler in before.items():
            signal.signal(number, handler)
