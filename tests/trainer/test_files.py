import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer.stream import make_schema, make_settings
from trainer.errors import ConfigError, RecordError
from trainer.files import as_json, read_values

SCHEMA = make_schema(make_settings())
LINES = b'{"price": 1}\n\n{"price": 2, "kind": "\xc3\xa9"}\r\n{"price": 3}'
TABLE = 'price,size,kind,note\n1.5,2,"a, ""b""\nc",x\n,,,\n3,big,7,\n'


def read(path: Path) -> list[bytes]:
    return list(read_values(path, SCHEMA))


def plain(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def zipped(path: Path, data: bytes) -> Path:
    path = path.with_name(path.name + ".gz")
    path.write_bytes(gzip.compress(data, mtime=0))
    return path


@pytest.mark.parametrize("store", [plain, zipped])
def test_lines_of_json_come_as_they_are_without_the_empty_ones(
    tmp_path: Path, store: Callable[[Path, bytes], Path]
) -> None:
    assert read(store(tmp_path / "data.jsonl", LINES)) == [
        b'{"price": 1}',
        b'{"price": 2, "kind": "\xc3\xa9"}',
        b'{"price": 3}',
    ]


@pytest.mark.parametrize("store", [plain, zipped])
def test_lines_of_csv_become_records(tmp_path: Path, store: Callable[[Path, bytes], Path]) -> None:
    assert [json.loads(value) for value in read(store(tmp_path / "data.csv", TABLE.encode()))] == [
        {"price": 1.5, "size": 2.0, "kind": 'a, "b"\nc', "note": "x"},
        {"price": None, "size": None, "kind": None, "note": None},
        {"price": 3.0, "size": "big", "kind": "7", "note": None},
    ]


def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    assert json.loads(read(plain(tmp_path / "data.csv", mark + b"price\n1\n"))[0]) == {"price": 1.0}
    assert read(plain(tmp_path / "data.jsonl", mark + b'{"price": 1}')) == [b'{"price": 1}']


def test_cells_too_many_are_dropped_and_cells_too_few_are_null(tmp_path: Path) -> None:
    values = read(plain(tmp_path / "data.csv", b"price,size\n1\n2,3,4\n"))
    assert [json.loads(value) for value in values] == [{"price": 1.0, "size": None}, {"price": 2.0, "size": 3.0}]


def test_bytes_that_are_not_utf8_come_through_to_be_judged_with_the_record(tmp_path: Path) -> None:
    broken = b'{"price": 1, "kind": "\xff"}'
    assert read(plain(tmp_path / "data.jsonl", broken)) == [broken]
    (value,) = read(plain(tmp_path / "data.csv", b"price,kind\n1,\xff\n"))
    for given in (broken, value):
        with pytest.raises(RecordError):
            SCHEMA.decode(given)


def test_standard_input_is_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES)))
    assert len(read(Path("-"))) == 3


def test_values_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = plain(tmp_path / "data.csv", b"price\n1\n" + b"2\n" * 100_000)
    values = read_values(path, SCHEMA)
    assert next(values) == b'{"price":1.0}'
    values.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("absent.jsonl", None, "cannot be read: No such file"),
        ("empty.csv", b"", "is empty"),
        ("data.jsonl.gz", b"not gzip", "cannot be read to its end"),
        ("torn.jsonl.gz", gzip.compress(LINES * 99, mtime=0)[:-20], "cannot be read to its end"),
        ("altered.jsonl.gz", gzip.compress(LINES, mtime=0)[:12] + b"\xff" * 30, "cannot be read to its end"),
        ("wide.csv", b"price\n" + b"1" * 200_000, "cannot be read to its end"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        read(tmp_path)


def test_json_on_the_wire_is_compact_utf8() -> None:
    assert as_json({"kind": "é", "size": None}) == '{"kind":"é","size":null}'.encode()
