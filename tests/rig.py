"""What tests of delivery are made with: real brokers, real trainer processes, and records to send."""

import base64
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

import psutil
import torch

from service.broker import free_port
from trainer.batching import CHECKSUM_MODULUS, PartitionProgress, Record
from trainer.config import KafkaSettings, Settings
from trainer.errors import BrokerUnavailable
from trainer.kafka_client import Consumer, cluster_id, describe_topic
from trainer.manifest import Manifest
from trainer.publish import publish
from trainer.schema import FeatureSchema
from trainer.snapshot import Snapshot, open_store

WAIT_S: Final = 180.0
STARTED: Final = "trainer started"
STOPPED: Final = "trainer stopped"

# Trainers are forked from a process that has imported torch, which takes most of a start; they are processes of their
# own all the same, with their own signals and exit codes.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["trainer.process", "trainer.cli", "tests.rig"])


def rows(count: int, seed: int = 0) -> list[bytes]:
    """Skewed prices that depend on the features, a record each."""
    random_ = random.Random(seed)
    values = []
    for number in range(count):
        size, kind = random_.expovariate(1.0), random_.choice("abc")
        price = 10 * size + {"a": 0, "b": 5, "c": 40}[kind] + random_.gauss(0, 1)
        record = {"id": number, "size": size, "age": random_.choice([None, 1, 2.5]), "kind": kind, "price": price}
        values.append(json.dumps(record).encode())
    return values


def send(settings: Settings, values: list[bytes], partitions: int = 1) -> None:
    schema = FeatureSchema.of(settings)
    assert publish(settings, schema, values, partitions=partitions).sent == len(values)


class Trainer:
    """`tailstream train` in a process of its own; its log is beside its configuration.

    Args:
        config: its configuration.
        prelude: run in the process before it begins, to make its world a bad one.
        wait: whether to come back only when it handles signals.
    """

    def __init__(self, config: Path, prelude: Callable[[], None] | None = None, *, wait: bool = True) -> None:
        self.log = config.with_suffix(".log")
        self.log.touch()
        begun = self.log.read_text().count(STARTED)
        self._process = _processes.Process(target=_train, args=(config, self.log, prelude, _settings()), daemon=True)
        self._process.start()
        deadline = time.monotonic() + WAIT_S
        while wait and self.log.read_text().count(STARTED) == begun and self.poll() is None:
            assert time.monotonic() < deadline, "the trainer did not start"
            time.sleep(0.02)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout_s: float = WAIT_S) -> int:
        self._process.join(timeout_s)
        assert self._process.exitcode is not None, f"it did not end in {timeout_s} s"
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()
        self.wait()

    def stop(self) -> int:
        os.kill(self.pid, signal.SIGTERM)
        return self.wait()

    def says(self, text: str, times: int = 1) -> None:
        """Waits until the log has a text so often."""
        wait_until(lambda: self.log.read_text().count(text) >= times, f"{text!r} {times} times in the log")


class Job:
    """Trainers that torchrun starts, and starts again when one of them is killed.

    Args:
        config: their configuration.
        ranks: how many.
        restarts: how often all of them may be started again.
    """

    def __init__(self, config: Path, ranks: int, restarts: int = 0) -> None:
        self.log = config.with_suffix(".log")
        self._ranks = ranks
        options = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
        command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "trainer", "--config", str(config)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=Path(__file__).parents[1])

    def pid(self, rank: int) -> int | None:
        """Of a rank, None where there is none at the moment."""
        with suppress(psutil.Error):
            for child in psutil.Process(self._process.pid).children():
                with suppress(psutil.Error):
                    if child.environ().get("RANK") == str(rank):
                        return child.pid
        return None

    def poll(self) -> int | None:
        return self._process.poll()

    def kill_rank(self, rank: int) -> None:
        pid = self.pid(rank)
        assert pid is not None, f"there is no rank {rank}: {self.log.read_text()[-2000:]}"
        os.kill(pid, signal.SIGKILL)

    def stop(self) -> list[str]:
        """Ends it as an operator would; the last words of each rank. What torchrun itself exits with says nothing."""
        begun = self.log.read_text().count(STOPPED)
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(WAIT_S)
        return [STOPPED] * (self.log.read_text().count(STOPPED) - begun)

    def kill(self) -> None:
        """Kills all there is."""
        with suppress(psutil.Error):
            for process in [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(True)]:
                with suppress(psutil.Error):
                    process.kill()
        self._process.wait(WAIT_S)


def _settings() -> dict[str, str]:
    """Those of the environment: trainers are forked from a process that was started before a test set them."""
    return {name: value for name, value in os.environ.items() if name.startswith("TAILSTREAM_")}


def _train(config: Path, log: Path, prelude: Callable[[], None] | None, settings: dict[str, str]) -> None:
    import typer

    from trainer.cli import train

    # Its end is this process's own, so it may have children as any trainer does, which multiprocessing forbids else.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(handle, stream)
    code = 0
    os.environ.update(settings)
    try:
        if prelude is not None:
            prelude()
        train(config)
    except typer.Exit as error:
        code = error.exit_code
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stderr.flush()
    os._exit(code)


def wait_until(done: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"{timeout_s} s, and not yet: {what}"
        time.sleep(0.02)


def newest(settings: Settings) -> Snapshot | None:
    snapshot, faults = open_store(settings.store).newest(training=True)
    assert faults == []
    return snapshot


def consumed(manifest: Manifest) -> int:
    return sum(p.trained + p.rejected + p.skipped for p in manifest.partitions.values())


def wait_until_consumed(
    settings: Settings, records: int, trainer: Trainer | Job, timeout_s: float = WAIT_S
) -> Snapshot:
    """The first snapshot that covers so many records."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        snapshot = newest(settings)
        if snapshot is not None and consumed(snapshot.manifest) >= records:
            return snapshot
        assert trainer.poll() is None, f"the trainer ended by itself: {trainer.log.read_text()[-2000:]}"
        time.sleep(0.02)
    raise AssertionError(f"{records} records were not consumed in {timeout_s} s: {trainer.log.read_text()[-2000:]}")


def each_once(part: PartitionProgress, first: int = 0) -> bool:
    """Whether every offset from `first` on was trained, and trained once."""
    offsets = range(first, part.next_offset)
    return (
        part.trained == len(offsets)
        and part.offset_sum == sum(offsets) % CHECKSUM_MODULUS
        and part.offset_square_sum == sum(o * o for o in offsets) % CHECKSUM_MODULUS
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: NaN equals itself, and 0 does not equal -0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def read_all(settings: Settings, topic: str, count: int) -> list[Record]:
    kafka = settings.kafka.model_copy(update={"topic": topic})
    with closing(Consumer(kafka)) as consumer:
        consumer.assign(dict.fromkeys(describe_topic(kafka, topic).partitions, 0))
        found: list[Record] = []
        deadline = time.monotonic() + 10
        while len(found) < count and time.monotonic() < deadline:
            found += consumer.poll(100, 0.2)
        return found


class Kafka:
    """A real Apache Kafka of one's own, to be ill-treated.

    Args:
        script: starts one: `SCRIPT --port N --data-dir DIR --cluster-id ID [--set KEY=VALUE ...]`.
        folder: where its data and its log go.
        sets: more `KEY=VALUE` for the server.
        port: to listen at; a free one by default.
    """

    def __init__(self, script: str, folder: Path, sets: Sequence[str] = (), port: int | None = None) -> None:
        self.port = port or free_port()
        self.server = f"127.0.0.1:{self.port}"
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        options = [part for item in sets for part in ("--set", item)]
        # Kafka's own tool takes an id that begins with a dash for an option.
        identity = "k" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:22]
        where = ["--port", str(self.port), "--data-dir", str(folder / "data"), "--cluster-id", identity]
        self._command = [script, *where, *options]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self._folder / "kafka.log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        wait_until(self._is_ready, f"Kafka is ready; see {self._folder / 'kafka.log'}")

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "kafka.log").read_text()[-2000:]
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            return cluster_id(KafkaSettings(bootstrap_servers=[self.server], topic="any"), timeout_s=1.0) is not None
        except (OSError, BrokerUnavailable):
            return False

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(60)
            self._process = None
