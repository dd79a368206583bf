"""What the fields of sampled records are: which kinds of feature their values can be read as, and what was seen."""

import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.config import FeatureKind
from trainer.errors import ConfigError
from trainer.files import Line
from trainer.schema import FLOAT32_MAX, Scalar, category_text, moment, typed_cell

MOST_ROWS: Final = 20_000  # of a sample
LEAST_ROWS: Final = 200  # of a sample of records with many fields
MOST_VALUES: Final = 2_000_000  # of a sample; a hundred bytes each or so
MOST_FIELDS: Final = 4096
LARGEST_VECTOR: Final = 65_536
ISO_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}")
EPOCH_MS: Final = (1e11, 4.2e12)  # 1973 to 2103
SHOWN_VALUES: Final = 3
SHOWN_LETTERS: Final = 24  # of one value
Keys = tuple[str, ...]  # from the outermost object inwards


class Sample(NamedTuple):
    """Records to look at, in the order of their file."""

    records: list[dict[str, Any]]
    rows: int  # that were read, whether kept or not
    csv: bool  # whether values are the text of cells
    uneven: int | None = None  # the first line of a CSV with more or fewer cells than its header


def draw_sample(lines: Iterable[Line], *, csv: bool, seed: int = 0) -> Sample:
    """Keeps the first rows and, beside them, as many that are drawn from all later ones, each as likely as another.

    What is kept is bounded: 20,000 rows, fewer of records with more than 100 fields.
    """
    choose = random.Random(seed)
    first: list[tuple[int, dict[str, Any]]] = []
    later: list[tuple[int, dict[str, Any]]] = []
    half, rows = 0, 0
    uneven: int | None = None
    for number, record, whole in lines:
        if not rows:
            half = min(MOST_ROWS, max(LEAST_ROWS, MOST_VALUES // max(1, len(list(_leaves(record)))))) // 2
        if rows < half:
            first.append((rows, record))
        elif len(later) < half:
            later.append((rows, record))
        elif (place := choose.randrange(rows - half + 1)) < half:  # Vitter's algorithm R
            later[place] = (rows, record)
        if not whole and uneven is None:
            uneven = number
        rows += 1
    later.sort(key=lambda drawn: drawn[0])
    return Sample([record for _, record in (*first, *later)], rows, csv, uneven)


@dataclass(frozen=True)
class Field:
    """One field of the sample's N records.

    Attributes:
        name: its dotted path.
        kinds: of feature that all its values can be read as; none where `problem` says why not.
        present: (N,) whether a record has it, and not null.
        numbers: (N,) its values where all are numbers, NaN where missing.
        times_s: (N,) seconds since the epoch where all are times, NaN where missing.
        codes: (N,) which of `texts` a value is, -1 where missing.
        texts: its distinct values as text.
        size: of a vector.
        problem: why it can be no feature.
    """

    name: str
    kinds: tuple[FeatureKind, ...]
    present: NDArray[np.bool_]
    numbers: NDArray[np.float64] | None = None
    times_s: NDArray[np.float64] | None = None
    codes: NDArray[np.int64] | None = None
    texts: Sequence[str] = ()
    size: int | None = None
    problem: str = ""

    @property
    def missing(self) -> float:
        """Share of the records without it."""
        return 1 - float(self.present.mean())

    @property
    def constant(self) -> bool:
        """Whether it has one value, or none, and so says nothing."""
        return not self.present.any() or (len(self.texts) == 1 and bool(self.present.all()))

    @property
    def unique(self) -> bool:
        """Whether each record has another value."""
        return bool(self.present.all()) and len(self.texts) == len(self.present)

    @property
    def whole(self) -> bool:
        """Whether all its values are whole numbers."""
        return self.numbers is not None and bool((self.numbers[self.present] % 1 == 0).all())

    def words(self) -> set[str]:
        """The words in the last part of its name, in lower case: `orderId` and `order_id` are order and id."""
        last = self.name.rpartition(".")[2]
        return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", last)}

    def seen(self, kind: FeatureKind | None) -> str:
        """What was seen of it, as a feature of a kind, in a few words."""
        said = [self._values(kind)] if self.present.any() else []
        if self.missing:
            said.append(f"{percent(self.missing)} missing")
        return ", ".join(part for part in said if part)

    def _values(self, kind: FeatureKind | None) -> str:
        distinct = f"{len(self.texts):,} distinct value{'s' if len(self.texts) != 1 else ''}"
        if kind == "vector":
            return f"arrays of {self.size} numbers"
        if kind == "timestamp" and self.times_s is not None:
            known = self.times_s[self.present]
            return f"{moment(known.min() * 1000):%Y-%m-%d %H:%M} to {moment(known.max() * 1000):%Y-%m-%d %H:%M}"
        if kind == "boolean" and self.numbers is not None:
            return f"true in {percent(float(self.numbers[self.present].mean()))}"
        if kind == "numeric" and self.numbers is not None:
            known = self.numbers[self.present]
            return f"{distinct}, {known.min():.6g} to {known.max():.6g}"
        if self.codes is None:
            return ""
        often = np.argsort(-np.bincount(self.codes[self.present]), kind="stable")[:SHOWN_VALUES]
        shown = [shorten(self.texts[code]) for code in often]
        return f"{distinct}: {', '.join(shown)}{', ...' if len(self.texts) > SHOWN_VALUES else ''}"


def inspect(sample: Sample) -> list[Field]:
    """The fields of a sample, in the order in which they first come.

    Raises:
        ConfigError: there are more fields than a schema can name; keys are then data.
    """
    values: dict[Keys, list[tuple[int, Any]]] = {}
    objects: set[Keys] = set()
    for row, record in enumerate(sample.records):
        for path, value in _leaves(record) if not sample.csv else (((name,), cell) for name, cell in record.items()):
            found = values.setdefault(path, [])
            if value == {}:
                objects.add(path)
            elif value is not None:
                found.append((row, value))
            objects.update(path[:depth] for depth in range(1, len(path)))
        if len(values) > MOST_FIELDS:
            deepest = ".".join(sorted(values, key=lambda path: -len(path))[0])
            raise ConfigError(
                f"the records have more than {MOST_FIELDS:,} different fields, {shorten(deepest)!r} for instance: are "
                "keys of an object data? Write a list of pairs instead, or choose fields by hand"
            )
    names = {".".join(path) for path in values}
    fields = []
    for path, found in values.items():
        if path in objects and not found:
            continue  # an object that is sometimes null
        field = _field(".".join(path), found, len(sample.records), csv=sample.csv)
        problem = _name_problem(path, csv=sample.csv, names=names) or _shape_problem(path, values, objects)
        fields.append(_refused(field, problem) if problem else field)
    return fields


def percent(share: float) -> str:
    """A share for people: never 0% of something, nor all of what is not all."""
    if 0 < share < 0.01:
        return "under 1%"
    return "over 99%" if 0.99 < share < 1 else f"{share:.0%}"


def shorten(text: str) -> str:
    """A value as it can stand in a comment: in one line and not too long."""
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return text if len(text) <= SHOWN_LETTERS else f"{text[: SHOWN_LETTERS - 3]}..."


def _leaves(record: Mapping[str, Any], path: Keys = ()) -> Iterable[tuple[Keys, Any]]:
    """The fields of a record, those of its objects too; an empty object is one."""
    for key, value in record.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _name_problem(path: Keys, *, csv: bool, names: set[str]) -> str:
    if not all(path):
        return "it has no name"
    if any(letter in '"\\' or not letter.isprintable() for key in path for letter in key):
        return "its name has a quote, a backslash or a control character"
    if csv:
        inside = next((name for name in names if name.startswith(f"{path[0]}.")), None)
        return f"{shorten(inside)!r} reads as a field inside it" if inside else ""
    return "its name has a dot, which would read as a field of an object" if any("." in key for key in path) else ""


def _shape_problem(path: Keys, values: Mapping[Keys, list[tuple[int, Any]]], objects: set[Keys]) -> str:
    for depth in range(1, len(path) + 1):
        if path[:depth] in objects and values.get(path[:depth]):
            return f"{shorten('.'.join(path[:depth]))!r} is an object in some records and a value in others"
    return ""


def _refused(field: Field, problem: str) -> Field:
    return Field(field.name, (), field.present, codes=field.codes, texts=field.texts, problem=problem)


def _field(name: str, found: Sequence[tuple[int, Any]], rows: int, *, csv: bool) -> Field:
    if csv:
        return _cells(name, found, rows)
    values = [value for _, value in found]
    where = [row for row, _ in found]
    present = np.zeros(rows, dtype=bool)
    present[where] = True
    if any(isinstance(value, list) for value in values):
        return _vector(name, values, present)
    codes, texts = _codes(where, [category_text(value) for value in values], rows)
    kinds: list[FeatureKind] = ["categorical"]
    numbers = times_s = None
    if values and all(isinstance(value, bool) for value in values):
        numbers = _spread(where, [float(value) for value in values], rows)
        kinds = ["boolean", "categorical"]
    elif all(_is_number(value) for value in values):
        numbers = _spread(where, [float(value) for value in values], rows)
        kinds = ["numeric", "categorical"]
    if values and (times := _times(values)) is not None:
        times_s = _spread(where, times, rows)
        kinds.append("timestamp")
    return Field(name, tuple(kinds), present, numbers, times_s, codes, texts)


def _cells(name: str, found: Sequence[tuple[int, str]], rows: int) -> Field:
    """A column of CSV: of all kinds that its cells can be typed as."""
    kept = [(row, cell) for row, cell in found if typed_cell(cell, "numeric") is not None]
    typed = [typed_cell(cell, "numeric") for _, cell in kept]
    if typed and all(_is_number(value) for value in typed):
        field = _field(name, [(row, value) for (row, _), value in zip(kept, typed, strict=True)], rows, csv=False)
        # Only whole numbers without a fraction or an exponent are read as epoch milliseconds.
        if "timestamp" in field.kinds and all(isinstance(typed_cell(cell, "timestamp"), int) for _, cell in kept):
            return field
        return Field(name, ("numeric", "categorical"), field.present, field.numbers, None, field.codes, field.texts)
    truths = [typed_cell(cell, "boolean") for _, cell in kept]
    if truths and all(isinstance(value, bool) for value in truths):
        return _field(name, [(row, value) for (row, _), value in zip(kept, truths, strict=True)], rows, csv=False)
    if kept and _times([cell for _, cell in kept]) is not None:
        return _field(name, kept, rows, csv=False)
    return _field(name, [(row, cell) for row, cell in found if cell.strip()], rows, csv=False)


def _vector(name: str, values: Sequence[Any], present: NDArray[np.bool_]) -> Field:
    sizes = {len(value) if isinstance(value, list) else -1 for value in values}
    if sizes == {-1} or not all(isinstance(v, list) and all(_is_number(x) for x in v) for v in values):
        return Field(name, (), present, problem="it is an array of other things than numbers")
    if len(sizes) > 1:
        return Field(name, (), present, problem="its arrays have different lengths")
    (size,) = sizes
    if not 1 <= size <= LARGEST_VECTOR:
        return Field(name, (), present, problem=f"its arrays have {size} elements")
    return Field(name, ("vector",), present, size=size)


def _times(values: Sequence[Scalar]) -> list[float] | None:
    """Seconds since the epoch where all values are ISO 8601 or plausible epoch milliseconds, else None."""
    times = []
    for value in values:
        if isinstance(value, str):
            if not ISO_DATE.match(value):
                return None
        elif isinstance(value, bool) or value is None or not EPOCH_MS[0] <= value <= EPOCH_MS[1] or value % 1:
            return None
        at = moment(value)
        if at is None:
            return None
        times.append(at.timestamp())
    return times


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and -FLOAT32_MAX <= value <= FLOAT32_MAX


def _spread(where: Sequence[int], values: Sequence[float], rows: int) -> NDArray[np.float64]:
    spread = np.full(rows, np.nan)
    spread[where] = values
    return spread


def _codes(where: Sequence[int], texts: Sequence[str], rows: int) -> tuple[NDArray[np.int64], list[str]]:
    number: dict[str, int] = {}
    codes = np.full(rows, -1, dtype=np.int64)
    codes[where] = [number.setdefault(text, len(number)) for text in texts]
    return codes, list(number)
