"""Data files: JSON lines or CSV, plain or gzipped, as the values of records."""

import csv
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, cast

import msgspec

from trainer.errors import ConfigError
from trainer.schema import FeatureSchema

CSV_SUFFIXES: Final = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
DELIMITERS: Final = (",", ";", "\t", "|")
OTHER_FORMATS: Final = {"PAR1": "a Parquet file", "PK\x03\x04": "a ZIP archive or a spreadsheet", "\x1f": "gzip"}


class Line(NamedTuple):
    """One record of a file, its cells text where the file is CSV, and where it ends."""

    number: int  # from 1
    record: dict[str, Any]
    whole: bool  # whether it has as many cells as the header; always so for JSON


def is_csv(path: Path) -> bool:
    """Whether a file is read as CSV, by its name; all others as one JSON object a line."""
    return path.name.endswith(CSV_SUFFIXES)


def read_values(path: Path, schema: FeatureSchema) -> Iterator[bytes]:
    """The values of a file's records, in order: lines of JSON as they are, lines of CSV typed by the schema.

    Args:
        path: a `.csv` or `.tsv` (`.gz` too) with a header, or anything else with one JSON object a line; `-` is
            standard input. A CSV is split at commas, semicolons, tabs or bars, whichever its header has most.
        schema: says of what kind a CSV column is. Columns it does not know stay text.

    Raises:
        ConfigError: the file cannot be read, or a CSV has no header.
    """
    with _text_of(path) as file:
        if is_csv(path):
            for cells in _table(path, file):
                yield as_json(schema.from_csv({name: cell for name, cell in cells.items() if name is not None}))
        else:
            for line in file:
                value = line.rstrip("\r\n")
                if value:
                    yield value.encode("utf-8", "surrogateescape")


def read_lines(path: Path) -> Iterator[Line]:
    """The records of a file whose schema is not known yet; a path is read as `read_values` reads it.

    Raises:
        ConfigError: the file cannot be read, or a line is no record; with the number of the line.
    """
    with _text_of(path) as file:
        if is_csv(path):
            table = _table(path, file)
            names = [name for name in table.fieldnames or () if name]
            for name in names:
                _check_utf8(path, 1, name)
                if names.count(name) > 1:
                    raise ConfigError(f"{path}, line 1: two columns are called {name!r}; give one of them another name")
            for cells in table:
                whole = None not in cells and None not in cells.values()
                record = {name: cell for name, cell in cells.items() if name is not None}
                _check_utf8(path, table.line_num, "".join(cell for cell in record.values() if cell))
                yield Line(table.line_num, record, whole)
        else:
            for number, line in enumerate(file, 1):
                if value := line.rstrip("\r\n"):
                    yield Line(number, _object(path, number, value), True)


def as_json(record: dict[str, object]) -> bytes:
    """A record's value on the wire."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogateescape")


def _table(path: Path, file: IO[str]) -> "csv.DictReader[str]":
    header = file.readline()
    unquoted = re.sub(r'"[^"]*"', "", header)
    table = csv.DictReader(itertools.chain([header], file), delimiter=max(DELIMITERS, key=unquoted.count))
    if not table.fieldnames:
        raise ConfigError(f"{path} is empty: a CSV file begins with the names of its columns")
    return table


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    where = f"{path}, line {number}"
    for begin, what in OTHER_FORMATS.items() if number == 1 else ():
        if line.startswith(begin):
            name = "a name that ends in .gz says so" if what == "gzip" else "convert it to CSV or to JSON lines"
            raise ConfigError(f"{path} is {what}: {name}")
    _check_utf8(path, number, line)
    try:
        record = msgspec.json.decode(line)
    except (msgspec.MsgspecError, RecursionError) as error:
        hint = "; a CSV file has a name that ends in .csv, .tsv, .csv.gz or .tsv.gz" if number == 1 else ""
        raise ConfigError(f"{where} is not JSON: {error}{hint}") from None
    if not isinstance(record, dict):
        hint = "; jq -c '.[]' makes such lines of an array" if isinstance(record, list) else ""
        raise ConfigError(f"{where} is not a JSON object, and each line is to be one{hint}")
    return record


def _check_utf8(path: Path, number: int, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise ConfigError(
            f"{path}, line {number} is not UTF-8 (byte 0x{byte:02x}): convert the file, for instance with iconv"
        ) from None


@contextmanager
def _text_of(path: Path) -> Iterator[IO[str]]:
    """A file's text, and any fault on the way through it as an error that names the file."""
    with ExitStack() as stack:
        file = _open_text(path, stack)
        try:
            yield file
        except (OSError, EOFError, zlib.error, csv.Error) as error:
            raise ConfigError(f"{path} cannot be read to its end: {error}") from error


def _open_text(path: Path, stack: ExitStack) -> IO[str]:
    """A text file to read; bytes that are not UTF-8 come through as they are, to be judged where records are."""
    if str(path) == "-":
        binary: IO[bytes] = sys.stdin.buffer
    else:
        try:
            binary = stack.enter_context(path.open("rb"))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    if path.suffix == ".gz":
        binary = cast("IO[bytes]", stack.enter_context(gzip.GzipFile(fileobj=binary, mode="rb")))
    return io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")
