"""Loads `decoding.c`, which the build compiled beside it: plain JSON into columns, without an object for each value.

What it decodes, it decodes to the same last bit as `trainer.schema` does by msgspec; the rest it leaves to that.
"""

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.compiled import library_of, opened

SOURCE = Path(__file__).with_suffix(".c")
KINDS: Final = {"numeric": 0, "boolean": 1, "categorical": 2}  # of `decoding.c`


def load(path: Path) -> ctypes.CDLL | None:
    """The library at a path, or None if it is not there, or not for this machine."""
    library = opened(path, "decode_records")
    if library is not None:
        whole, pointer = ctypes.c_int64, ctypes.c_void_p
        decode = library.decode_records
        decode.argtypes = [ctypes.c_char_p, *[whole] * 4, *[pointer] * 4, *[whole] * 2, *[pointer] * 3]
        decode.restype = whole
    return library


_library = load(library_of(SOURCE, "default"))  # one byte after the other: no instruction set makes it faster


def is_loaded() -> bool:
    """Whether the library is there."""
    return _library is not None


class Decoded(NamedTuple):
    """An array of B records."""

    numeric: NDArray[np.float32]  # (B, F), NaN where missing
    texts: NDArray[np.int32]  # (B, C, 2) where in the body a category begins and ends; the same where missing
    end: int  # where in the body the array ends


class RecordsDecoder:
    """Decodes arrays of flat records.

    Args:
        kinds: of the features by their names: `numeric`, `boolean` or `categorical`, and no name holds a dot.
    """

    def __init__(self, kinds: Mapping[str, str]) -> None:
        places = dict.fromkeys(KINDS, 0)
        codes, columns = [], []
        for kind in kinds.values():
            sort = "categorical" if kind == "categorical" else "numeric"
            codes.append(KINDS[kind])
            columns.append(places[sort])
            places[sort] += 1
        names = [b'"%b"' % name.encode() for name in kinds]  # none needs escapes: msgspec would not take it
        self._width, self._categories = places["numeric"], places["categorical"]
        # Kept, as the library is given their addresses.
        self._tables = (
            np.frombuffer(b"".join(names), dtype=np.uint8),
            np.cumsum([len(name) for name in names], dtype=np.int64),
            np.array(codes, dtype=np.uint8),
            np.array(columns, dtype=np.int64),
        )
        self._pointers = [table.ctypes.data for table in self._tables]

    @staticmethod
    def takes(kinds: Mapping[str, str]) -> bool:
        """Whether the library is there, and for records of such features."""
        flat = not any("." in name for name in kinds)
        return _library is not None and flat and set(kinds.values()) <= KINDS.keys()

    def decode(self, body: bytes, start: int, most_rows: int) -> Decoded | None:
        """The array of records that begins at a place of a body; None where it is not plain, which may be a mistake.

        Args:
            body: JSON.
            start: where the array begins, or space before it.
            most_rows: longer arrays are none.
        """
        assert _library is not None
        most_rows = min(most_rows, body.count(b"{", start))
        numeric = np.empty((most_rows, self._width), dtype=np.float32)
        texts = np.empty((most_rows, self._categories, 2), dtype=np.int32)
        end = ctypes.c_int64()
        rows = _library.decode_records(
            body,
            len(body),
            start,
            most_rows,
            len(self._tables[1]),
            *self._pointers,
            self._width,
            self._categories,
            numeric.ctypes.data,
            texts.ctypes.data,
            ctypes.addressof(end),
        )
        return Decoded(numeric[:rows], texts[:rows], end.value) if rows >= 0 else None
