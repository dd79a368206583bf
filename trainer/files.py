"""Data files: JSON lines or CSV, plain or gzipped, as the values of records."""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Final, cast

from trainer.errors import ConfigError
from trainer.schema import FeatureSchema

CSV_SUFFIXES: Final = (".csv", ".csv.gz")


def read_values(path: Path, schema: FeatureSchema) -> Iterator[bytes]:
    """The values of a file's records, in order: lines of JSON as they are, lines of CSV typed by the schema.

    Args:
        path: a `.csv` or `.csv.gz` with a header, or anything else with one JSON object a line; `-` is standard input.
        schema: says of what kind a CSV column is. Columns it does not know stay text.

    Raises:
        ConfigError: the file cannot be read, or a CSV has no header.
    """
    with ExitStack() as stack:
        file = _open_text(path, stack)
        try:
            if path.name.endswith(CSV_SUFFIXES):
                table = csv.DictReader(file)
                if not table.fieldnames:
                    raise ConfigError(f"{path} is empty: a CSV file begins with the names of its columns")
                for cells in table:
                    yield as_json(schema.from_csv({name: cell for name, cell in cells.items() if name is not None}))
            else:
                for line in file:
                    value = line.rstrip("\r\n")
                    if value:
                        yield value.encode("utf-8", "surrogateescape")
        except (OSError, EOFError, zlib.error, csv.Error) as error:
            raise ConfigError(f"{path} cannot be read to its end: {error}") from error


def as_json(record: dict[str, object]) -> bytes:
    """A record's value on the wire."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogateescape")


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
