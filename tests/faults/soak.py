"""Everything at random for a long time: `python -m tests.faults.soak --seconds 3600` prints one table at the end."""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from tests.faults.case import Ground
from tests.faults.chaos import progress
from tests.faults.fuzz import fuzzed, key
from tests.faults.place import ground_or_leave
from tests.faults.stores import fill, small_disk
from tests.rig import Trainer, rows, wait_until
from trainer.audit import verify
from trainer.batching import CHECKSUM_MODULUS
from trainer.config import load
from trainer.kafka_client import Producer, create_topic
from trainer.letter_replay import read_letters
from trainer.snapshot import SnapshotStore


class Soak:
    """A trainer on a topic and a disk of its own, and things to do to them."""

    def __init__(self, ground: Ground, disk: Path, seed: int) -> None:
        self._ground = ground
        self._random = random.Random(seed)
        self._disk = disk
        config = ground.config(trainer__stop_grace_s="120.0")  # how fast this machine is, is not what it is about
        config.write_text(config.read_text().replace(str(load(config).store.path), str(disk / "snapshots")))
        self.config, self.settings = config, load(config)
        create_topic(self.settings.kafka, self.settings.kafka.topic, 1)
        self.sent = self.tombstones = 0
        self.tombstone_offsets = 0
        self.trainer = Trainer(config)

    def good_records(self) -> None:
        self._send(rows(self._random.randint(100, 5000), seed=self.sent))

    def strange_records(self) -> None:
        self._send(list(fuzzed(self._random.randint(100, 2000), seed=self.sent)))

    def _send(self, values: list[bytes] | list[bytes | None]) -> None:
        with closing(Producer(self.settings.kafka)) as producer:
            for value in values:
                producer.send(self.settings.kafka.topic, value, key(self.sent))
                if value is None:
                    self.tombstones += 1
                    self.tombstone_offsets += self.sent
                self.sent += 1
            producer.flush()

    def trainer_killed(self) -> None:
        time.sleep(self._random.uniform(0, 2))
        self.trainer.kill()
        self.trainer = Trainer(self.config)

    def trainer_stopped(self) -> None:
        self._stop()
        self.trainer = Trainer(self.config)

    def trainer_told_twice(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            with suppress(ProcessLookupError):  # it may have ended by the first
                os.kill(self.trainer.pid, number)
            time.sleep(self._random.uniform(0, 0.2))
        code = self.trainer.wait()
        assert code in (0, 130), f"exit code {code}: {self.trainer.log.read_text()[-3000:]}"
        self.trainer = Trainer(self.config)

    def reader_killed(self) -> None:
        for reader in psutil.Process(self.trainer.pid).children():
            reader.kill()
            code = self.trainer.wait()
            assert code == 4, f"exit code {code}: {self.trainer.log.read_text()[-3000:]}"
        if self.trainer.poll() is not None:
            self.trainer = Trainer(self.config)

    def second_trainer(self) -> None:
        code = Trainer(self.config, wait=False).wait()
        assert code == 5, f"a second trainer was let in: exit code {code}"

    def store_gone(self) -> None:
        path, aside = self.settings.store.path, self._disk / "aside"
        path.rename(aside)
        self.good_records()
        time.sleep(self._random.uniform(0, 5))
        aside.rename(path)

    def _stop(self) -> None:
        code = self.trainer.stop()
        assert code == 0, f"exit code {code}: {self.trainer.log.read_text()[-3000:]}"

    def trainer_frozen(self) -> None:
        os.kill(self.trainer.pid, signal.SIGSTOP)
        time.sleep(self._random.uniform(0, 3))
        os.kill(self.trainer.pid, signal.SIGCONT)

    def broker_killed(self) -> None:
        self._ground.kafka.kill()
        time.sleep(self._random.uniform(0, 5))
        self._ground.kafka.start()

    def broker_stopped(self) -> None:
        self._ground.kafka.stop()
        time.sleep(self._random.uniform(0, 10))
        self._ground.kafka.start()

    def store_full(self) -> None:
        fill(self._disk)
        self.good_records()
        time.sleep(self._random.uniform(0, 5))
        (self._disk / "ballast").unlink()

    def newest_snapshot_damaged(self) -> None:
        self._stop()
        store = SnapshotStore(self.settings.store.path)
        versions = store.versions()
        if len(versions) > 1:
            path = self._random.choice(sorted(store.storage.folder(versions[-1]).iterdir()))
            data = bytearray(path.read_bytes())
            data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
            path.write_bytes(data)
        self.trainer = Trainer(self.config)

    def rolled_back(self) -> None:
        self._stop()
        store = SnapshotStore(self.settings.store.path)
        with store.lock():
            snapshot, _ = store.newest(training=True)  # a roll back to a damaged one is refused
            if snapshot is not None:
                store.rollback(snapshot.manifest.version)
        self.trainer = Trainer(self.config)

    def settle(self) -> dict[str, bool]:
        """What must be true once everything sent has been read."""

        # What an hour has left to read may take long: only standing still is a fault.
        read = -1
        while read < self.sent:

            def goes_on(before: int = read) -> bool:
                assert self.trainer.poll() is None, self.trainer.log.read_text()[-3000:]
                return progress(self.settings) > before

            wait_until(goes_on, f"more than {read} of {self.sent} records are read", timeout_s=300)
            read = progress(self.settings)
        self._stop()
        store = SnapshotStore(self.settings.store.path)
        part = store.manifest(store.versions()[-1]).partitions[0]
        letters = {letter.offset for letter in read_letters(self.settings.kafka)}
        total = part.offset_sum + sum(letters) + self.tombstone_offsets
        faults = [verdict for verdict in verify(store) if verdict.faults and verdict.manifest is not None]
        return {
            "trained + rejected + skipped = sent": part.trained + part.rejected + part.skipped == self.sent,
            "skipped = tombstones": part.skipped == self.tombstones,
            "rejected = different dead letters": part.rejected == len(letters),
            "every offset once": (total - sum(range(self.sent))) % CHECKSUM_MODULUS == 0,
            "counters of all versions agree": not faults,
        }


ACTIONS = {
    "good records": (Soak.good_records, 6),
    "strange records": (Soak.strange_records, 3),
    "trainer killed": (Soak.trainer_killed, 4),
    "trainer stopped": (Soak.trainer_stopped, 1),
    "trainer frozen": (Soak.trainer_frozen, 1),
    "trainer told to stop twice": (Soak.trainer_told_twice, 1),
    "process that reads killed": (Soak.reader_killed, 1),
    "second trainer": (Soak.second_trainer, 1),
    "broker killed": (Soak.broker_killed, 1),
    "broker stopped": (Soak.broker_stopped, 1),
    "store full": (Soak.store_full, 1),
    "store gone and back": (Soak.store_gone, 1),
    "newest snapshot damaged": (Soak.newest_snapshot_damaged, 1),
    "rolled back": (Soak.rolled_back, 1),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    random_ = random.Random(options.seed)
    done: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="tailstream-soak-") as folder:
        ground = ground_or_leave(parser, Path(folder))
        try:
            with small_disk(Path(folder) / "disk", "32m"):
                soak = Soak(ground, Path(folder) / "disk", options.seed)
                soak.good_records()  # so that there is something to do it to
                until = time.monotonic() + options.seconds
                while time.monotonic() < until:
                    (name,) = random_.choices(list(ACTIONS), [weight for _, weight in ACTIONS.values()])
                    ACTIONS[name][0](soak)
                    done[name] += 1
                results = soak.settle()
        finally:
            ground.close()
    table = Table(title=f"{options.seconds:g} s, seed {options.seed}, {soak.sent} records")
    table.add_column("done")
    table.add_column("times", justify="right")
    for name in ACTIONS:
        table.add_row(name, str(done[name]))
    table.add_section()
    for name, fine in results.items():
        table.add_row(name, "yes" if fine else "NO")
    Console().print(table)
    return int(not all(results.values()))


if __name__ == "__main__":
    sys.exit(main())
