"""What a person types to look after a store and its dead letters, on real brokers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.rig import Trainer, read_all, rows, send, wait_until_consumed
from trainer.batching import Record
from trainer.config import Settings, load
from trainer.kafka_client import Producer, create_topic
from trainer.snapshot import MODEL_FILE, SnapshotStore

ROOT = Path(__file__).parents[2]


def tailstream(*arguments: str, config: Path) -> tuple[int, str]:
    """Exit code and output of a command."""
    command = [sys.executable, "-m", "service", *arguments, "--config", str(config)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ))
    return done.returncode, done.stdout + done.stderr


def train(config: Path, records: int) -> None:
    trainer = Trainer(config)
    wait_until_consumed(load(config), records, trainer)
    assert trainer.stop() == 0


def test_a_store_is_listed_checked_pinned_and_rolled_back(
    embedded_broker: str, write_config: Callable[..., Path]
) -> None:
    config = write_config(embedded_broker, more="batch.max_wait_s = 0.05")
    settings = load(config)
    send(settings, rows(100))
    train(config, 100)
    first = SnapshotStore(settings.store.path).versions()[-1]
    send(settings, rows(100, seed=1))
    train(config, 200)
    store = SnapshotStore(settings.store.path)
    assert store.versions()[-1] > first

    assert tailstream("snapshots", "pin", str(first), config=config)[0] == 0
    code, listed = tailstream("snapshots", "list", config=config)
    assert code == 0
    assert [line.split()[0] for line in listed.splitlines()[1:]] == [str(v) for v in store.versions()]
    assert [line.split()[0] for line in listed.splitlines() if "pinned" in line] == [str(first)]
    assert tailstream("snapshots", "verify", config=config)[0] == 0
    code, shown = tailstream("snapshots", "show", str(first), config=config)
    assert json.loads(shown)["samples"] == 100

    assert tailstream("snapshots", "rollback", str(first), config=config)[0] == 0
    assert store.manifest(store.versions()[-1]).samples == 100
    train(config, 200)  # the second hundred once more
    newest = store.manifest(store.versions()[-1])
    assert (newest.samples, newest.generation) == (200, 1)
    assert tailstream("snapshots", "verify", config=config)[0] == 0

    (store.storage.folder(first) / MODEL_FILE).write_bytes(b"torn")
    code, output = tailstream("snapshots", "verify", config=config)
    assert code == 5
    assert f"FAIL {first:>8}" in output
    assert tailstream("snapshots", "rollback", str(first), config=config)[0] == 5


@pytest.mark.kafka
def test_dead_letters_go_back_once_as_they_came(real_kafka: str, write_config: Callable[..., Path]) -> None:
    config = write_config(real_kafka, more="batch.max_wait_s = 0.05")
    settings = load(config)
    create_topic(settings.kafka, settings.kafka.topic, 1)
    bad = [b"{", b'{"size": 1}', b"nope", b'{"price": "dear"}']
    with closing(Producer(settings.kafka)) as producer:
        for number, value in enumerate(bad):
            producer.send(settings.kafka.topic, value, f"key-{number}".encode(), [("trace", b"%d" % number)])
        producer.flush()
    send(settings, rows(50))
    train(config, 54)

    code, listed = tailstream("dead-letters", "list", config=config)
    assert code == 0
    lines = listed.splitlines()
    assert [line.split()[1] for line in lines[1:5]] == ["0", "1", "2", "3"]
    assert "4 dead letters" in lines[-1]
    assert "2 not_json" in lines[-1]
    assert "1 dead letters" in tailstream("dead-letters", "list", "--reason", "no_label", config=config)[1]
    assert len(tailstream("dead-letters", "list", "--limit", "2", config=config)[1].splitlines()) == 4

    assert replayed(config, "--reason", "not_json") == 2
    assert replayed(config, "--reason", "not_json") == 0
    assert replayed(config) == 2
    assert replayed(config) == 0
    assert replayed(config, "--again") == 4
    back = sent_back(settings, 54)
    assert [record.value for record in back] == [bad[0], bad[2], bad[1], bad[3], *bad]
    assert [record.key for record in back[:2]] == [b"key-0", b"key-2"]
    assert [list(record.headers) for record in back[:2]] == [[("trace", b"0")], [("trace", b"2")]]


def replayed(config: Path, *options: str) -> int:
    code, output = tailstream("dead-letters", "replay", *options, config=config)
    assert code == 0, output
    return int(output.split()[1])


def sent_back(settings: Settings, since: int) -> list[Record]:
    return read_all(settings, settings.kafka.topic, since + 8)[since:]
