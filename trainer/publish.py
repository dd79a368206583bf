"""Sending data files to a topic: what `tailstream publish` does."""

import time
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import msgspec

from trainer.config import Settings
from trainer.kafka_client import Producer, create_topic
from trainer.schema import FeatureSchema

REPORT_EVERY: Final = 500  # records between calls of `progress`


class Published(NamedTuple):
    """What became of a file."""

    sent: int
    unkeyed: int  # sent without a key: the schema names no id, or the record lacks it


def publish(
    settings: Settings,
    schema: FeatureSchema,
    values: Iterable[bytes],
    *,
    records_per_s: float | None = None,
    partitions: int = -1,
    progress: Callable[[int], None] = lambda sent: None,
) -> Published:
    """Sends values to the topic of the configuration, keyed by the schema's id, and waits until all are acknowledged.

    Records are sent as they are; whether they can be learned from is for the trainer to judge.

    Args:
        settings: where to.
        schema: how a record's id is found.
        values: the records.
        records_per_s: how fast at most; None as fast as the broker takes them.
        partitions: of the topic, where it has to be made; -1 leaves it to the broker.
        progress: told now and then how many have been sent.

    Raises:
        BrokerUnavailable, BrokerRefused: no broker lets us in.
        PublishError: records were not acknowledged.
    """
    topic = settings.kafka.topic
    create_topic(settings.kafka, topic, partitions)
    producer = Producer(settings.kafka)
    sent = unkeyed = 0
    began = time.monotonic()
    try:
        for value in values:
            key = _key(schema, value)
            unkeyed += key is None
            producer.send(topic, value, key)
            sent += 1
            if records_per_s is not None:
                early = began + sent / records_per_s - time.monotonic()
                if early > 0:
                    time.sleep(early)
            if sent % REPORT_EVERY == 0:
                progress(sent)
        producer.flush()
        progress(sent)
    finally:
        producer.close()
    return Published(sent, unkeyed)


def _key(schema: FeatureSchema, value: bytes) -> bytes | None:
    if schema.settings.id is None:
        return None
    try:
        record = msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    identity = schema.identity(record) if isinstance(record, dict) else None
    return None if identity is None else identity.encode("utf-8", "surrogatepass")
