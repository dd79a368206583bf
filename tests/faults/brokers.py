"""What brokers and topics do to a trainer."""

import os
import re
import shutil
import time
import urllib.request
from contextlib import closing
from typing import Any, Final

import kafka
import kafka.admin

from tests.faults.case import Ground, case
from tests.rig import (
    Kafka,
    Trainer,
    consumed,
    each_once,
    newest,
    read_all,
    rows,
    send,
    wait_until,
    wait_until_consumed,
)
from trainer.config import Settings
from trainer.kafka_client import Consumer, Producer
from trainer.process import OVERDUE

AWAY_S: Final = float(os.environ.get("TAILSTREAM_TEST_AWAY_S", "5"))  # how long the stopped broker stays away
AWAY: Final = "the broker is away"
BACK: Final = "the broker is there"


def admin(settings: Settings) -> Any:
    return closing(kafka.KafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers))


def outcome(settings: Settings, trainer: Trainer) -> str:
    """How a trainer that was not stopped goes on: whether each record is in the state once."""
    snapshot = newest(settings)
    assert snapshot is not None
    assert trainer.stop() == 0
    once = all(each_once(part) for part in snapshot.manifest.partitions.values())
    return f"{consumed(snapshot.manifest)} records, {'each once' if once else 'NOT each once'}"


def said(trainer: Trainer) -> str:
    log = trainer.log.read_text()
    return f"said {log.count(AWAY)} away, {log.count(BACK)} back"


@case("broker SIGKILLed and restarted in mid-stream", "6000 records, each once; said 1 away, 1 back")
def broker_killed(ground: Ground) -> str:
    config, settings = ground.settings()
    send(settings, rows(3000))
    trainer = Trainer(config)
    wait_until_consumed(settings, 500, trainer)
    ground.kafka.kill()
    trainer.says(AWAY)
    ground.kafka.start()
    send(settings, rows(3000, seed=1))
    wait_until_consumed(settings, 6000, trainer)
    trainer.says(BACK)
    return f"{outcome(settings, trainer)}; {said(trainer)}"


@case("broker stopped for long", "400 records, each once; said 1 away, 1 back; broker_up 1 0 1")
def broker_stopped(ground: Ground) -> str:
    config, settings = ground.settings()
    send(settings, rows(200))
    trainer = Trainer(config)
    wait_until_consumed(settings, 200, trainer)
    up = [metric(trainer, "broker_up")]
    ground.kafka.stop()
    trainer.says(AWAY)
    time.sleep(AWAY_S)
    up.append(metric(trainer, "broker_up"))
    ground.kafka.start()
    send(settings, rows(200, seed=1))
    wait_until_consumed(settings, 400, trainer)
    trainer.says(BACK)
    up.append(metric(trainer, "broker_up"))
    return f"{outcome(settings, trainer)}; {said(trainer)}; broker_up {' '.join(f'{value:g}' for value in up)}"


def metric(trainer: Trainer, name: str) -> float:
    """What the trainer's own metrics say."""
    port = re.findall(r'"metrics_port": (\d+)', trainer.log.read_text())[-1]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        (value,) = re.findall(rf"^tailstream_{name} (\S+)", answer.read().decode(), flags=re.M)
    return float(value)


@case("stop while the broker is away", "exit 0; 200 records durable")
def stop_without_broker(ground: Ground) -> str:
    config, settings = ground.settings()
    send(settings, rows(200))
    trainer = Trainer(config)
    wait_until_consumed(settings, 192, trainer)
    ground.kafka.kill()
    trainer.says(AWAY)
    code = trainer.stop()
    ground.kafka.start()
    snapshot = newest(settings)
    assert snapshot is not None
    return f"exit {code}; {consumed(snapshot.manifest)} records durable"


@case(
    "stop while the broker is away and letters wait for it",
    "exit 5 within the grace, saying why; with it back: 203 records, 200 trained, 3 letters",
)
def stop_with_letters_waiting(ground: Ground) -> str:
    config, settings = ground.settings()
    send(settings, rows(200))
    trainer = Trainer(config)
    wait_until_consumed(settings, 200, trainer)
    with admin(settings) as client:
        client.delete_topics([settings.kafka.dead_letters])
    send_strange(settings, 3)
    trainer.says("no snapshot: training goes on")
    ground.kafka.kill()
    trainer.says(AWAY)
    code = trainer.stop()
    why = "saying why" if "what was learned since the last snapshot is lost" in trainer.log.read_text() else "SILENT"
    ground.kafka.start()
    trainer = Trainer(config)
    part = wait_until_consumed(settings, 203, trainer).manifest.partitions[0]
    trainer.stop()
    letters = {letter.value for letter in read_all(settings, settings.kafka.dead_letters, 3)}
    back = f"{part.next_offset} records, {part.trained} trained, {len(letters)} letters"
    return f"exit {code}{' within the grace' if code != OVERDUE else ''}, {why}; with it back: {back}"


def send_strange(settings: Settings, count: int) -> None:
    with closing(Producer(settings.kafka)) as producer:
        for number in range(count):
            producer.send(settings.kafka.topic, b"not a record %d" % number)
        producer.flush()


@case("records deleted that were not read yet", "exit 4 naming both offsets; with earliest: 150 lost, 250 trained")
def records_deleted(ground: Ground) -> str:
    config, settings = ground.settings()
    send(settings, rows(100))
    trainer = Trainer(config)
    wait_until_consumed(settings, 100, trainer)
    trainer.stop()
    send(settings, rows(300))
    with admin(settings) as client:
        client.delete_records({kafka.TopicPartition(settings.kafka.topic, 0): 250})
    trainer = Trainer(config)
    code = trainer.wait()
    named = "partition 0 begins at 250, next to read is 100" in trainer.log.read_text()
    config.write_text(config.read_text().replace("[kafka]", '[kafka]\non_lost_offsets = "earliest"', 1))
    trainer = Trainer(config)
    part = wait_until_consumed(settings, 250, trainer).manifest.partitions[0]
    trainer.stop()
    lost = part.next_offset - part.trained
    return f"exit {code}{' naming both offsets' if named else ''}; with earliest: {lost} lost, {part.trained} trained"


@case(
    "a record damaged on the broker's disk",
    "exit 4 naming its offset; deleted, and with earliest: 300 offsets read, 1 to 100 lost, the others each once",
)
def record_damaged(ground: Ground) -> str:
    config, settings = ground.settings()
    send(settings, rows(100))
    (log,) = ground.folder.glob(f"kafka/data/**/{settings.kafka.topic}-0/*.log")
    begin = log.stat().st_size
    send(settings, rows(100, seed=1))
    end = log.stat().st_size
    send(settings, rows(100, seed=2))
    ground.kafka.stop()
    data = bytearray(log.read_bytes())
    data[(begin + end) // 2] ^= 1
    log.write_bytes(data)
    ground.kafka.start()
    trainer = Trainer(config)
    code = trainer.wait()
    log_text = trainer.log.read_text()
    (at,) = re.findall(r"next to read are partition 0 at offset (\d+)", log_text) or [log_text[-1000:]]
    named = "naming its offset" if at.isdecimal() and 100 <= int(at) < 200 else f"at {at}"
    with admin(settings) as client:
        client.delete_records({kafka.TopicPartition(settings.kafka.topic, 0): 200})
    config.write_text(config.read_text().replace("[kafka]", '[kafka]\non_lost_offsets = "earliest"', 1))
    trainer = Trainer(config)
    wait_until(lambda: next_offset(settings) == 300, "all is read")
    assert trainer.stop() == 0
    snapshot = newest(settings)
    assert snapshot is not None
    part = snapshot.manifest.partitions[0]
    lost = 300 - part.trained
    kept = [*range(200 - lost), *range(200, 300)]
    once = "each once" if part.offset_sum == sum(kept) else "NOT each once"
    count = "1 to 100" if 1 <= lost <= 100 else str(lost)
    return (
        f"exit {code} {named}; deleted, and with earliest: {part.next_offset} offsets read, {count} lost, "
        f"the others {once}"
    )


def next_offset(settings: Settings) -> int:
    snapshot = newest(settings)
    return -1 if snapshot is None else snapshot.manifest.partitions[0].next_offset


@case("retention passes the trainer", "exit 4; with latest: goes on at the end")
def retention(ground: Ground) -> str:
    config, settings = ground.settings()
    with admin(settings) as client:
        brief = {"retention.bytes": "1048576", "segment.bytes": "1048576"}
        client.create_topics([kafka.admin.NewTopic(settings.kafka.topic, 1, 1, topic_configs=brief)])
    send(settings, rows(100))
    trainer = Trainer(config)
    wait_until_consumed(settings, 100, trainer)
    trainer.stop()
    send(settings, rows(80000))
    wait_until(lambda: bounds(settings)[0] > 100, "retention moves the beginning")
    code = Trainer(config).wait()
    config.write_text(config.read_text().replace("[kafka]", '[kafka]\non_lost_offsets = "latest"', 1))
    trainer = Trainer(config)
    trainer.says("records lost")
    send(settings, rows(50))
    snapshot = wait_until_consumed(settings, 150, trainer)
    trainer.stop()
    there = snapshot.manifest.partitions[0].next_offset == bounds(settings)[1]
    return f"exit {code}; with latest: goes on {'at the end' if there else 'SOMEWHERE ELSE'}"


def bounds(settings: Settings) -> tuple[int, int]:
    with closing(Consumer(settings.kafka)) as consumer:
        consumer.assign({0: 0})
        return consumer.bounds()[0]


@case("topic deleted and made again while it is read", "exit 4: deleted and made again; 100 records, none of the new")
def topic_made_again(ground: Ground) -> str:
    config, settings = ground.settings()
    send(settings, rows(100))
    trainer = Trainer(config)
    wait_until_consumed(settings, 100, trainer)
    with admin(settings) as client:
        client.delete_topics([settings.kafka.topic])
    trainer.says("does not exist")
    send(settings, rows(300))
    code = trainer.wait()
    log = trainer.log.read_text()
    snapshot = newest(settings)
    assert snapshot is not None
    why = "deleted and made again" if "made again while it was read" in log else log[-500:]
    return f"exit {code}: {why}; {consumed(snapshot.manifest)} records, none of the new"


@case("dead-letter topic deleted", "200 records trained, none durable; with it back: 203 records durable, 3 letters")
def dead_letters_gone(ground: Ground) -> str:
    config, settings = ground.settings()
    send(settings, rows(100))
    trainer = Trainer(config)
    wait_until_consumed(settings, 100, trainer)
    with admin(settings) as client:
        client.delete_topics([settings.kafka.dead_letters])
        send_strange(settings, 3)
        send(settings, rows(100))
        trainer.says("no snapshot: training goes on")
        wait_until(lambda: metric(trainer, "train_samples_total") == 200, "it trains all the same")
        snapshot = newest(settings)
        assert snapshot is not None
        durable = consumed(snapshot.manifest) - 100
        client.create_topics([kafka.admin.NewTopic(settings.kafka.dead_letters, 1, 1)])
    wait_until_consumed(settings, 203, trainer)
    code = trainer.stop()
    letters = {letter.value for letter in read_all(settings, settings.kafka.dead_letters, 3)}
    snapshot = newest(settings)
    assert code == 0
    assert snapshot is not None
    return (
        f"{snapshot.manifest.samples} records trained, {durable or 'none'} durable; "
        f"with it back: {consumed(snapshot.manifest)} records durable, {len(letters)} letters"
    )


@case("partitions added", "while it runs and while it does not; 500 records of 5 partitions, each once")
def partitions_added(ground: Ground) -> str:
    config, settings = ground.settings()
    send(settings, rows(100))
    trainer = Trainer(config)
    wait_until_consumed(settings, 100, trainer)
    with admin(settings) as client:
        client.create_partitions({settings.kafka.topic: 3})
    send(settings, rows(300))
    wait_until_consumed(settings, 400, trainer)
    trainer.stop()
    with admin(settings) as client:
        client.create_partitions({settings.kafka.topic: 5})
    send(settings, rows(100))
    trainer = Trainer(config)
    count = len(wait_until_consumed(settings, 500, trainer).manifest.partitions)
    return (
        f"while it runs and while it does not; {outcome(settings, trainer).replace(',', f' of {count} partitions,', 1)}"
    )


@case("another cluster at the same address", "exit 4 naming cluster_id; with the first back: 200 records, each once")
def another_cluster(ground: Ground) -> str:
    config, settings = ground.settings()
    send(settings, rows(100))
    trainer = Trainer(config)
    wait_until_consumed(settings, 100, trainer)
    trainer.stop()
    ground.kafka.stop()
    other = Kafka(ground.script, ground.folder / "other", port=ground.kafka.port)
    other.start()
    send(settings, rows(100))
    trainer = Trainer(config)
    code = trainer.wait()
    named = "naming cluster_id" if "cluster_id" in trainer.log.read_text() else "WITHOUT cluster_id"
    other.kill()
    ground.kafka.start()
    send(settings, rows(100))
    trainer = Trainer(config)
    wait_until_consumed(settings, 200, trainer)
    return f"exit {code} {named}; with the first back: {outcome(settings, trainer)}"


@case(
    "broker restored from an older copy of its disk",
    "exit 4 naming both offsets, whatever on_lost_offsets says; 200 records, each once",
)
def broker_restored(ground: Ground) -> str:
    config, settings = ground.settings()
    send(settings, rows(100))
    ground.kafka.stop()
    data, copy = ground.folder / "kafka" / "data", ground.folder / "copy"
    shutil.copytree(data, copy)
    ground.kafka.start()
    send(settings, rows(100, seed=1))
    trainer = Trainer(config)
    wait_until_consumed(settings, 200, trainer)
    assert trainer.stop() == 0
    ground.kafka.stop()
    shutil.rmtree(data)
    copy.rename(data)
    ground.kafka.start()
    codes, named = set(), set()
    for policy in ("fail", "earliest", "latest"):
        text = config.read_text().replace("[kafka]", f'[kafka]\non_lost_offsets = "{policy}"', 1)
        (config.parent / policy).mkdir()
        config_of_policy = config.parent / policy / config.name
        config_of_policy.write_text(text)
        trainer = Trainer(config_of_policy)
        codes.add(trainer.wait())
        log = trainer.log.read_text()
        named.add(bool(re.search(r"partition 0,? ends at 100,.* 200\b", log)))
    snapshot = newest(settings)
    assert snapshot is not None
    once = "each once" if each_once(snapshot.manifest.partitions[0]) else "NOT each once"
    told = "naming both offsets" if named == {True} else "WITHOUT both offsets"
    return (
        f"exit {' '.join(map(str, sorted(codes)))} {told}, whatever on_lost_offsets says; "
        f"{consumed(snapshot.manifest)} records, {once}"
    )


@case("compacted topic", "every key's last record trained, offsets have gaps, counters agree")
def compacted(ground: Ground) -> str:
    from trainer.audit import impossible

    config, settings = ground.settings()
    with admin(settings) as client:
        often = {
            "cleanup.policy": "compact",
            "segment.bytes": "1048576",
            "min.cleanable.dirty.ratio": "0.001",
            "max.compaction.lag.ms": "1000",
        }
        client.create_topics([kafka.admin.NewTopic(settings.kafka.topic, 1, 1, topic_configs=often)])
    send(settings, [value for seed in range(40) for value in rows(500, seed)])

    def count() -> int:
        with closing(Consumer(settings.kafka)) as consumer:
            consumer.assign({0: 0})
            end, seen = consumer.bounds()[0][1], 0
            while consumer.position(0) < end:
                seen += len(consumer.poll(2048, 0.2))
            return seen

    wait_until(lambda: count() < 15000, "the log is compacted")
    trainer = Trainer(config)

    wait_until(lambda: next_offset(settings) == 20000, "the end is reached")
    trainer.stop()
    snapshot = newest(settings)
    assert snapshot is not None
    part = snapshot.manifest.partitions[0]
    agree = "agree" if not list(impossible(snapshot.manifest)) else "DISAGREE"
    gaps = "offsets have gaps" if 500 <= part.trained < 20000 else f"{part.trained} trained"
    return f"every key's last record trained, {gaps}, counters {agree}"


@case("transactions", "committed 200 trained, aborted and open ones not")
def transactions(ground: Ground) -> str:
    config, settings = ground.settings()
    send(settings, rows(100))
    for number, end in enumerate(("commit", "abort", "commit", "open")):
        producer = kafka.KafkaProducer(
            bootstrap_servers=settings.kafka.bootstrap_servers, transactional_id=f"{settings.kafka.topic}-{number}"
        )
        producer.init_transactions()
        producer.begin_transaction()
        for value in rows(50, seed=number):
            producer.send(settings.kafka.topic, value)
        producer.flush()
        if end == "commit":
            producer.commit_transaction()
        elif end == "abort":
            producer.abort_transaction()
    trainer = Trainer(config)
    wait_until_consumed(settings, 200, trainer)
    time.sleep(1)
    part = wait_until_consumed(settings, 200, trainer).manifest.partitions[0]
    trainer.stop()
    return f"committed {part.trained} trained, aborted and open ones not"
