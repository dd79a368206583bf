"""Ranks that torchrun starts: each record enters the state once, whichever is killed and however many there are."""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rig import STARTED, Job, Trainer, each_once, read_all, rows, send, wait_until_consumed
from trainer.batching import Record
from trainer.config import load
from trainer.dead_letter import HEADER_PREFIX
from trainer.kafka_client import Producer

PATIENCE_S = 400.0  # a start of two processes, beside other tests


def place_of(letter: Record) -> tuple[int, int]:
    headers = dict(letter.headers)
    return int(headers[f"{HEADER_PREFIX}partition"]), int(headers[f"{HEADER_PREFIX}offset"])


@pytest.fixture
def job() -> Iterator[Callable[..., Job]]:
    started: list[Job] = []

    def start(config: Path, ranks: int, restarts: int = 0) -> Job:
        started.append(Job(config, ranks, restarts))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.mark.timeout(900)
def test_ranks_killed_and_then_one_alone_learn_every_record_once(
    broker: str, write_config: Callable[..., Path], job: Callable[..., Job]
) -> None:
    config = write_config(broker, more="batch.max_wait_s = 0.05")
    settings = load(config)
    values = rows(4000)
    bad = [b'{"price": "dear"}'] * 40
    for begin in range(0, 4000, 100):
        values.insert(begin, bad[0])
    send(settings, values, partitions=3)
    random_ = random.Random(1)
    ranks = job(config, 2, restarts=20)
    for kill, share in enumerate((0.1, 0.5)):
        wait_until_consumed(settings, int(share * len(values)), ranks, PATIENCE_S)
        time.sleep(random_.uniform(0, 0.2))
        ranks.kill_rank(1 - kill)
    snapshot = wait_until_consumed(settings, len(values), ranks, PATIENCE_S)
    assert len(ranks.stop()) == 2
    parts = snapshot.manifest.partitions
    assert sorted(parts) == [0, 1, 2]
    assert sum(part.trained for part in parts.values()) == 4000 == snapshot.manifest.samples
    assert sum(part.rejected for part in parts.values()) == len(bad)
    assert ranks.log.read_text().count(STARTED) >= 2 * 3
    letters = read_all(settings, settings.kafka.dead_letters, 10 * len(bad))
    places = {
        tuple(dict(letter.headers)[HEADER_PREFIX + name] for name in ("partition", "offset")) for letter in letters
    }
    assert len(places) == len(bad)

    producer = Producer(settings.kafka)
    for value in rows(300, seed=1):
        producer.send(settings.kafka.topic, value)
    producer.flush()
    producer.close()
    alone = Trainer(config)
    snapshot = wait_until_consumed(settings, len(values) + 300, alone)
    assert alone.stop() == 0
    assert snapshot.manifest.samples == 4300
    assert not any(name.startswith("rank") for name in snapshot.training)


@pytest.mark.timeout(900)
def test_a_rank_without_a_partition_holds_nobody_up_and_one_that_is_killed_ends_the_job_where_it_may_not_restart(
    embedded_broker: str, write_config: Callable[..., Path], job: Callable[..., Job]
) -> None:
    config = write_config(embedded_broker, more="batch.max_wait_s = 0.05")
    settings = load(config)
    send(settings, rows(1000), partitions=1)
    ranks = job(config, 2)
    (part,) = wait_until_consumed(settings, 1000, ranks, PATIENCE_S).manifest.partitions.values()
    assert part.trained == 1000
    assert each_once(part)
    ranks.kill_rank(1)
    deadline = time.monotonic() + PATIENCE_S
    while ranks.poll() is None:
        assert time.monotonic() < deadline, "it went on"
        time.sleep(0.1)
    log = ranks.log.read_text()
    assert "error: another rank of this job ended or does not answer" in log
    assert ranks.poll() != 0
