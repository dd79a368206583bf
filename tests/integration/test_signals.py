"""What SIGTERM and SIGINT do to a real trainer, at whatever moment they come."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from service.broker import free_port
from tests.rig import STARTED, Trainer, each_once, newest, rows, send, wait_until, wait_until_consumed
from trainer.config import Settings, load
from trainer.process import ABORTED, OVERDUE

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
WRITING = "a snapshot is being written"


def disk_that_waits(seconds: float) -> None:
    """Each fsync of this process says so and takes so long."""
    real = os.fsync

    def slow(handle: int) -> None:
        os.write(2, f"{WRITING}\n".encode())
        time.sleep(seconds)
        real(handle)

    os.fsync = slow


def disk_that_is_slow() -> None:
    disk_that_waits(0.3)


def disk_that_hangs() -> None:
    disk_that_waits(600.0)


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (caught,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(caught >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="signals are looked up in /proc")
def test_a_signal_while_it_is_imported_ends_it_cleanly(write_config: Callable[..., Path]) -> None:
    config = write_config(f"127.0.0.1:{free_port()}")
    command = [sys.executable, "-m", "trainer", "--config", str(config)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: handles(process.pid, signal.SIGTERM), "it handles signals")
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=PATIENCE_S)
    assert STARTED not in log  # else it came too late to show anything
    assert process.returncode == 0, log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_waits_for_the_broker_ends_it_cleanly(
    write_config: Callable[..., Path], number: signal.Signals
) -> None:
    trainer = Trainer(write_config(f"127.0.0.1:{free_port()}"))
    trainer.says("no Kafka broker answers")
    os.kill(trainer.pid, number)
    assert trainer.wait(PATIENCE_S) == 0


def trained(config: Path, settings: Settings, prelude: Callable[[], None], count: int) -> Trainer:
    """A trainer that learns so many records, and is writing its first snapshot."""
    settings.store.path.mkdir()  # by the trainer it would be written to disk at the start
    send(settings, rows(count))
    trainer = Trainer(config, prelude)
    trainer.says(WRITING)
    return trainer


def finishes(config: Path, settings: Settings, count: int) -> bool:
    """Whether a next trainer ends with each record once."""
    trainer = Trainer(config)
    snapshot = wait_until_consumed(settings, count, trainer)
    return trainer.stop() == 0 and snapshot.manifest.samples == count and each_once(snapshot.manifest.partitions[0])


def test_a_stop_waits_for_the_snapshot_that_is_being_written_and_for_the_last_one(
    embedded_broker: str, write_config: Callable[..., Path]
) -> None:
    config = write_config(embedded_broker, more="batch.max_wait_s = 0.05")
    settings = load(config)
    trainer = trained(config, settings, disk_that_is_slow, 200)
    assert trainer.stop() == 0
    snapshot = newest(settings)
    assert snapshot is not None
    assert snapshot.manifest.samples > 0
    assert each_once(snapshot.manifest.partitions[0])
    assert finishes(config, settings, 200)


def test_a_second_signal_during_the_last_snapshot_ends_it_at_once_and_nothing_is_torn(
    embedded_broker: str, write_config: Callable[..., Path]
) -> None:
    config = write_config(embedded_broker, more="batch.max_wait_s = 0.05")
    settings = load(config)
    trainer = trained(config, settings, disk_that_hangs, 200)
    os.kill(trainer.pid, signal.SIGTERM)
    trainer.says('"stopping"')
    os.kill(trainer.pid, signal.SIGINT)
    assert trainer.wait(PATIENCE_S) == ABORTED == 130
    assert newest(settings) is None
    assert finishes(config, settings, 200)


def test_a_stop_that_takes_longer_than_its_grace_ends_with_its_own_code_and_nothing_is_torn(
    embedded_broker: str, write_config: Callable[..., Path]
) -> None:
    config = write_config(embedded_broker, more="batch.max_wait_s = 0.05\ntrainer.stop_grace_s = 0.5")
    settings = load(config)
    trainer = trained(config, settings, disk_that_hangs, 200)
    assert trainer.stop() == OVERDUE == 3
    log = trainer.log.read_text()
    assert "the stop took too long" in log
    assert "MainThread" in log  # and what it waits for
    assert newest(settings) is None
    assert finishes(config, settings, 200)
