"""Loads `decoding.c`, which the build compiled beside it: plain JSON into columns, without an object for each value.

What it decodes, it decodes to the same last bit as `trainer.schema` does by msgspec; the rest it leaves to that.
"""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.compiled import library_of, opened

SOURCE = Path(__file__).with_suffix(".c")
KINDS: Final = {"numeric": 0, "boolean": 1, "categorical": 2, "label": 3}  # of `decoding.c`


def load(path: Path) -> ctypes.CDLL | None:
    """The library at a path, or None if it is not there, or not for this machine."""
    library = opened(path, "first_alike")
    if library is not None:
        whole, pointer = ctypes.c_int64, ctypes.c_void_p
        fields: list[type[ctypes.c_int64] | type[ctypes.c_void_p]] = [whole, *[pointer] * 4, *[whole] * 2]
        library.decode_records.argtypes = [ctypes.c_char_p, *[whole] * 3, *fields, *[pointer] * 3]
        library.decode_records.restype = whole
        library.decode_values.argtypes = [ctypes.c_char_p, whole, pointer, *fields, *[pointer] * 4]
        library.decode_values.restype = None
        library.first_alike.argtypes = [ctypes.c_char_p, *[whole] * 3, pointer, whole, *[pointer] * 2]
        library.first_alike.restype = None
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


class DecodedValues(NamedTuple):
    """B values, of which some are plain records; of the others nothing but `taken` says anything."""

    taken: NDArray[np.bool_]  # (B,) whether it is one
    numeric: NDArray[np.float32]  # (B, F), NaN where missing
    label: NDArray[np.float64]  # (B,) what is of kind `label`; NaN where missing
    body: bytes  # all values, one after the other
    texts: NDArray[np.int32]  # (B, C, 2) as in `Decoded`


class RecordsDecoder:
    """Decodes flat records.

    Args:
        kinds: of the fields by their names: `numeric`, `boolean`, `categorical`, or `label` for a number that is no
            feature; no name holds a dot.
    """

    def __init__(self, kinds: Mapping[str, str]) -> None:
        places = dict.fromkeys(KINDS, 0)
        codes, columns = [], []
        for kind in kinds.values():
            sort = kind if kind in ("categorical", "label") else "numeric"
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
        self._fields = (
            len(names),
            *(table.ctypes.data for table in self._tables),
            places["numeric"],
            places["categorical"],
        )

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
            *self._fields,
            numeric.ctypes.data,
            texts.ctypes.data,
            ctypes.addressof(end),
        )
        return Decoded(numeric[:rows], texts[:rows], end.value) if rows >= 0 else None

    def decode_values(self, values: Sequence[bytes]) -> DecodedValues:
        """Records that stand alone, each of them plain or not."""
        assert _library is not None
        rows, body = len(values), b"".join(values)
        ends = np.cumsum(np.fromiter(map(len, values), np.int64, rows))
        found = DecodedValues(
            taken=np.empty(rows, dtype=np.bool_),
            numeric=np.empty((rows, self._width), dtype=np.float32),
            label=np.empty(rows, dtype=np.float64),
            body=body,
            texts=np.empty((rows, self._categories, 2), dtype=np.int32),
        )
        arrays = (found.numeric, found.texts, found.label, found.taken)
        _library.decode_values(body, rows, ends.ctypes.data, *self._fields, *(array.ctypes.data for array in arrays))
        return found


def distinct_texts(body: bytes, texts: NDArray[np.int32], column: int) -> tuple[list[bytes], NDArray[np.int64]]:
    """The texts of a column, each once, and which of them each row has.

    Args:
        body: that they stand in.
        texts: (B, C, 2) places, as in `Decoded`.
        column: one of C.

    Returns:
        T texts in the order in which they come first, and (B,) from 0 to T - 1.
    """
    assert _library is not None
    rows, categories, _ = texts.shape
    size = 2 << rows.bit_length()
    work = np.empty(size + rows, dtype=np.int32)
    slots, first = work.ctypes.data, work[size:]
    texts = np.ascontiguousarray(texts)
    _library.first_alike(body, rows, categories, column, texts.ctypes.data, size, slots, first.ctypes.data)
    begins = first == np.arange(rows)
    places = texts[begins, column].tolist()
    return [body[begin:end] for begin, end in places], (begins.cumsum() - 1)[first]
