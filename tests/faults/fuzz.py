"""Records no one would send: each is trained, a dead letter or skipped, and none stops the trainer.

`python -m tests.faults.fuzz --records 100000 --json FILE`
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from tests.faults.case import Ground
from tests.faults.place import ground_or_leave
from tests.rig import Trainer, rows, wait_until
from trainer.batching import CHECKSUM_MODULUS
from trainer.config import load
from trainer.kafka_client import Producer, create_topic
from trainer.letter_replay import read_letters
from trainer.snapshot import SnapshotStore

HUGE_BYTES = 900_000  # a broker takes 1 MiB by default
LARGEST_KEY_BYTES = 1_048_576 - 300  # and this, but not with the headers of a dead letter
RARELY = 20_000
VALUES = [
    *("null", "true", "[]", "{}", "[[1]]", '{"price": 1}', '""', '"12"', '"NaN"', "NaN", "Infinity", "-Infinity"),
    *("1e308", "1e309", "-1e400", "1e39", "-0", "1e-400", "9" * 400, "12345678901234567890"),
    *("1_000", "0x10", "+1", "01", ".5", "5."),
    *('"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"' + "x" * 5000 + '"'),
]


def fuzzed(count: int, seed: int = 0) -> Iterator[bytes | None]:
    """Good records, and ones mutated in every way there is a name for."""
    random_ = random.Random(seed)
    good = rows(1000, seed)
    ways = [_bytes, _cut, _value, _value, _twice, _deep, _null, _empty, _noise, _bom, _array]
    for number in range(count):
        value = random_.choice(good)
        if number % RARELY == 7:
            yield value[:-1] + b', "note": "' + b"x" * HUGE_BYTES + b'"}'
        elif number % RARELY == 11:
            yield b"{"  # with a key that is no shorter, see `key`
        elif random_.random() < 0.3:
            yield value
        else:
            yield random_.choice(ways)(value, random_)


def key(number: int) -> bytes:
    """The key of a record: its number, or now and then what leaves a dead letter no room."""
    return random.Random(number).randbytes(LARGEST_KEY_BYTES) if number % RARELY == 11 else str(number).encode()


def _bytes(value: bytes, random_: random.Random) -> bytes:
    """Some bytes are others."""
    data = bytearray(value)
    for _ in range(random_.randint(1, 4)):
        data[random_.randrange(len(data))] = random_.randrange(256)
    return bytes(data)


def _cut(value: bytes, random_: random.Random) -> bytes:
    return value[: random_.randrange(len(value))]


def _value(value: bytes, random_: random.Random) -> bytes:
    """A field has a strange value."""
    fields = [b'"%s": %s' % (k.encode(), json.dumps(v).encode()) for k, v in json.loads(value).items()]
    at = random_.randrange(len(fields))
    name = fields[at].partition(b":")[0]
    fields[at] = name + b": " + random_.choice(VALUES).encode()
    return b"{" + b", ".join(fields) + b"}"


def _twice(value: bytes, random_: random.Random) -> bytes:
    """A key is there twice."""
    return value[:-1] + b', "%s": %s}' % (random_.choice([b"price", b"size", b"kind"]), random_.choice(VALUES).encode())


def _deep(value: bytes, random_: random.Random) -> bytes:
    depth = random_.choice([10, 1000, 100_000])
    return value[:-1] + b', "note": ' + b"[" * depth + b"]" * depth + b"}"


def _null(value: bytes, random_: random.Random) -> None:
    return None


def _empty(value: bytes, random_: random.Random) -> bytes:
    return random_.choice([b"", b" ", b"{}", b"[]", b"null", b"0", b'""', b"\n"])


def _noise(value: bytes, random_: random.Random) -> bytes:
    return random_.randbytes(random_.randint(1, 200))


def _bom(value: bytes, random_: random.Random) -> bytes:
    return random_.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\x00"]) + value


def _array(value: bytes, random_: random.Random) -> bytes:
    return b"[" + value + b"]"


class Count(NamedTuple):
    sent: int
    trained: int
    dead_lettered: int
    skipped: int
    offsets_agree: bool  # trained ones, those of the letters and the tombstones add up to all there are

    @property
    def fine(self) -> bool:
        return self.trained + self.dead_lettered + self.skipped == self.sent and self.offsets_agree


def run(config: Path, records: int, start: Callable[[Path], Trainer] = Trainer) -> Count:
    """Sends so many, has a trainer read them all, and counts what became of them."""
    settings = load(config)
    create_topic(settings.kafka, settings.kafka.topic, 1)
    tombstones = []
    with closing(Producer(settings.kafka)) as producer:
        for offset, value in enumerate(fuzzed(records)):
            producer.send(settings.kafka.topic, value, key(offset))
            if value is None:
                tombstones.append(offset)
        producer.flush()
    store = SnapshotStore(settings.store.path)
    trainer = start(config)

    def all_read() -> bool:
        assert trainer.poll() is None, trainer.log.read_text()[-3000:]
        versions = store.versions()
        return bool(versions) and store.manifest(versions[-1]).partitions[0].next_offset == records

    wait_until(all_read, f"all {records} are read", timeout_s=600)
    assert trainer.stop() == 0
    part = store.manifest(store.versions()[-1]).partitions[0]
    letters = {letter.offset for letter in read_letters(settings.kafka)}
    total = part.offset_sum + sum(letters) + sum(tombstones)
    agree = (total - sum(range(records))) % CHECKSUM_MODULUS == 0 and len(letters) == part.rejected
    return Count(records, part.trained, len(letters), part.skipped, agree)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tailstream-fuzz-") as folder:
        ground: Ground = ground_or_leave(parser, Path(folder))
        try:
            count = run(ground.config(), options.records)
        finally:
            ground.close()
    text = json.dumps(count._asdict(), indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return int(not count.fine)


if __name__ == "__main__":
    sys.exit(main())
