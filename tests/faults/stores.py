"""What a disk, a clock and a death do to snapshots."""

import builtins
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from tests.faults.brokers import outcome
from tests.faults.case import Ground, case
from tests.rig import Trainer, newest, rows, send, wait_until, wait_until_consumed
from tests.service.store import make_settings, manifest
from trainer.config import Settings, load
from trainer.snapshot import MODEL_FILE, TRAINING_FILE, SnapshotStore
from trainer.storage import MANIFEST_FILE

FAILED = "no snapshot: training goes on"
WORKS = "snapshots are written again"


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    """A tmpfs of its own at a path."""
    path.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))
    try:
        yield
    finally:
        _run("umount", "-l", str(path))


def on_small_disk(ground: Ground, ill: Callable[[Path], None], well: Callable[[Path], None]) -> str:
    """Trains while the store's disk is ill, and after it is well again."""
    config, settings = ground.settings()
    disk = settings.store.path.parent / "disk"
    config.write_text(config.read_text().replace(str(settings.store.path), str(disk / "snapshots")))
    settings = load(config)
    with small_disk(disk, "16m"):
        send(settings, rows(200))
        trainer = Trainer(config)
        wait_until_consumed(settings, 200, trainer)
        ill(disk)
        send(settings, rows(200, seed=1))
        trainer.says(FAILED)
        before = newest(settings)
        torn = before is None or before.manifest.samples != 200
        well(disk)
        trainer.says(WORKS)
        wait_until_consumed(settings, 400, trainer)
        log = trainer.log.read_text()
        seen = f"{'TORN, ' if torn else ''}{outcome(settings, trainer)}"
        leftovers = [path.name for path in settings.store.path.glob(".tmp-*")]
    return f"{seen}; said {log.count(FAILED)} and {log.count(WORKS)} times{f', left {leftovers}' if leftovers else ''}"


def fill(disk: Path) -> None:
    """Leaves no room at all."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        for size in (65536, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


ON_DISK = "400 records, each once; said 1 and 1 times"


@case("store full", ON_DISK)
def store_full(ground: Ground) -> str:
    return on_small_disk(ground, fill, lambda disk: (disk / "ballast").unlink())


@case("started on a full store", "learns on, saves once there is room; 400 records, each once")
def started_on_full_store(ground: Ground) -> str:
    config, settings = ground.settings()
    disk = settings.store.path.parent / "disk"
    config.write_text(config.read_text().replace(str(settings.store.path), str(disk / "snapshots")))
    settings = load(config)
    with small_disk(disk, "16m"):
        send(settings, rows(200))
        trainer = Trainer(config)
        wait_until_consumed(settings, 200, trainer)
        assert trainer.stop() == 0
        send(settings, rows(200, seed=1))
        fill(disk)
        trainer = Trainer(config)
        trainer.says(FAILED)
        (disk / "ballast").unlink()
        trainer.says(WORKS)
        wait_until_consumed(settings, 400, trainer)
        return f"learns on, saves once there is room; {outcome(settings, trainer)}"


@case("store read-only", ON_DISK)
def store_read_only(ground: Ground) -> str:
    # The trainer's lock file is open for writing, so the disk itself cannot be made read-only: a mount over it is.
    def read_only(disk: Path) -> None:
        _run("mount", "--bind", str(disk), str(disk))
        _run("mount", "-o", "remount,bind,ro", str(disk))

    return on_small_disk(ground, read_only, lambda disk: _run("umount", str(disk)))


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


@case("store gone and back", "400 records, each once; said 1 and 1 times")
def store_gone(ground: Ground) -> str:
    config, settings = ground.settings()
    path, aside = settings.store.path, settings.store.path.with_name("aside")
    send(settings, rows(200))
    trainer = Trainer(config)
    wait_until_consumed(settings, 200, trainer)
    path.rename(aside)
    send(settings, rows(200, seed=1))
    trainer.says(FAILED)
    aside.rename(path)
    trainer.says(WORKS)
    wait_until_consumed(settings, 400, trainer)
    log = trainer.log.read_text()
    return f"{outcome(settings, trainer)}; said {log.count(FAILED)} and {log.count(WORKS)} times"


@case("second trainer on one store", "exit 5 naming the first; rollback refused; the first goes on")
def second_trainer(ground: Ground) -> str:
    config, settings = ground.settings()
    send(settings, rows(100))
    first = Trainer(config)
    wait_until_consumed(settings, 100, first)
    second = Trainer(config, wait=False)
    code = second.wait()
    named = "naming the first" if f"pid {first.pid}" in second.log.read_text() else "WITHOUT the first's name"
    done = subprocess.run(
        [sys.executable, "-m", "service", "snapshots", "rollback", "1", "--config", str(config)],
        check=False,
        capture_output=True,
        cwd=Path(__file__).parents[2],
    )
    refused = "rollback refused" if done.returncode == 5 else f"rollback: {done.returncode}"
    send(settings, rows(100, seed=1))
    wait_until_consumed(settings, 200, first)
    assert first.stop() == 0
    return f"exit {code} {named}; {refused}; the first goes on"


def slow_disk() -> None:
    """Every fsync of this process takes a quarter of a second."""
    real = os.fsync

    def slow(handle: int) -> None:
        time.sleep(0.25)
        real(handle)

    os.fsync = slow


@case("slow disk", "training goes on during a save; 1000 records, each once")
def disk_is_slow(ground: Ground) -> str:
    config, settings = ground.settings(store__interval_s="0.0")
    send(settings, rows(500))
    trainer = Trainer(config, slow_disk)
    wait_until_consumed(settings, 1, trainer)
    send(settings, rows(500, seed=1))
    wait_until_consumed(settings, 1000, trainer)
    versions = SnapshotStore(settings.store.path).versions()
    goes_on = "training goes on" if len(versions) < 1000 / settings.batch.size / 2 else "training waits"
    return f"{goes_on} during a save; {outcome(settings, trainer)}"


def jumping_clock() -> None:
    """The wall clock of this process is a day ahead or behind, by turns."""
    real, turns = time.time, iter(range(10**9))
    time.time = lambda: real() + (-1) ** next(turns) * 86400.0


@case("clock jumps", "400 records, each once; newest versions kept")
def clock_jumps(ground: Ground) -> str:
    config, settings = ground.settings(store__interval_s="0.0")
    send(settings, rows(200))
    trainer = Trainer(config, jumping_clock)
    wait_until_consumed(settings, 200, trainer)
    send(settings, rows(200, seed=1))
    wait_until_consumed(settings, 400, trainer)
    kept = SnapshotStore(settings.store.path).versions()
    newest_kept = "newest versions kept" if len(kept) >= min(5, kept[-1]) else f"only {kept} kept"
    return f"{outcome(settings, trainer)}; {newest_kept}"


@case("a flipped bit in the newest snapshot", "passed over, each file; 300 records, each once")
def flipped_bit(ground: Ground) -> str:
    config, settings = ground.settings()
    send(settings, rows(100))
    seen = set()
    for turn, name in enumerate((MODEL_FILE, TRAINING_FILE, MANIFEST_FILE)):
        trainer = Trainer(config)
        wait_until_consumed(settings, 100 * (turn + 1), trainer)
        assert trainer.stop() == 0
        store = SnapshotStore(settings.store.path)
        path = store.storage.folder(store.versions()[-1]) / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        before = trainer.log.read_text().count("passed over")
        if turn < 2:
            send(settings, rows(100, seed=turn + 1))
        trainer = Trainer(config)
        trainer.says("passed over", before + 1)
        _sound(settings, min(300, 100 * (turn + 2)), trainer)
        assert trainer.stop() == 0
        seen.add(name)
    snapshot, _ = SnapshotStore(settings.store.path).newest(training=True)
    assert snapshot is not None
    trainer = Trainer(config)
    return f"passed over, {'each file' if len(seen) == 3 else seen}; {_final(settings, trainer)}"


def _sound(settings: Settings, samples: int, trainer: Trainer) -> None:
    def there() -> bool:
        snapshot, _ = SnapshotStore(settings.store.path).newest(training=True)
        return snapshot is not None and snapshot.manifest.samples >= samples

    wait_until(there, f"{samples} samples; {trainer.log}")


def _final(settings: Settings, trainer: Trainer) -> str:
    from tests.rig import consumed, each_once

    snapshot, _ = SnapshotStore(settings.store.path).newest(training=True)
    assert snapshot is not None
    assert trainer.stop() == 0
    once = all(each_once(part) for part in snapshot.manifest.partitions.values())
    return f"{consumed(snapshot.manifest)} records, {'each once' if once else 'NOT each once'}"


# Death after each file operation


def write(store: SnapshotStore, value: float) -> int:
    tensors = {"weight": torch.full((64, 64), value)}
    return store.write(manifest(make_settings(store.storage.path)), tensors, tensors).version


def die_after(number: int, path: Path) -> None:
    """Writes and prunes as a trainer does, and is killed by SIGKILL right after its `number`-th file operation.

    A write is killed when half of it is there.
    """
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if done == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(act: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = act(*args, **kwargs)
            count()
            return result

        return run

    class Halved(io.FileIO):
        def write(self, data: Any) -> int:
            if data:
                half = len(data) // 2
                super().write(data[:half])
                count()
                super().write(data[half:])
                count()
            return len(data)

    store = SnapshotStore(path)
    for name in ("mkdir", "rename", "unlink", "rmdir", "fsync", "open", "close", "replace", "truncate", "pwrite"):
        setattr(os, name, counted(getattr(os, name)))
    opened = builtins.open
    builtins.open = lambda file, mode="r", *rest, **more: (  # type: ignore[assignment]
        Halved(file, mode.replace("b", "")) if "b" in mode and "x" in mode else opened(file, mode, *rest, **more)
    )
    with store.lock():
        write(store, 2.0)
        store.prune(time.time())
        store.pin(store.versions()[-1])
    os._exit(0)


@case("death after every single file operation", "at each: the old or the new snapshot whole, the next write works")
def death_after_every_file_operation(ground: Ground) -> str:
    path = ground.folder / "deaths"
    processes = multiprocessing.get_context("forkserver")
    number, faults, codes = 0, [], {-signal.SIGKILL}
    while codes == {-signal.SIGKILL}:
        number += 1
        store = SnapshotStore(path / str(number))
        store.storage.path.mkdir(parents=True)
        for _ in range(6):  # so that there is one to remove
            write(store, 1.0)
        process = processes.Process(target=die_after, args=(number, store.storage.path), daemon=True)
        process.start()
        process.join(60)
        codes = {process.exitcode or 0}
        snapshot, torn = store.newest(training=True)
        value = None if snapshot is None else float(snapshot.training["weight"][0, 0])
        if torn or snapshot is None or value != {6: 1.0, 7: 2.0}.get(snapshot.manifest.version):
            faults.append(f"operation {number}: {torn or value}")
        if store.active() not in (None, 7):
            faults.append(f"operation {number}: pinned {store.active()}")
        with store.lock():
            version = write(store, 3.0)
        if (
            list(store.storage.path.glob(".tmp-*"))
            or store.load(version, training=True).training["weight"][0, 0] != 3.0
        ):
            faults.append(f"operation {number}: the next write")
    if codes != {0} or number < 20:
        faults.append(f"{number} operations, exit {codes}")
    return "; ".join(faults) or "at each: the old or the new snapshot whole, the next write works"
