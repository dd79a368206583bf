"""How much waits for the dead-letter topic before training has to wait too, what is sent again, what is logged."""

from typing import Any

import pytest
from structlog.testing import capture_logs

from trainer.batching import REJECTION_BYTES, Record, Rejection
from trainer.dead_letter import MAX_WAITING_BYTES, SENT_TOGETHER, DeadLetters
from trainer.errors import PublishError, RecordError


class Delivered:
    acknowledged, failure, too_large = True, "", False


class Producer:
    """Takes everything."""

    def send(self, *record: Any) -> Delivered:
        return Delivered()

    def flush(self, timeout_s: float) -> None:
        pass


class Pending:
    """What the client still has, until it is acknowledged or given up."""

    def __init__(self) -> None:
        self.acknowledged, self.failure, self.too_large = False, "", False


class Slow(Producer):
    """Takes everything, and has nothing acknowledged by itself."""

    def __init__(self) -> None:
        self.sent: list[Pending] = []

    def send(self, *record: Any) -> Any:
        self.sent.append(Pending())
        return self.sent[-1]


def rejections(count: int, value: bytes) -> list[Rejection]:
    error = RecordError("not_json", "it is not JSON")
    return [Rejection(Record(0, n, 0.0, None, value), error) for n in range(count)]


def test_letters_are_full_past_a_bound_of_bytes_until_they_are_sent() -> None:
    letters = DeadLetters(Producer(), "prices", "prices.dead-letters")  # type: ignore[arg-type]
    value = bytes(1 << 20)
    most = MAX_WAITING_BYTES // (len(value) + REJECTION_BYTES)
    letters.write(rejections(most, value))
    assert not letters.full
    letters.write(rejections(1, value))
    assert letters.full
    letters.flush()
    assert not letters.full


def test_letters_without_a_value_take_memory_too() -> None:
    letters = DeadLetters(Producer(), "prices", "prices.dead-letters")  # type: ignore[arg-type]
    letters.write(rejections(MAX_WAITING_BYTES // REJECTION_BYTES + 1, b""))
    assert letters.full


def test_what_the_client_still_has_is_waited_for_and_only_what_it_gave_up_is_sent_again() -> None:
    producer = Slow()
    letters = DeadLetters(producer, "prices", "prices.dead-letters")  # type: ignore[arg-type]
    letters.write(rejections(3, b"{"))
    for _ in range(3):
        with pytest.raises(PublishError, match=r"3 rejected records .* 'prices.dead-letters' yet: no answer"):
            letters.flush()
    first, second, third = producer.sent  # none was sent twice, however long the broker is away
    first.acknowledged = True
    second.failure = "KafkaTimeoutError()"
    with pytest.raises(PublishError, match="no answer"):
        letters.flush()
    assert len(producer.sent) == 4
    third.acknowledged = producer.sent[-1].acknowledged = True
    letters.flush()
    letters.write(rejections(1, b"{"))
    with pytest.raises(PublishError, match="1 rejected records"):
        letters.flush()


def test_while_nothing_is_acknowledged_the_client_is_given_no_more_than_some() -> None:
    producer = Slow()
    letters = DeadLetters(producer, "prices", "prices.dead-letters")  # type: ignore[arg-type]
    letters.write(rejections(3 * SENT_TOGETHER, b"{"))
    for _ in range(3):
        with pytest.raises(PublishError, match=f"{3 * SENT_TOGETHER} rejected records"):
            letters.flush()
    assert len(producer.sent) == SENT_TOGETHER


def test_the_log_hears_of_the_first_and_then_once_a_minute() -> None:
    now = 0.0
    letters = DeadLetters(Producer(), "prices", "prices.dead-letters", lambda: now)  # type: ignore[arg-type]
    with capture_logs() as said:
        letters.write([])
        letters.write(rejections(3, b"a secret"))
        letters.write(rejections(5, b"a secret"))
        now = 61.0
        letters.write(rejections(2, b"a secret"))
    assert [(line["records"], line["topic"], line["partition"], line["offset"]) for line in said] == [
        (3, "prices", 0, 0),
        (7, "prices", 0, 0),
    ]
    assert "secret" not in str(said)
