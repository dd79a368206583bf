"""How much waits for the dead-letter topic before training has to wait too."""

from typing import Any

from trainer.batching import Record, Rejection
from trainer.dead_letter import LETTER_BYTES, MAX_WAITING_BYTES, DeadLetters
from trainer.errors import RecordError


class Delivered:
    acknowledged, failure, too_large = True, "", False


class Producer:
    """Takes everything."""

    def send(self, *record: Any) -> Delivered:
        return Delivered()

    def flush(self, timeout_s: float) -> None:
        pass


def rejections(count: int, value: bytes) -> list[Rejection]:
    error = RecordError("not_json", "it is not JSON")
    return [Rejection(Record(0, n, 0.0, None, value), error) for n in range(count)]


def test_letters_are_full_past_a_bound_of_bytes_until_they_are_sent() -> None:
    letters = DeadLetters(Producer(), "prices", "prices.dead-letters")  # type: ignore[arg-type]
    value = bytes(1 << 20)
    most = MAX_WAITING_BYTES // (len(value) + LETTER_BYTES)
    letters.write(rejections(most, value))
    assert not letters.full
    letters.write(rejections(1, value))
    assert letters.full
    letters.flush()
    assert not letters.full


def test_letters_without_a_value_take_memory_too() -> None:
    letters = DeadLetters(Producer(), "prices", "prices.dead-letters")  # type: ignore[arg-type]
    letters.write(rejections(MAX_WAITING_BYTES // LETTER_BYTES + 1, b""))
    assert letters.full
