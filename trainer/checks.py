"""What `tailstream check` looks at before a trainer is started."""

from collections.abc import Callable
from typing import Final, NamedTuple

from trainer.batching import Record
from trainer.checkpoint import check_same_topic
from trainer.config import Settings
from trainer.errors import RecordError, StoreLocked, TailstreamError
from trainer.kafka_client import Consumer, create_topic, describe_topic
from trainer.manifest import check_fits
from trainer.schema import FeatureSchema
from trainer.snapshot import SnapshotStore, open_store

SAMPLE: Final = 100  # records decoded
WAIT_S: Final = 5.0


class Finding(NamedTuple):
    """The result of one check, in a line."""

    fine: bool
    text: str


def run_checks(settings: Settings, say: Callable[[str], None]) -> bool:
    """Runs all checks, says each result as it is known, and returns whether all are fine."""
    everything_fine = True
    broker_there = True
    for name, needs_broker, look in CHECKS:
        if needs_broker and not broker_there:
            finding = Finding(False, "not looked at: no broker")
        else:
            try:
                finding = look(settings)
            except TailstreamError as error:
                finding = Finding(False, str(error))
        if name == "broker":
            broker_there = finding.fine
        everything_fine &= finding.fine
        say(f"{'ok  ' if finding.fine else 'FAIL'} {name:<12} {finding.text}")
    return everything_fine


def _config(settings: Settings) -> Finding:
    schema = FeatureSchema.of(settings)
    kinds = f"{len(schema.numeric_columns)} numeric columns, {len(schema.categorical_columns)} categorical"
    return Finding(True, f"label {schema.settings.label!r}, {kinds}")


def _broker(settings: Settings) -> Finding:
    try:
        describe_topic(settings.kafka, settings.kafka.topic, WAIT_S)
    except TailstreamError as error:
        if type(error).__name__ != "TopicMissing":
            raise
    return Finding(True, f"{', '.join(settings.kafka.bootstrap_servers)} answers and lets us in")


def _topic(settings: Settings) -> Finding:
    topic = describe_topic(settings.kafka, settings.kafka.topic, WAIT_S)
    return Finding(True, f"{topic.topic!r} has {len(topic.partitions)} partition(s)")


def _records(settings: Settings) -> Finding:
    schema = FeatureSchema.of(settings)
    records = _first_records(settings)
    faults: list[tuple[Record, RecordError]] = []
    for record in records:
        try:
            if record.value is not None:
                schema.decode(record.value)
        except RecordError as error:
            faults.append((record, error))
    if not records:
        return Finding(True, "the topic is empty so far: nothing to decode")
    if not faults:
        return Finding(True, f"{len(records)} of {len(records)} decoded")
    record, fault = faults[0]
    return Finding(
        len(faults) < len(records),
        f"{len(records) - len(faults)} of {len(records)} decoded; the others would become dead letters, the first at "
        f"partition {record.partition} offset {record.offset}: {fault.reason}: {fault}; compare [schema] with the data",
    )


def _first_records(settings: Settings) -> list[Record]:
    topic = describe_topic(settings.kafka, settings.kafka.topic, WAIT_S)
    consumer = Consumer(settings.kafka, WAIT_S)
    try:
        consumer.assign(dict.fromkeys(topic.partitions))
        records: list[Record] = []
        for _ in range(3):  # an empty partition may answer before a full one
            records += consumer.poll(SAMPLE - len(records), 1.0)
            if len(records) >= SAMPLE:
                break
        return records
    finally:
        consumer.close()


def _dead_letters(settings: Settings) -> Finding:
    made = create_topic(settings.kafka, settings.kafka.dead_letters, timeout_s=WAIT_S)
    return Finding(True, f"{settings.kafka.dead_letters!r} {'was made' if made else 'is there'}")


def _store(settings: Settings) -> Finding:
    store = open_store(settings.store)
    try:
        return _store_to_write(settings, store)
    except StoreLocked:
        return Finding(True, f"{store.where} is being written to by a trainer that runs")


def _store_to_write(settings: Settings, store: SnapshotStore) -> Finding:
    with store.lock():
        store.storage.probe()
        snapshot, faults = store.newest(training=False)
        if snapshot is None:
            return Finding(True, f"{store.where} can be written to; no snapshot yet, {len(faults)} broken")
        check_fits(snapshot.manifest, settings)
    return Finding(True, f"{store.where} holds version {snapshot.manifest.version}, which fits this configuration")


def _resume(settings: Settings) -> Finding:
    snapshot, _ = open_store(settings.store).newest(training=False)
    if snapshot is None:
        return Finding(True, f"a first start, from {settings.kafka.start!r}")
    check_same_topic(snapshot.manifest, describe_topic(settings.kafka, settings.kafka.topic, WAIT_S))
    return Finding(True, f"goes on after {snapshot.manifest.samples} samples")


CHECKS: Final[tuple[tuple[str, bool, Callable[[Settings], Finding]], ...]] = (
    ("config", False, _config),
    ("broker", True, _broker),
    ("topic", True, _topic),
    ("records", True, _records),
    ("dead letters", True, _dead_letters),
    ("store", False, _store),
    ("resume", True, _resume),
)
