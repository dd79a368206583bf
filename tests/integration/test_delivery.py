"""Every record enters the state exactly once, whatever is killed: real brokers, real processes, real signals."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from service.cli import app
from tests.rig import Trainer, bits, each_once, read_all, rows, send, wait_until_consumed
from trainer.batching import Batcher, Record
from trainer.config import load
from trainer.dead_letter import HEADER_PREFIX, KEY_OMITTED, OMITTED
from trainer.files import read_values
from trainer.kafka_client import Producer, create_topic
from trainer.learner import Learner
from trainer.schema import FeatureSchema

TASKS = ("regression", "classification")
BAD: dict[str, tuple[str, str, list[tuple[bytes, str, str | None]]]] = {
    "numbers": (
        "regression",
        "",
        [
            (b"{", "not_json", None),
            (b'{"price": "dear"}', "wrong_type", "price"),
            (b'{"size": 1}', "no_label", "price"),
            (b'{"price": 1, "size": 1e39}', "not_finite", "size"),
            (b"\xff\xfe", "not_json", None),
        ],
    ),
    "classes": (
        "classification",
        "schema.max_classes = 3",
        [
            (b"{", "not_json", None),
            (b'{"kind": 1.5}', "wrong_type", "kind"),
            (b'{"size": 1}', "no_label", "kind"),
            (b'{"kind": "a", "size": 1e39}', "not_finite", "size"),
            (b'{"kind": "d"}', "too_many_classes", "kind"),
        ],
    ),
    "listed classes": (
        "classification",
        'schema.classes = ["c", "b", "a"]',
        [(b'{"kind": "%d"}' % number, "unknown_class", "kind") for number in range(5)],
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_killed_trainer_ends_with_the_same_weights_as_an_undisturbed_one(
    broker: str, write_config: Callable[..., Path], task: str
) -> None:
    # Full batches only: a timed flush depends on the clock.
    config = write_config(broker, store="killed", more="batch.max_wait_s = 600", task=task)
    settings = load(config)
    count = 100 * settings.batch.size
    send(settings, rows(count))
    random_ = random.Random(1)

    kills = 0
    for share in (0.1, 0.6):
        trainer = Trainer(config)
        wait_until_consumed(settings, int(share * count), trainer)
        time.sleep(random_.uniform(0, 0.1))
        trainer.kill()
        kills += 1
    trainer = Trainer(config)
    killed = wait_until_consumed(settings, count, trainer)
    assert trainer.stop() == 0

    undisturbed_config = write_config(
        broker, topic=settings.kafka.topic, store="undisturbed", more="batch.max_wait_s = 600", task=task
    )
    trainer = Trainer(undisturbed_config)
    undisturbed = wait_until_consumed(load(undisturbed_config), count, trainer)
    assert trainer.stop() == 0

    assert kills == 2
    assert killed.manifest.partitions == undisturbed.manifest.partitions
    assert killed.training.keys() == undisturbed.training.keys()
    for name, tensor in undisturbed.training.items():
        assert torch.equal(bits(killed.training[name]), bits(tensor)), name


def test_records_learned_from_a_file_and_through_kafka_end_in_the_same_bits_and_errors(
    broker: str, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(broker, more="batch.max_wait_s = 600")
    settings, values = load(config), rows(20 * 32)
    send(settings, values)
    trainer = Trainer(config)
    through_kafka = wait_until_consumed(settings, len(values), trainer)
    assert trainer.stop() == 0

    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(values))
    schema = FeatureSchema.of(settings)
    learner = Learner(settings, schema, torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    records = (Record(0, number, 0.0, None, value) for number, value in enumerate(read_values(file, schema)))
    for batch in Batcher(schema, settings.batch.size).add(records):
        learner.step(batch)
    torch.set_num_threads(threads)

    state = learner.state_dict()
    assert state.keys() == through_kafka.training.keys()
    for name, tensor in state.items():
        assert torch.equal(bits(through_kafka.training[name]), bits(tensor)), name
    assert through_kafka.manifest.metrics["whole"]["rows"] == len(values) - settings.batch.size
    for window in ("whole", "fading"):
        assert through_kafka.manifest.metrics[window] == learner.read().metrics[window]


def test_counters_show_every_offset_of_every_partition_exactly_once(
    broker: str, write_config: Callable[..., Path]
) -> None:
    config = write_config(broker, more="batch.max_wait_s = 0.05")
    settings = load(config)
    count = 6000
    send(settings, rows(count), partitions=4)
    for share in (0.2, 0.6):
        trainer = Trainer(config)
        wait_until_consumed(settings, int(share * count), trainer)
        trainer.kill()
    trainer = Trainer(config)
    snapshot = wait_until_consumed(settings, count, trainer)
    assert trainer.stop() == 0

    parts = snapshot.manifest.partitions
    assert sorted(parts) == [0, 1, 2, 3]
    assert sum(part.trained for part in parts.values()) == count == snapshot.manifest.samples
    assert all(each_once(part) for part in parts.values())


@pytest.mark.parametrize("which", BAD)
def test_bad_records_become_dead_letters_that_say_why_and_no_good_one_is_lost(
    broker: str, write_config: Callable[..., Path], which: str
) -> None:
    task, more, bad = BAD[which]
    config = write_config(broker, more=f"batch.max_wait_s = 0.05\n{more}", task=task)
    settings = load(config)
    good = rows(500)
    create_topic(settings.kafka, settings.kafka.topic, 1)
    producer = Producer(settings.kafka)
    for i, value in enumerate(good):
        producer.send(settings.kafka.topic, value)
        if i % 100 == 0:
            producer.send(settings.kafka.topic, bad[i // 100][0], f"key-{i}".encode(), [("trace", b"42")])
    producer.send(settings.kafka.topic, None, b"tombstone")
    producer.flush()
    producer.close()

    trainer = Trainer(config)
    snapshot = wait_until_consumed(settings, len(good) + len(bad) + 1, trainer)
    assert trainer.stop() == 0
    (part,) = snapshot.manifest.partitions.values()
    assert (part.trained, part.rejected, part.skipped) == (len(good), len(bad), 1)

    letters = sorted(read_all(settings, settings.kafka.dead_letters, len(bad)), key=source_offset)
    for number, (letter, (value, reason, field)) in enumerate(zip(letters, bad, strict=True)):
        headers = dict(letter.headers)
        assert letter.value == value
        assert letter.key == f"key-{100 * number}".encode()
        assert headers["trace"] == b"42"
        assert headers[f"{HEADER_PREFIX}topic"] == settings.kafka.topic.encode()
        assert headers[f"{HEADER_PREFIX}partition"] == b"0"
        assert headers[f"{HEADER_PREFIX}offset"] == str(101 * number + 1).encode()
        assert headers[f"{HEADER_PREFIX}exception.class.name"] == b"trainer.errors.RecordError"
        message = headers[f"{HEADER_PREFIX}exception.message"].decode()
        assert message.startswith(f"{reason}: ")
        assert field is None or field in message


def test_letters_that_the_topic_does_not_take_are_kept_without_what_is_too_large(
    real_kafka: str, write_config: Callable[..., Path]
) -> None:
    config = write_config(real_kafka, more="batch.max_wait_s = 0.05")
    settings = load(config)
    send(settings, rows(100))
    large = random.Random(1).randbytes(1_048_576 - 300)  # a broker takes it, but not with more headers
    sent: list[tuple[bytes, bytes | None, list[tuple[str, bytes]]]] = [
        (b"not a record", b"its key", [("trace", b"42")]),
        (large, b"its key", [("trace", b"42")]),
        (b"not a record", large, [("trace", b"42")]),
        (b"not a record", None, [("trace", large)]),
        (b"nor is this", None, []),
    ]
    producer = Producer(settings.kafka)
    for value, key, headers in sent:
        producer.send(settings.kafka.topic, value, key, headers)
        producer.flush()
    producer.close()

    trainer = Trainer(config)
    (part,) = wait_until_consumed(settings, 100 + len(sent), trainer).manifest.partitions.values()
    assert trainer.stop() == 0
    assert (part.trained, part.rejected) == (100, len(sent))
    letters = sorted(read_all(settings, settings.kafka.dead_letters, len(sent)), key=source_offset)
    whole, no_value, no_key, no_headers, after = letters
    assert (whole.key, whole.value, dict(whole.headers)["trace"]) == (b"its key", b"not a record", b"42")
    assert (after.key, after.value) == (None, b"nor is this")
    assert (no_value.key, no_value.value, dict(no_value.headers)["trace"]) == (b"its key", b"", b"42")
    assert dict(no_value.headers)[OMITTED] == str(len(large)).encode()
    for letter, size in ((no_key, len(large) + len("trace42")), (no_headers, len(large) + len("trace"))):
        assert (letter.key, letter.value, "trace" in dict(letter.headers)) == (None, b"", False)
        assert dict(letter.headers)[OMITTED] == str(len(b"not a record")).encode()
        assert dict(letter.headers)[KEY_OMITTED] == str(size).encode()
    said = CliRunner().invoke(app, ["dead-letters", "replay", "--config", str(config)]).output
    assert "replayed 2 dead letters" in said
    assert "3 were too large to be kept whole" in said


def source_offset(letter: Record) -> int:
    return int(dict(letter.headers)[f"{HEADER_PREFIX}offset"])


def test_a_topic_that_does_not_exist_yet_is_waited_for(broker: str, write_config: Callable[..., Path]) -> None:
    config = write_config(broker, more="batch.max_wait_s = 0.05")
    settings = load(config)
    trainer = Trainer(config)
    log = config.with_suffix(".log")
    deadline = time.monotonic() + 30
    while "waiting for the topic" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    send(settings, rows(100))
    wait_until_consumed(settings, 100, trainer)
    assert trainer.stop() == 0
    assert log.read_text().count("waiting for the topic") == 1


def test_a_recreated_topic_is_refused(broker: str, write_config: Callable[..., Path]) -> None:
    import kafka

    config = write_config(broker, more="batch.max_wait_s = 0.05")
    settings = load(config)
    send(settings, rows(100))
    trainer = Trainer(config)
    wait_until_consumed(settings, 100, trainer)
    assert trainer.stop() == 0
    admin = kafka.KafkaAdminClient(bootstrap_servers=[broker])
    admin.delete_topics([settings.kafka.topic])
    admin.close()
    time.sleep(1)
    send(settings, rows(100))
    trainer = Trainer(config)
    assert trainer.wait(30) == 4
    assert "topic_id" in config.with_suffix(".log").read_text()


@pytest.mark.kafka
def test_expired_offsets_stop_the_trainer_with_both_offsets(real_kafka: str, write_config: Callable[..., Path]) -> None:
    import kafka

    config = write_config(real_kafka, more="batch.max_wait_s = 0.05")
    settings = load(config)
    send(settings, rows(100))
    trainer = Trainer(config)
    wait_until_consumed(settings, 100, trainer)
    assert trainer.stop() == 0
    send(settings, rows(300))
    admin = kafka.KafkaAdminClient(bootstrap_servers=[real_kafka])
    admin.delete_records({kafka.TopicPartition(settings.kafka.topic, 0): 250})
    admin.close()

    trainer = Trainer(config)
    assert trainer.wait(30) == 4
    message = config.with_suffix(".log").read_text()
    assert "partition 0 begins at 250, next to read is 100" in message
    assert "kafka.on_lost_offsets" in message

    forgiving = write_config(
        real_kafka, topic=settings.kafka.topic, more='batch.max_wait_s = 0.05\nkafka.on_lost_offsets = "earliest"'
    )
    trainer = Trainer(forgiving)
    snapshot = wait_until_consumed(load(forgiving), 100 + 150, trainer)
    assert trainer.stop() == 0
    assert snapshot.manifest.partitions[0].next_offset == 400
    assert snapshot.manifest.partitions[0].trained == 250
