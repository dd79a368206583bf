"""What is read of a topic whose partitions are empty, are added, or end with a transaction's marker."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import kafka
import kafka.admin
import pytest

from tests.rig import Trainer, each_once, newest, rows, send, wait_until, wait_until_consumed
from trainer.batching import PartitionProgress, Record
from trainer.config import Settings, load
from trainer.errors import TopicChanged
from trainer.kafka_client import Consumer, create_topic
from trainer.source import KafkaSource


@contextmanager
def opened(settings: Settings, progress: dict[int, PartitionProgress] | None = None) -> Iterator[KafkaSource]:
    source = KafkaSource(settings.kafka, threading.Event())
    with closing(source):
        source.wait()
        source.open(progress or {})
        yield source


def read(source: KafkaSource, count: int) -> list[Record]:
    found: list[Record] = []

    def enough() -> bool:
        found.extend(source.poll(1000, 0.1))
        return len(found) >= count

    wait_until(enough, f"{count} records are read")
    return found


def add_partitions(settings: Settings, total: int) -> None:
    with closing(kafka.admin.KafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)) as client:
        client.create_partitions({settings.kafka.topic: total})


@pytest.fixture
def start_at_latest(real_kafka: str, write_config: Callable[..., Path]) -> Callable[[int], tuple[Path, Trainer]]:
    """Makes a topic of so many partitions, and a trainer that reads what comes from now on."""

    def start(partitions: int) -> tuple[Path, Trainer]:
        config = write_config(real_kafka, more='batch.max_wait_s = 0.05\nkafka.start = "latest"')
        settings = load(config)
        create_topic(settings.kafka, settings.kafka.topic, partitions)
        trainer = Trainer(config)
        trainer.says("reading")
        return config, trainer

    return start


def test_partitions_added_while_the_trainer_runs_are_learned_from_once_each(
    start_at_latest: Callable[[int], tuple[Path, Trainer]],
) -> None:
    config, trainer = start_at_latest(1)
    settings = load(config)
    send(settings, rows(100))
    wait_until_consumed(settings, 100, trainer)
    add_partitions(settings, 3)
    send(settings, rows(300))  # a new producer knows all partitions at once
    parts = wait_until_consumed(settings, 400, trainer).manifest.partitions
    assert trainer.stop() == 0
    assert sorted(parts) == [0, 1, 2]
    assert sum(part.trained for part in parts.values()) == 400
    assert all(each_once(part) for part in parts.values())


def test_what_comes_to_an_empty_partition_while_the_trainer_is_away_is_not_passed_over(
    start_at_latest: Callable[[int], tuple[Path, Trainer]],
) -> None:
    config, trainer = start_at_latest(2)
    settings = load(config)
    with closing(kafka.KafkaProducer(bootstrap_servers=settings.kafka.bootstrap_servers)) as producer:
        for value in rows(50):
            producer.send(settings.kafka.topic, value, partition=0)
        producer.flush()
        parts = wait_until_consumed(settings, 50, trainer).manifest.partitions
        assert parts[1] == PartitionProgress(next_offset=0)
        trainer.kill()
        for value in rows(50):
            producer.send(settings.kafka.topic, value, partition=1)
        producer.flush()
    trainer = Trainer(config)
    parts = wait_until_consumed(settings, 100, trainer).manifest.partitions
    assert trainer.stop() == 0
    assert all(part.trained == 50 and each_once(part) for part in parts.values())


def test_what_comes_after_a_first_start_at_the_latest_is_not_passed_over(
    start_at_latest: Callable[[int], tuple[Path, Trainer]],
) -> None:
    config, trainer = start_at_latest(1)
    settings = load(config)
    wait_until(lambda: newest(settings) is not None, "where it begins is saved")
    trainer.kill()
    send(settings, rows(50))
    trainer = Trainer(config)
    (part,) = wait_until_consumed(settings, 50, trainer).manifest.partitions.values()
    assert trainer.stop() == 0
    assert part.trained == 50
    assert each_once(part)


def test_a_topic_with_fewer_partitions_than_were_learned_from_is_refused(
    broker: str, settings_for: Callable[..., Settings]
) -> None:
    settings = settings_for(broker)
    send(settings, rows(10), partitions=2)
    progress = {partition: PartitionProgress(next_offset=1) for partition in range(4)}
    refused = pytest.raises(
        TopicChanged, match=r"has partitions \[0, 1\], but the snapshot has progress in \[2, 3\] too"
    )
    with refused, opened(settings, progress):
        pass


def test_lag_counts_from_where_reading_began(real_kafka: str, settings_for: Callable[..., Settings]) -> None:
    settings = settings_for(real_kafka, more='kafka.start = "latest"')
    send(settings, rows(30), partitions=1)
    with opened(settings) as source:
        send(settings, rows(20))
        records = read(source, 20)
        assert [record.offset for record in records] == list(range(30, 50))
        assert source.standing().lag({}) == {0: 20}
        assert source.standing().lag({0: PartitionProgress(next_offset=45)}) == {0: 5}
        assert source.standing().lag({0: PartitionProgress(next_offset=50)}) == {0: 0}


def test_the_marker_at_the_end_of_a_transaction_is_no_lag_here_nor_for_the_group(
    real_kafka: str, settings_for: Callable[..., Settings]
) -> None:
    settings = settings_for(real_kafka)
    create_topic(settings.kafka, settings.kafka.topic, 1)
    with closing(
        kafka.KafkaProducer(
            bootstrap_servers=settings.kafka.bootstrap_servers, transactional_id=f"{settings.kafka.topic}-1"
        )
    ) as producer:
        producer.init_transactions()
        producer.begin_transaction()
        for value in rows(10):
            producer.send(settings.kafka.topic, value)
        producer.commit_transaction()
    with opened(settings) as source:
        assert len(read(source, 10)) == 10
        learned = {0: PartitionProgress(next_offset=10)}

        def caught_up() -> bool:
            source.poll(1000, 0.1)
            return source.standing().lag(learned) == {0: 0}

        wait_until(caught_up, "the marker is passed")
        assert source.standing().lag({0: PartitionProgress(next_offset=9)})[0] > 0  # one is to be learned
        source.commit({0: PartitionProgress(next_offset=9)})
        source.poll(1000, 0.1)
        source.commit(learned)
    with closing(Consumer(settings.kafka)) as consumer:
        assert consumer.committed([0]) == {0: 11}
