"""SIGKILL at random moments: every record in the state once, the weights those of a trainer that nobody disturbed.

`python -m tests.faults.chaos --kills 100 --records 200000 --partitions 1 --json FILE`
"""

import argparse
import hashlib
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.faults.case import Ground
from tests.faults.place import ground_or_leave
from tests.rig import STARTED, Job, Trainer, consumed, each_once, newest, rows, send, wait_until
from trainer.audit import verify
from trainer.config import Settings, load
from trainer.snapshot import Snapshot, SnapshotStore, open_store

RSS_RECORDS = 100_000  # after which memory is measured first
CHUNK = 20_000
UNHURRIED = {"trainer__stop_grace_s": "120.0"}  # how fast this machine is, is not what it is about


class Outcome(NamedTuple):
    kills: int
    missing: int
    duplicated: int
    weights_sha256: str
    reference_sha256: str
    torn: int
    rss_ratio: float | None  # None where it was not asked for

    @property
    def fine(self) -> bool:
        same = self.weights_sha256 == self.reference_sha256
        return same and not (self.missing or self.duplicated or self.torn) and self.is_flat

    @property
    def is_flat(self) -> bool:
        """Whether memory stayed as it was; where it was not measured, nothing is known against it."""
        return self.rss_ratio is None or self.rss_ratio <= 1.1


def run(
    ground: Ground,
    server: str,
    kills: int,
    records: int,
    partitions: int,
    rss_records: int = 0,
    *,
    in_s3: bool = False,
    client: str = "python",
    ranks: int = 1,
) -> Outcome:
    """Trains on one topic twice, once killed and once undisturbed, and compares.

    With several partitions or ranks the order of records between them differs from run to run, so the weights do too:
    then the reference is the killed run itself, and the counters speak.
    """
    store = ground.in_s3() if in_s3 else {}
    wait_s = "600.0" if partitions == 1 else "0.05"
    config = ground.config(server, batch__max_wait_s=wait_s, kafka__client=f'"{client}"', **UNHURRIED, **store)
    settings = load(config)
    records -= records % settings.batch.size  # full batches only
    for begin in range(0, records, CHUNK):
        send(settings, rows(min(CHUNK, records - begin), seed=begin), partitions)
    if ranks == 1:
        torn, done = _killed(config, settings, kills, records)
    else:
        torn, done = _ranks_killed(config, settings, kills, records, ranks)
    snapshot = newest(settings)
    assert snapshot is not None
    torn += sum(bool(verdict.faults) for verdict in verify(open_store(settings.store)))
    parts = snapshot.manifest.partitions
    trained = sum(part.trained for part in parts.values())
    wrong = sum(not each_once(part) for part in parts.values())  # at least so many, where the numbers cancel out
    weights = digest(snapshot)
    reference = weights if partitions > 1 or ranks > 1 else _undisturbed(ground, server, settings, records)
    return Outcome(
        kills=done,
        missing=max(records - trained, 0) or wrong,
        duplicated=max(trained - records, 0) or wrong,
        weights_sha256=weights,
        reference_sha256=reference,
        torn=torn,
        rss_ratio=_rss_ratio(ground, server, rss_records) if rss_records > RSS_RECORDS else None,
    )


def _killed(config: Path, settings: Settings, kills: int, records: int) -> tuple[int, int]:
    """Kills trainers until so many are dead, then lets one finish; returns torn snapshots seen, and kills."""
    random_ = random.Random(kills)
    marks = sorted(random_.uniform(0, 0.97) * records for _ in range(kills))
    torn = 0
    for mark in marks:
        trainer = Trainer(config)
        if random_.random() < 0.2:  # not only while it trains
            time.sleep(random_.uniform(0, 1.0))
        else:
            wait_until(lambda mark=mark: progress(settings) >= mark, f"{mark} records", 600)  # type: ignore[misc]
            time.sleep(random_.uniform(0, 0.15))
        assert trainer.poll() is None, trainer.log.read_text()[-2000:]
        trainer.kill()
        torn += len(open_store(settings.store).newest(training=True)[1])
    trainer = Trainer(config)
    wait_until(lambda: progress(settings) >= records, f"all {records} records", timeout_s=600)
    assert trainer.stop() == 0
    return torn, len(marks)


def _ranks_killed(config: Path, settings: Settings, kills: int, records: int, ranks: int) -> tuple[int, int]:
    """The same to one rank at a time of a job that torchrun starts again."""
    random_ = random.Random(kills)
    marks = sorted(random_.uniform(0, 0.97) * records for _ in range(kills))
    torn = 0
    job = Job(config, ranks, restarts=kills)
    try:
        for mark in marks:
            rank = random_.randrange(ranks)
            started = job.log.read_text().count(STARTED)
            if random_.random() < 0.8:
                wait_until(lambda mark=mark: progress(settings) >= mark, f"{mark} records", 600)  # type: ignore[misc]
            time.sleep(random_.uniform(0, 0.15))
            wait_until(lambda rank=rank: job.pid(rank) is not None, f"rank {rank} is there", 600)  # type: ignore[misc]
            job.kill_rank(rank)
            wait_until(lambda: job.log.read_text().count(STARTED) > started, "it is started again", 600)  # noqa: B023
            torn += len(open_store(settings.store).newest(training=True)[1])
        wait_until(lambda: progress(settings) >= records, f"all {records} records", timeout_s=600)
        assert len(job.stop()) == ranks, job.log.read_text()[-2000:]
    finally:
        job.kill()
    return torn, len(marks)


_stores: dict[str, SnapshotStore] = {}


def _store(settings: Settings) -> SnapshotStore:
    """The same one each time: it is asked often, and one in S3 has connections."""
    return _stores.setdefault(settings.store.url, open_store(settings.store))


def progress(settings: Settings) -> int:
    store = _store(settings)
    versions = store.versions()
    return consumed(store.manifest(versions[-1])) if versions else 0


def _undisturbed(ground: Ground, server: str, settings: Settings, records: int) -> str:
    config = ground.config(server, topic=settings.kafka.topic, batch__max_wait_s="600.0", **UNHURRIED)
    other = load(config)
    trainer = Trainer(config)
    wait_until(lambda: progress(other) >= records, f"all {records} records", timeout_s=600)
    assert trainer.stop() == 0
    snapshot = newest(other)
    assert snapshot is not None
    return digest(snapshot)


def digest(snapshot: Snapshot) -> str:
    """Of every tensor of the state: weights, optimiser, scalers, replay buffer, generators."""
    found = hashlib.sha256()
    for kind in (snapshot.model, snapshot.training):
        for name in sorted(kind):
            found.update(name.encode())
            found.update(kind[name].contiguous().reshape(-1).view(dtype=_bytes()).numpy().tobytes())
    return found.hexdigest()


def _bytes() -> Any:
    import torch

    return torch.uint8


def _rss_ratio(ground: Ground, server: str, records: int) -> float:
    """Memory of a trainer and the process that reads for it, after so many records, over that after 100,000."""
    config = ground.config(server, learner__replay_steps="0", batch__size="256", learner__step_rows="256")
    settings = load(config)
    values = rows(CHUNK)
    sent = itertools.count(CHUNK, CHUNK)
    send(settings, values)
    trainer = Trainer(config)
    process = psutil.Process(trainer.pid)
    measured: list[int] = []

    def has(count: int) -> bool:
        assert trainer.poll() is None, f"the trainer ended by itself: {trainer.log.read_text()[-2000:]}"
        return progress(settings) >= count

    for mark in (RSS_RECORDS, records):
        for total in _until(sent, mark):
            send(settings, values)
            # Ahead of the trainer, so that it is never idle, and not so far that the disk fills.
            wait_until(lambda total=total: has(total - 10 * CHUNK), "it keeps up", 600)  # type: ignore[misc]
        wait_until(lambda mark=mark: has(mark), f"{mark} records", 600)  # type: ignore[misc]
        measured.append(sum(each.memory_info().rss for each in (process, *process.children())))
    trainer.kill()
    return measured[1] / measured[0]


def _until(sent: Iterator[int], mark: int) -> Iterator[int]:
    for total in sent:
        yield total
        if total >= mark:
            return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--partitions", type=int, default=1)
    parser.add_argument("--rss-records", type=int, default=2_000_000, help="0 measures no memory")
    parser.add_argument(
        "--store", choices=["disk", "s3"], default="disk", help="where the killed trainers' snapshots lie"
    )
    parser.add_argument("--client", choices=["python", "confluent"], default="python", help="kafka.client")
    parser.add_argument("--ranks", type=int, default=1, help="of a job by torchrun, of which one at a time is killed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if 0 < options.rss_records <= RSS_RECORDS:
        parser.error(
            f"--rss-records: memory is compared with that after {RSS_RECORDS} records, so ask for more, or for 0"
        )
    with tempfile.TemporaryDirectory(prefix="tailstream-chaos-") as folder:
        ground = ground_or_leave(parser, Path(folder))
        try:
            server = ground.kafka.server
            counts = options.kills, options.records, options.partitions, options.rss_records
            where = {"in_s3": options.store == "s3", "client": options.client}
            outcome = run(ground, server, *counts, ranks=options.ranks, **where)
        finally:
            ground.close()
    text = json.dumps(outcome._asdict(), indent=1)
    print(text)
    if outcome.rss_ratio is None:
        print("memory was not measured: --rss-records 0", file=sys.stderr)
    if options.json:
        options.json.write_text(text + "\n")
    return int(not outcome.fine)


if __name__ == "__main__":
    sys.exit(main())
