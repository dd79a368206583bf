"""What a record is: which fields of a JSON object are features, label, id and event time, and how they become numbers.

Trainer and service decode with the same `FeatureSchema`, so what is predicted is read exactly as what was learned.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from operator import attrgetter
from typing import Annotated, Any, Final, NamedTuple, Self

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from trainer.classes import ClassNames
from trainer.config import FeatureSettings, SchemaSettings, Settings, TaskName
from trainer.decoding import RecordsDecoder, distinct_texts
from trainer.errors import ConfigError, RecordError

FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
CATEGORY_CACHE: Final = 1 << 16  # categories remembered per feature; past it the cache starts again
TIMESTAMP_COLUMNS: Final = ("hour_sin", "hour_cos", "weekday_sin", "weekday_cos", "yearday_sin", "yearday_cos")
MISSING_CELLS: Final = ("na", "n/a", "nan", "null", "none")  # in lower case; a category may be called so
NOT_TEXT: Final = ("numeric", "boolean", "timestamp", "vector")

Scalar = str | int | float | bool | None
LEAF_TYPES: Final[dict[str, Any]] = {
    "numeric": float | None,
    "boolean": bool | None,
    "categorical": Scalar,
    "timestamp": str | int | float | None,
    "number label": float | None,
    "class label": Scalar,
    "time": Scalar,
}


class Row(NamedTuple):
    """One decoded record, features in the order of the schema's columns."""

    numeric: tuple[float | None, ...]  # F values, None where missing
    categorical: tuple[int, ...]  # C buckets, 0 where missing
    label: float  # a class by its number; NaN where the record was decoded for prediction
    time_s: float | None  # event time, seconds since the epoch


class Columns(NamedTuple):
    """The features of B records, in columns."""

    numeric: NDArray[np.float32]  # (B, F), NaN where missing
    categorical: NDArray[np.int64]  # (B, C) buckets, 0 where missing


class Labelled(NamedTuple):
    """B labelled records, in columns."""

    features: Columns
    label: NDArray[np.float64]  # (B,), a class by its number
    time_s: NDArray[np.float64]  # (B,) event times, NaN where a record has none


class Parsed(NamedTuple):
    """B labelled records whose labels are still as JSON has them, and what is wrong with further ones."""

    place: NDArray[np.int64]  # (B,) among all that were given
    features: Columns
    label: list[Any] | NDArray[np.float64]  # an array of numbers that have been looked at
    time_s: NDArray[np.float64]  # (B,), as in `Labelled`
    rejected: Mapping[int, RecordError]  # by place


class FeatureSchema:
    """Decodes records and arranges their features in columns.

    Attributes:
        settings: the `[schema]` table it was made from.
        numeric_columns: F names; a vector takes one column an element, a timestamp six (sine and cosine of the hour,
            the weekday and the day of the year).
        categorical_columns: C names.
        buckets: C sizes; bucket 0 of each stands for a missing value.
        instance_type: a msgspec type for one record without its label, to build request types from.
        classes: where labels are classes, those known so far; decoding a labelled record may add one.
    """

    def __init__(self, settings: SchemaSettings, category_buckets: int, task: TaskName = "regression") -> None:
        self.settings = settings
        self.classes: ClassNames | None = None
        if task == "classification":
            self.classes = ClassNames(settings.classes, settings.max_classes, settings.label)
        kinds = settings.features
        self.categorical_columns = tuple(name for name, f in kinds.items() if f.kind == "categorical")
        self.buckets = tuple(kinds[name].buckets or category_buckets for name in self.categorical_columns)
        self.numeric_columns = tuple(column for name, f in kinds.items() for column in _columns(name, f))
        self._record = _compile(settings, LEAF_TYPES["number label" if self.classes is None else "class label"])
        self._instance = _compile(settings, None)
        self.instance_type = self._instance.type
        self._decode_record = msgspec.json.Decoder(self._record.type).decode
        self._decode_instance = msgspec.json.Decoder(self.instance_type).decode
        self._plain = all(f.kind in ("numeric", "boolean", "categorical") for f in kinds.values())
        self._wide = [(name, f.kind) for name, f in kinds.items() if f.kind != "categorical"]
        self._caches: tuple[dict[str | float, int], ...] = tuple({} for _ in self.buckets)
        self._json_caches: tuple[dict[bytes, int], ...] = tuple({} for _ in self.buckets)
        self._decode_scalar = msgspec.json.Decoder(Scalar).decode
        of_features = {name: f.kind for name, f in kinds.items()}
        self._plain_records = RecordsDecoder(of_features) if RecordsDecoder.takes(of_features) else None
        beside = [(settings.label, "label" if self.classes is None else "categorical")]
        beside += [(settings.time, "categorical")] if settings.time else []
        fields = dict([*of_features.items(), *beside])  # the order in which `_plain_parsed` finds them
        distinct = len(fields) == len(of_features) + len(beside)
        self._plain_labelled = RecordsDecoder(fields) if distinct and RecordsDecoder.takes(fields) else None
        label_kind = "numeric" if self.classes is None else "categorical"
        roles = {settings.label: label_kind, settings.time: "timestamp", settings.id: "categorical"}
        self._kinds = {**{name: kind for name, kind in roles.items() if name}, **{n: f.kind for n, f in kinds.items()}}
        self._objects = {name.partition(".")[0] for name in self._kinds if "." in name}

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The schema that a configuration describes."""
        return cls(settings.record_schema, settings.model.category_buckets, settings.task)

    def decode(self, value: bytes) -> Row:
        """Reads one labelled record.

        Raises:
            RecordError: with reason `not_json`, `wrong_type`, `not_finite` or `no_label`; for classes also
                `unknown_class` or `too_many_classes`.
        """
        return self._labelled_row(self._parse(value))

    def parsed(self, values: Sequence[bytes]) -> Parsed:
        """The first half of what `decode` makes of records, by few steps a record; `labelled` is the second.

        Raises:
            RecordError: `decode` raises one that is found late for at least one record; which is for it to say.
        """
        plain, others = self._plain_parsed(values)
        if plain is None:
            return self._parsed_one_by_one(values, range(len(values)))
        return _mixed(plain, self._parsed_one_by_one(values, others)) if others else plain

    def labelled(self, parsed: Parsed) -> Labelled:
        """The second half, which may add classes.

        Raises:
            RecordError: as `parsed`.
        """
        return Labelled(parsed.features, self._label_column(parsed.label), parsed.time_s)

    def _parse(self, value: bytes) -> Any:
        try:
            return self._decode_record(value)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise explain(error) from None

    def _parsed_one_by_one(self, values: Sequence[bytes], places: Iterable[int]) -> Parsed:
        objects: dict[int, Any] = {}
        rejected: dict[int, RecordError] = {}
        for place in places:
            try:
                objects[place] = self._parse(values[place])
            except RecordError as error:
                rejected[place] = error
        labels = self._record.label(list(objects.values()))
        for place in [place for place, label in zip(objects, labels, strict=True) if label is None]:
            rejected[place] = self._fault(objects.pop(place))
        good = list(objects.values())
        return Parsed(
            np.array(list(objects), dtype=np.int64),
            self._arranged(self._record, good),
            [label for label in labels if label is not None],
            _times(self._record.time(good)),
            dict(sorted(rejected.items())),
        )

    def _plain_parsed(self, values: Sequence[bytes]) -> tuple[Parsed | None, list[int]]:
        """Those of the values that are plain records, and the places of the others; None: msgspec is to read all."""
        if self._plain_labelled is None:
            return None, []
        found = self._plain_labelled.decode_values(values)
        label_is_there = ~np.isnan(found.label) if self.classes is None else found.texts[:, len(self.buckets), 1] > 0
        taken = found.taken & label_is_there
        place, others = np.flatnonzero(taken), np.flatnonzero(~taken).tolist()
        numeric, texts, label = found.numeric, found.texts, found.label
        if others:
            numeric, texts, label = numeric[place], texts[place], label[place]
        try:
            features = Columns(numeric, self._bucket_columns(found.body, texts))
            beside = [
                self._scalars(*distinct_texts(found.body, texts, column))
                for column in range(len(self.buckets), texts.shape[1])
            ]
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None, []
        time_s = _times(beside.pop()) if self.settings.time else np.full(len(place), np.nan)
        return Parsed(place, features, beside.pop() if beside else label, time_s, {}), others

    def decode_instance(self, value: bytes) -> Row:
        """Reads one record to predict for; a label in it is ignored.

        Raises:
            RecordError: with reason `not_json`, `wrong_type` or `not_finite`.
        """
        try:
            return self.row(self._decode_instance(value))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise explain(error) from None

    def row(self, instance: Any) -> Row:
        """The row of an object of `instance_type`.

        Raises:
            RecordError: with reason `not_finite`, or `wrong_type` for a timestamp that is none.
        """
        return self._row(self._instance.get(instance))

    def columns(self, instances: Sequence[Any]) -> Columns:
        """The features of objects of `instance_type`, as `row` has them, by few steps an instance.

        Raises:
            RecordError: as `row` does; its `instance` is the place of the one at fault.
        """
        try:
            return self._arranged(self._instance, instances)
        except RecordError as error:
            raise self._first_fault(instances) from error

    def columns_within(self, body: bytes, start: int, most_rows: int) -> tuple[Columns, int] | None:
        """The features of an array of records that begins at a place of a JSON body, as `columns` has them.

        It takes a fraction of the time, and knows plain records alone: of numbers, booleans and categories, and with no
        field but such scalars.

        Args:
            body: JSON.
            start: where in it the array begins.
            most_rows: longer arrays are not taken.

        Returns:
            The columns, and where in the body the array ends; None where it is for others to decode, or to refuse.
        """
        found = self._plain_records and self._plain_records.decode(body, start, most_rows)
        if not found:
            return None
        try:
            return Columns(found.numeric, self._bucket_columns(body, found.texts)), found.end
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None

    def numeric(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Numeric features of rows, (B, F), NaN where missing."""
        return np.array([row.numeric for row in rows], dtype=np.float32).reshape(len(rows), len(self.numeric_columns))

    def categorical(self, rows: Sequence[Row]) -> NDArray[np.int64]:
        """Categorical features of rows, (B, C), as buckets."""
        return np.array([row.categorical for row in rows], dtype=np.int64).reshape(len(rows), len(self.buckets))

    def from_csv(self, cells: Mapping[str, str | None]) -> dict[str, Any]:
        """A record from a line of CSV, each cell typed by the schema; an empty one is null, and NA but for a category.

        A cell that is not of its type stays text, so that it is rejected where every record is judged. A column that
        the schema does not know stays text too, unless its name is needed for an object that known columns lie in.
        """
        record: dict[str, Any] = {}
        for column, cell in cells.items():
            kind = self._kinds.get(column)
            if kind is None and column in self._objects:
                continue
            *parents, leaf = column.split(".") if kind else [column]
            table = record
            for parent in parents:
                table = table.setdefault(parent, {})
            table[leaf] = typed_cell(cell, kind)
        return record

    @property
    def numeric_width(self) -> int:
        """Width of the numeric input of a body: F standardised columns, then F that are 1 where a value is missing."""
        return 2 * len(self.numeric_columns)

    def identity(self, record: Mapping[str, Any]) -> str | None:
        """The record's id as text, None where the schema names none or the record has none."""
        if self.settings.id is None:
            return None
        value: Any = record
        for part in self.settings.id.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return None if value is None or isinstance(value, dict | list) else category_text(value)

    def _arranged(self, compiled: "_Compiled", records: Sequence[Any]) -> Columns:
        numeric = compiled.numeric(records)
        if not self._plain:
            numeric = [self._widen(values) for values in numeric]
        values = _array(numeric).reshape(len(records), len(self.numeric_columns))
        if np.count_nonzero(np.abs(values) > FLOAT32_MAX):
            raise RecordError("not_finite", "a feature is too large for a 32-bit float")
        buckets = [
            self._buckets(feature, column)
            for feature, column in enumerate(zip(*compiled.categorical(records), strict=True))
        ]
        categorical = np.array(buckets, dtype=np.int64).reshape(len(self.buckets), len(records)).T
        return Columns(values.astype(np.float32), categorical)

    def _row(self, fields: tuple[Any, ...]) -> Row:
        label, time, numeric, categorical = fields
        if not self._plain:
            numeric = self._widen(numeric)
        for column, value in enumerate(numeric):
            if value is not None and not -FLOAT32_MAX <= value <= FLOAT32_MAX:
                name = self.numeric_columns[column]
                raise RecordError("not_finite", f"feature {name!r} is {value!r}: too large for a 32-bit float", name)
        buckets = tuple(
            (type(value) is str and cache.get(value)) or self._bucket(feature, value)
            for feature, (value, cache) in enumerate(zip(categorical, self._caches, strict=True))
        )
        # The label last, so that no class is added for a record that is rejected.
        return Row(numeric, buckets, math.nan if label is None else self._label(label), _seconds(time))

    def _labelled_row(self, record: Any) -> Row:
        row = self._row(self._record.get(record))
        if math.isnan(row.label):
            raise RecordError("no_label", f"the label {self.settings.label!r} is missing or null", self.settings.label)
        return row

    def _fault(self, record: Any) -> RecordError:
        """What is wrong with a record whose label is missing: that, or what is found before."""
        try:
            self._labelled_row(record)
        except RecordError as error:
            return error
        raise AssertionError("a record without a label has a fault")

    def _label(self, value: str | int | float | bool) -> float:
        name = self.settings.label
        if self.classes is not None:
            if isinstance(value, float) and not value.is_integer():
                raise RecordError(
                    "wrong_type", f"the label {name!r} is {value!r}: a class is a string or an integer", name
                )
            return self.classes.number(category_text(value))
        number = float(value)
        if not -FLOAT32_MAX <= number <= FLOAT32_MAX:
            raise RecordError("not_finite", f"the label {name!r} is {number!r}: too large for a 32-bit float", name)
        return number

    def _label_column(self, values: list[Any] | NDArray[np.float64]) -> NDArray[np.float64]:
        if isinstance(values, np.ndarray):
            return values
        if self.classes is not None:
            return np.array([self._label(value) for value in values], dtype=np.float64)
        labels = np.array(values, dtype=np.float64)
        if np.count_nonzero(np.abs(labels) > FLOAT32_MAX):
            raise RecordError("not_finite", "a label is too large for a 32-bit float")
        return labels

    def _first_fault(self, instances: Sequence[Any]) -> RecordError:
        for place, instance in enumerate(instances):
            try:
                self.row(instance)
            except RecordError as error:
                error.instance = place
                return error
        raise AssertionError("what does not fit in columns does not fit in rows")

    def _buckets(self, feature: int, values: Iterable[Scalar]) -> list[int]:
        seen = self._caches[feature].get
        # Most are texts seen before; no bucket of these is 0.
        return [(type(value) is str and seen(value)) or self._bucket(feature, value) for value in values]

    def _scalars(self, texts: Sequence[bytes], which: NDArray[np.int64]) -> list[Scalar]:
        """Scalars as they stand in JSON, None for nothing, by which of several texts each is."""
        values = [self._decode_scalar(text) if text else None for text in texts]
        return [values[number] for number in which.tolist()]

    def _bucket_columns(self, body: bytes, texts: NDArray[np.int32]) -> NDArray[np.int64]:
        """Buckets (B, C) of the categories that stand at places (B, C or more, 2) of a body."""
        columns = np.zeros((len(texts), len(self.buckets)), dtype=np.int64)
        for feature in range(len(self.buckets)):
            different, which = distinct_texts(body, texts, feature)
            columns[:, feature] = np.array(self._buckets_of_json(feature, different), dtype=np.int64)[which]
        return columns

    def _buckets_of_json(self, feature: int, texts: Sequence[bytes]) -> list[int]:
        """Buckets of categories as they stand in JSON, nothing for a missing one."""
        cache = self._json_caches[feature]
        buckets = []
        for text in texts:
            bucket = cache.get(text)
            if bucket is None:
                if len(cache) >= CATEGORY_CACHE:
                    cache.clear()
                bucket = cache[text] = self._bucket(feature, self._decode_scalar(text)) if text else 0
            buckets.append(bucket)
        return buckets

    def _bucket(self, feature: int, value: Scalar) -> int:
        if value is None:
            return 0
        text = category_text(value)
        cache = self._caches[feature]
        bucket = cache.get(text)
        if bucket is None:
            if len(cache) >= CATEGORY_CACHE:
                cache.clear()
            name = self.categorical_columns[feature]
            key = f"{name}\0{text}".encode("utf-8", "surrogatepass")
            bucket = cache[text] = 1 + xxhash.xxh3_64_intdigest(key) % (self.buckets[feature] - 1)
        return bucket

    def _widen(self, values: tuple[Any, ...]) -> tuple[float | None, ...]:
        """Spreads vectors and timestamps over their columns."""
        wide: list[float | None] = []
        for (name, kind), value in zip(self._wide, values, strict=True):
            if kind == "vector":
                size = self.settings.features[name].size or 0
                wide.extend([None] * size if value is None else value)
            elif kind == "timestamp":
                wide.extend(_cycles(name, value))
            else:
                wide.append(value)
        return tuple(wide)


def _mixed(one: Parsed, other: Parsed) -> Parsed:
    """The records of both, in the order of their places."""
    place = np.concatenate([one.place, other.place])
    order = place.argsort()
    numeric = np.concatenate([one.features.numeric, other.features.numeric])[order]
    categorical = np.concatenate([one.features.categorical, other.features.categorical])[order]
    labels, time_s = [*one.label, *other.label], np.concatenate([one.time_s, other.time_s])[order]
    label = [labels[number] for number in order]
    return Parsed(place[order], Columns(numeric, categorical), label, time_s, {**one.rejected, **other.rejected})


def category_text(value: str | int | float | bool) -> str:
    """The text of a JSON scalar, so that 1, 1.0 and "1" are one category."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return repr(value)


def explain(error: Exception) -> RecordError:
    """A RecordError that says what a decoder found, and in which field."""
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        return RecordError("not_json", "nested too deeply" if isinstance(error, RecursionError) else text)
    match = re.fullmatch(r"(?P<what>.*) - at `\$(?P<path>.*)`", text, re.DOTALL)
    what, path = (match["what"], match["path"].removeprefix(".")) if match else (text, "")
    reason = "not_finite" if what == "Number out of range" else "wrong_type"
    return RecordError(reason, f"{path}: {what}" if path else what, path)


def _columns(name: str, feature: FeatureSettings) -> list[str]:
    match feature.kind:
        case "categorical":
            return []
        case "vector":
            return [f"{name}[{i}]" for i in range(feature.size or 0)]
        case "timestamp":
            return [f"{name}.{cycle}" for cycle in TIMESTAMP_COLUMNS]
        case _:
            return [name]


class _Compiled(NamedTuple):
    """A msgspec type for the record, and functions from its objects to values by kind."""

    type: type[Any]
    get: Callable[[Any], tuple[Any, ...]]  # label, time, numeric, categorical
    label: Callable[[Sequence[Any]], list[Any]]
    time: Callable[[Sequence[Any]], list[Any]]
    numeric: Callable[[Sequence[Any]], list[tuple[Any, ...]]]
    categorical: Callable[[Sequence[Any]], list[tuple[Any, ...]]]


def _compile(settings: SchemaSettings, label_type: Any) -> _Compiled:
    """Types and functions for records; without a type for the label they have none."""
    leaves: dict[str, Any] = {}
    if settings.time:
        leaves[settings.time] = LEAF_TYPES["time"]
    for name, feature in settings.features.items():
        leaves[name] = _vector_type(feature.size) if feature.kind == "vector" else LEAF_TYPES[feature.kind]
    if label_type is not None:
        leaves[settings.label] = label_type

    root: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split(".")
        table = root
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise ConfigError(f"schema: {path!r} lies inside {parent!r}, which is itself a field")
        if last in table:
            raise ConfigError(f"schema: {path!r} is a field and has fields inside it")
        table[last] = leaf
    attributes: dict[str, str] = {}
    record_type = _struct("Record", root, "", "", attributes)

    def getter(paths: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
        if not paths:
            return lambda record: ()
        names = [attributes[path] for path in paths]
        fast = attrgetter(*names)

        def get(record: Any) -> tuple[Any, ...]:
            try:
                values = fast(record)
            except AttributeError:  # a parent object is null
                return tuple(_walk(record, name) for name in names)
            return values if len(names) > 1 else (values,)

        return get

    def getter_of_many(paths: Sequence[str]) -> Callable[[Sequence[Any]], list[tuple[Any, ...]]]:
        get = getter(paths)
        if len(paths) < 2:  # attrgetter gives a bare value then
            return lambda records: list(map(get, records))
        fast = attrgetter(*(attributes[path] for path in paths))

        def get_many(records: Sequence[Any]) -> list[tuple[Any, ...]]:
            try:
                return list(map(fast, records))
            except AttributeError:  # a parent object is null
                return list(map(get, records))

        return get_many

    def getter_of_leaf(path: str | None) -> Callable[[Sequence[Any]], list[Any]]:
        if path is None:
            return lambda records: [None] * len(records)
        name = attributes[path]
        fast = attrgetter(name)

        def get_leaf(records: Sequence[Any]) -> list[Any]:
            try:
                return list(map(fast, records))
            except AttributeError:  # a parent object is null
                return [_walk(record, name) for record in records]

        return get_leaf

    of_numbers = [name for name, f in settings.features.items() if f.kind != "categorical"]
    of_categories = [name for name, f in settings.features.items() if f.kind == "categorical"]
    numeric, categorical = getter(of_numbers), getter(of_categories)
    label_path = None if label_type is None else settings.label
    label, time = (getter([path] if path else []) for path in (label_path, settings.time))

    def get(record: Any) -> tuple[Any, ...]:
        return (*(label(record) or (None,)), *(time(record) or (None,)), numeric(record), categorical(record))

    return _Compiled(
        record_type,
        get,
        label=getter_of_leaf(label_path),
        time=getter_of_leaf(settings.time),
        numeric=getter_of_many(of_numbers),
        categorical=getter_of_many(of_categories),
    )


def _struct(name: str, table: dict[str, Any], path: str, attribute: str, attributes: dict[str, str]) -> type[Any]:
    """A msgspec struct for one level of a record; JSON keys need not be identifiers, so attributes are numbered."""
    fields: list[Any] = []
    keys: dict[str, str] = {}
    for number, (key, leaf) in enumerate(table.items()):
        field = f"f{number}"
        keys[field] = key
        inner_path, inner_attribute = f"{path}{key}", f"{attribute}{field}"
        if isinstance(leaf, dict):
            inner = _struct(f"{name}_{number}", leaf, f"{inner_path}.", f"{inner_attribute}.", attributes)
            fields.append((field, inner | None, None))
        else:
            attributes[inner_path] = inner_attribute
            fields.append((field, leaf, None))
    return msgspec.defstruct(name, fields, rename=keys, frozen=True, gc=False)


def _array(rows: Sequence[Sequence[float | None]]) -> NDArray[np.float64]:
    """All numbers of the rows, one after the other; NaN for None."""
    try:
        return np.fromiter(chain.from_iterable(rows), np.float64)
    except TypeError:  # there is a None, and the slower way it is
        return np.array(rows, dtype=np.float64)


def _walk(record: Any, attribute: str) -> Any:
    for part in attribute.split("."):
        record = None if record is None else getattr(record, part)
    return record


def _vector_type(size: int | None) -> Any:
    return Annotated[list[float], msgspec.Meta(min_length=size, max_length=size)] | None


def moment(value: str | int | float) -> datetime | None:
    """Epoch milliseconds or ISO 8601 (UTC if it says no offset), in UTC; None if it is neither or past year 9999."""
    try:
        if not isinstance(value, str):
            return datetime.fromtimestamp(value / 1000, UTC)
        time = datetime.fromisoformat(value)
        if time.tzinfo is None:
            return time.replace(tzinfo=UTC)
        try:
            return time.astimezone(UTC)
        except OverflowError:  # by its offset it lies hours before the year 1 or after 9999: the nearest there is
            return (datetime.min if time.year == 1 else datetime.max).replace(tzinfo=UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _seconds(value: Scalar) -> float | None:
    """An event time as seconds since the epoch; None if it is none."""
    time = None if value is None or isinstance(value, bool) else moment(value)
    return None if time is None else time.timestamp()


def _times(values: Sequence[Scalar]) -> NDArray[np.float64]:
    """Event times as seconds since the epoch, NaN for None."""
    return np.array([_seconds(value) for value in values], dtype=np.float64)


def _cycles(name: str, value: str | int | float | None) -> list[float | None]:
    if value is None:
        return [None] * len(TIMESTAMP_COLUMNS)
    time = moment(value)
    if time is None:
        raise RecordError("wrong_type", f"{name}: {value!r} is neither ISO 8601 nor epoch milliseconds", name)
    hour = time.hour + time.minute / 60 + time.second / 3600
    turns = (hour / 24, (time.weekday() + hour / 24) / 7, (time.timetuple().tm_yday - 1 + hour / 24) / 365.25)
    return [wave(2 * math.pi * turn) for turn in turns for wave in (math.sin, math.cos)]


def typed_cell(cell: str | None, kind: str | None) -> Any:
    """A cell of CSV as JSON has a value of its kind: null where it is empty; as it is where it is not of its kind."""
    if cell is None or not cell.strip() or (kind in NOT_TEXT and cell.strip().lower() in MISSING_CELLS):
        return None
    try:
        match kind:
            case "numeric":
                number = float(cell)
                return number if math.isfinite(number) else cell
            case "boolean":
                return {"true": True, "1": True, "false": False, "0": False}.get(cell.strip().lower(), cell)
            case "vector":
                return msgspec.json.decode(cell)
            case "timestamp":
                return int(cell) if re.fullmatch(r"-?\d+", cell) else cell
            case _:
                return cell
    except (ValueError, msgspec.DecodeError):
        return cell
