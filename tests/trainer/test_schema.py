import json
import math
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import SchemaSettings
from trainer.errors import ConfigError, RecordError
from trainer.schema import FLOAT32_MAX, FeatureSchema, Row, category_text

FEATURES = {
    "size": "numeric",
    "weather.wind": "numeric",
    "weather.sky.cover": "categorical",
    "open": "boolean",
    "kind": "categorical",
    "class": "numeric",
    "air temp (°C)": "numeric",
    "2nd": {"kind": "categorical", "buckets": 4},
    "sensors": {"kind": "vector", "size": 3},
    "at": "timestamp",
}
WIDTH = 6 + 3 + 6 - 1  # size, wind, open, class, air temp; sensors; at
AT = 5 + 3  # first column of `at`


def schema_of(features: dict[str, Any], buckets: int = 64, **roles: str) -> FeatureSchema:
    return FeatureSchema(SchemaSettings(**{"label": "y", "features": features, **roles}), buckets)


SCHEMA = schema_of(FEATURES, id="meta.id", time="meta.time")


@pytest.fixture
def schema() -> FeatureSchema:
    return SCHEMA


def encode(record: Any) -> bytes:
    return json.dumps(record).encode()


def error_of(decode: Callable[[bytes], Row], value: Any) -> RecordError:
    with pytest.raises(RecordError) as caught:
        decode(value if isinstance(value, bytes) else encode(value))
    return caught.value


# What is right

numbers = st.floats(-1e38, 1e38) | st.integers(-(2**62), 2**62)
scalars = (
    st.text(st.characters(exclude_categories=["Cs"]))
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
)
moments = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30))


@st.composite
def records(draw: st.DrawFn) -> tuple[dict[str, Any], list[float], list[str | None]]:
    """A record that must decode, the numbers it must decode to (F values, NaN where missing), and its categories."""
    record: dict[str, Any] = {"y": draw(numbers)}
    numeric: list[float] = []
    categories: list[str | None] = []

    def put(path: str, value: Any) -> None:
        *parents, leaf = path.split(".")
        table = record
        for parent in parents:
            table = table.setdefault(parent, {})
        table[leaf] = value

    for name, kind in FEATURES.items():
        kind = kind if isinstance(kind, str) else kind["kind"]
        value, expected = draw(
            {
                "numeric": numbers.map(lambda n: (n, [float(n)])),
                "boolean": st.booleans().map(lambda b: (b, [float(b)])),
                "vector": st.lists(numbers, min_size=3, max_size=3).map(lambda v: (v, [float(n) for n in v])),
                "categorical": scalars.map(lambda c: (c, c)),
                "timestamp": moments.map(lambda t: (t.isoformat(), cycles(t))),
            }[kind]
        )
        state = draw(st.sampled_from(["given", "given", "given", "null", "absent"]))
        if kind == "categorical":
            categories.append(category_text(expected) if state == "given" else None)
        else:
            numeric += expected if state == "given" else [math.nan] * len(expected)
        if state != "absent":
            put(name, value if state == "given" else None)
    for name in draw(st.lists(st.sampled_from(["other", "Size", "meta", "f0", "weather "]), unique=True)):
        record[name] = draw(st.none() | st.dictionaries(st.sampled_from(["a", "f0"]), st.integers() | st.text()))
    return record, numeric, categories


def cycles(moment: datetime) -> list[float]:
    hour = moment.hour + moment.minute / 60 + moment.second / 3600
    day = (moment - datetime(moment.year, 1, 1)).days
    turns = [hour / 24, (moment.weekday() + hour / 24) / 7, (day + hour / 24) / 365.25]
    return [wave(2 * math.pi * turn) for turn in turns for wave in (math.sin, math.cos)]


@given(records())
@settings(max_examples=150, deadline=None)
def test_any_record_of_valid_fields_decodes_to_its_own_numbers(
    drawn: tuple[dict[str, Any], list[float], list[str | None]],
) -> None:
    record, numeric, categories = drawn
    schema = SCHEMA
    row = schema.decode(encode(record))
    assert row.label == float(record["y"])
    np.testing.assert_array_equal(schema.numeric([row]), np.array([numeric], dtype=np.float32))
    instances = [msgspec.json.decode(encode(other), type=schema.instance_type) for other in (record, {}, record)]
    columns = schema.columns(instances)
    rows = [schema.row(instance) for instance in instances]
    np.testing.assert_array_equal(columns.numeric, schema.numeric(rows))
    np.testing.assert_array_equal(columns.categorical, schema.categorical(rows))
    for bucket, size, text in zip(row.categorical, schema.buckets, categories, strict=True):
        assert (bucket == 0) == (text is None)
        assert 0 <= bucket < size
    unlabelled = schema.decode_instance(encode({name: value for name, value in record.items() if name != "y"}))
    assert math.isnan(unlabelled.label)
    assert unlabelled[1:2] == row[1:2]
    np.testing.assert_array_equal(schema.numeric([unlabelled]), schema.numeric([row]))


def test_columns_are_in_the_order_of_the_schema(schema: FeatureSchema) -> None:
    assert len(schema.numeric_columns) == WIDTH
    assert schema.numeric_columns[:6] == ("size", "weather.wind", "open", "class", "air temp (°C)", "sensors[0]")
    assert schema.numeric_columns[AT] == "at.hour_sin"
    assert schema.categorical_columns == ("weather.sky.cover", "kind", "2nd")
    assert schema.buckets == (64, 64, 4)
    assert schema.numeric_width == 2 * WIDTH


def test_arrays_have_a_row_a_record_and_their_types_even_without_rows_or_columns(schema: FeatureSchema) -> None:
    rows = [schema.decode(encode({"y": n, "size": n})) for n in range(3)]
    assert (schema.numeric(rows).shape, schema.numeric(rows).dtype) == ((3, WIDTH), np.float32)
    assert (schema.categorical(rows).shape, schema.categorical(rows).dtype) == ((3, 3), np.int64)
    assert schema.numeric([]).shape == (0, WIDTH)
    assert schema.categorical([]).shape == (0, 3)
    words = schema_of({"kind": "categorical"})
    assert words.numeric([words.decode(b'{"y": 1}')]).shape == (1, 0)
    numbers = schema_of({"size": "numeric"})
    assert numbers.categorical([numbers.decode(b'{"y": 1}')]).shape == (1, 0)


@pytest.mark.parametrize("record", [{}, {"weather": None}, {"weather": {"sky": None}}, {"weather": {}}])
def test_a_missing_field_or_parent_is_a_missing_value(schema: FeatureSchema, record: dict[str, Any]) -> None:
    row = schema.decode(encode({"y": 1, **record}))
    assert np.isnan(schema.numeric([row])).all()
    assert row.categorical == (0, 0, 0)


def test_what_is_beside_a_null_parent_is_still_read(schema: FeatureSchema) -> None:
    row = schema.decode(encode({"y": 1, "weather": {"wind": 3.5, "sky": None}, "kind": "a"}))
    assert row.numeric[1] == 3.5
    assert (row.categorical[0], row.categorical[1] > 0) == (0, True)


def test_a_nested_label_is_found_and_one_under_a_null_parent_is_missing() -> None:
    nested = schema_of({"size": "numeric"}, label="out.y")
    assert nested.decode(b'{"out": {"y": 2}}').label == 2
    for value in (b'{"out": null}', b'{"out": {}}', b'{"size": 1}'):
        assert (error_of(nested.decode, value).reason, error_of(nested.decode, value).field) == ("no_label", "out.y")


@pytest.mark.parametrize(
    "same",
    [["1", "1.0", '"1"', "1e0", "10e-1"], ["0", "-0.0", '"0"'], ["true", '"true"'], ["1.5", '"1.5"', "15e-1"]],
)
def test_numbers_and_texts_that_read_alike_are_one_category(schema: FeatureSchema, same: list[str]) -> None:
    buckets = {schema.decode(f'{{"y": 1, "kind": {text}}}'.encode()).categorical[1] for text in same}
    assert len(buckets) == 1


def test_categories_are_spread_over_all_buckets_but_the_missing_ones(schema: FeatureSchema) -> None:
    found = {schema.decode(encode({"y": 1, "kind": n})).categorical[1] for n in range(2000)}
    assert found == set(range(1, 64))


def test_the_hash_is_the_one_that_old_snapshots_were_trained_with() -> None:
    schema = schema_of({"kind": "categorical", "carrier": "categorical"}, buckets=1024)
    assert schema.decode(encode({"y": 1, "kind": "gold", "carrier": "gold"})).categorical == (45, 149)
    assert schema.decode(encode({"y": 1, "kind": "é", "carrier": 7})).categorical == (290, 525)


def test_a_category_keeps_its_bucket_when_more_were_seen_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.schema.CATEGORY_CACHE", 4)
    schema = schema_of({"kind": "categorical"})
    first = [schema.decode(encode({"y": 1, "kind": n})).categorical for n in range(20)]
    assert [schema.decode(encode({"y": 1, "kind": str(n)})).categorical for n in range(20)] == first


@given(moments, st.integers(-14 * 60, 14 * 60))
@settings(max_examples=60, deadline=None)
def test_one_moment_has_one_encoding_however_it_is_written(moment: datetime, offset_min: int) -> None:
    schema = schema_of({"at": "timestamp"})
    utc = moment.replace(microsecond=0, tzinfo=UTC)
    elsewhere = utc + timedelta(minutes=offset_min)
    written = [
        utc.isoformat(),
        utc.isoformat().replace("+00:00", "Z"),
        utc.replace(tzinfo=None).isoformat(),
        f"{elsewhere.replace(tzinfo=None).isoformat()}{'-' if offset_min < 0 else '+'}"
        f"{abs(offset_min) // 60:02}:{abs(offset_min) % 60:02}",
        round(utc.timestamp()) * 1000,
        float(round(utc.timestamp()) * 1000),
    ]
    rows = {schema.decode(encode({"y": 1, "at": at})).numeric for at in written}
    assert len(rows) == 1
    np.testing.assert_allclose(rows.pop(), cycles(utc.replace(tzinfo=None)), atol=1e-12)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("2013-03-05T23:59:59", "2013-03-06T00:00:00"),  # midnight
        ("2013-03-10T23:59:59", "2013-03-11T00:00:00"),  # the week's end
        ("2013-12-31T23:59:59", "2014-01-01T00:00:00"),  # the year's end
        ("2012-12-31T23:59:59", "2013-01-01T00:00:00"),  # a leap year's
    ],
)
def test_time_goes_round_without_a_jump(before: str, after: str) -> None:
    schema = schema_of({"at": "timestamp"})
    left, right = (np.array(schema.decode(encode({"y": 1, "at": at})).numeric) for at in (before, after))
    hour, weekday, yearday = np.split(right - left, 3)
    assert np.abs(hour).max() < 1e-4
    assert np.abs(weekday).max() < 1e-4
    assert np.abs(yearday).max() < 2 * math.pi / 365  # a year is not a whole number of days


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        (None, None),
        (1_500, 1.5),
        ("1970-01-01T00:00:02Z", 2.0),
        ("1970-01-01T01:00:02+01:00", 2.0),
        ("1970-01-01 00:00:02", 2.0),
        ("soon", None),
        (True, None),
        (1e300, None),
        ("9999-12-31T23:59:59-12:00", 253_402_300_800.0),  # UTC has no year 10000: its last moment
        ("0001-01-01T00:04:00+03:03", -62_135_596_800.0),  # nor one before 1: its first
        ("10000-01-01T00:00:00Z", None),
    ],
)
def test_the_event_time_is_read_where_there_is_one(schema: FeatureSchema, time: Any, seconds: float | None) -> None:
    assert schema.decode(encode({"y": 1, "meta": {"time": time}})).time_s == seconds
    assert schema.decode(b'{"y": 1, "meta": null}').time_s is None


def test_the_id_is_text(schema: FeatureSchema) -> None:
    for identity, text in [("a", "a"), (7, "7"), (7.0, "7"), (True, "true"), (None, None), ([1], None), ({}, None)]:
        assert schema.identity({"meta": {"id": identity}}) == text
    assert schema.identity({"meta": 3}) is None
    assert schema_of({"size": "numeric"}).identity({"": 1, "id": 1}) is None


@pytest.mark.parametrize("label", [7, "seven", None, [], {}, True, 10**400, 1e39])
def test_an_instance_is_read_the_same_whatever_its_label(schema: FeatureSchema, label: Any) -> None:
    row = schema.decode_instance(encode({"size": 2, "y": label}))
    assert row.numeric[0] == 2
    assert math.isnan(row.label)


# What is wrong


@pytest.mark.parametrize(
    ("value", "reason", "field"),
    [
        (b"", "not_json", ""),
        (b"{", "not_json", ""),
        (b'{"y": 1} {"y": 2}', "not_json", ""),
        (b'{"y": NaN}', "not_json", ""),
        (b"\xff\xfe", "not_json", ""),
        (b'{"y": 1, "kind": "\xff"}', "not_json", ""),
        (b'{"y": 1, "kind": "\\ud800"}', "not_json", ""),
        (b'{"y": 1, "other": ' + b"[" * 100_000, "not_json", ""),
        (b"null", "wrong_type", ""),
        (b"3", "wrong_type", ""),
        (b'[{"y": 1}]', "wrong_type", ""),
        (b"{}", "no_label", "y"),
        ({"y": None}, "no_label", "y"),
        ({"y": "1"}, "wrong_type", "y"),
        ({"y": True}, "wrong_type", "y"),
        (b'{"y": 1e400}', "not_finite", "y"),
        ({"y": 1e39}, "not_finite", "y"),
        ({"y": -1e39}, "not_finite", "y"),
        ({"y": 1, "size": "3"}, "wrong_type", "size"),
        ({"y": 1, "size": False}, "wrong_type", "size"),
        ({"y": 1, "size": 10**400}, "not_finite", "size"),
        ({"y": 1, "size": 1e39}, "not_finite", "size"),
        ({"y": 1, "air temp (°C)": []}, "wrong_type", "air temp (°C)"),
        ({"y": 1, "class": {}}, "wrong_type", "class"),
        ({"y": 1, "weather": 3}, "wrong_type", "weather"),
        ({"y": 1, "weather": {"wind": "strong"}}, "wrong_type", "weather.wind"),
        ({"y": 1, "weather": {"sky": {"cover": []}}}, "wrong_type", "weather.sky.cover"),
        ({"y": 1, "open": 1}, "wrong_type", "open"),
        ({"y": 1, "2nd": {"a": 1}}, "wrong_type", "2nd"),
        ({"y": 1, "sensors": [1, 2]}, "wrong_type", "sensors"),
        ({"y": 1, "sensors": [1, 2, 3, 4]}, "wrong_type", "sensors"),
        ({"y": 1, "sensors": [1, None, 3]}, "wrong_type", "sensors[1]"),
        ({"y": 1, "sensors": [1, 2, 1e39]}, "not_finite", "sensors[2]"),
        ({"y": 1, "at": "noon"}, "wrong_type", "at"),
        ({"y": 1, "at": 1e300}, "wrong_type", "at"),
        ({"y": 1, "at": "10000-01-01T00:00:00Z"}, "wrong_type", "at"),
        ({"y": 1, "at": "0000-12-31T00:00:00Z"}, "wrong_type", "at"),
    ],
)
def test_what_cannot_be_learned_from_is_rejected_with_its_reason_and_field(
    schema: FeatureSchema, value: Any, reason: str, field: str
) -> None:
    error = error_of(schema.decode, value)
    assert error.reason == reason
    assert error.field == field
    assert field in str(error)
    if reason != "no_label" and field != "y":
        assert error_of(schema.decode_instance, value).reason == reason


def test_the_largest_numbers_of_a_float32_are_still_numbers(schema: FeatureSchema) -> None:
    row = schema.decode(encode({"y": FLOAT32_MAX, "size": -FLOAT32_MAX, "sensors": [FLOAT32_MAX, 0, 1e-300]}))
    assert np.isfinite(schema.numeric([row])[0, [0, 5, 6, 7]]).all()


def test_nothing_but_a_record_error_comes_of_random_bytes_and_mutated_records(schema: FeatureSchema) -> None:
    generator = random.Random(0)
    whole = encode(
        {
            "y": 1.5,
            "size": 3,
            "weather": {"wind": 2.5, "sky": {"cover": "broken"}},
            "open": True,
            "kind": "é\n",
            "air temp (°C)": -1e3,
            "sensors": [1, 2.5, -3],
            "at": "2013-07-01T12:30:00+02:00",
            "meta": {"id": 7, "time": 1_372_000_000_000},
        }
    )
    pieces = [b"null", b"[", b"}", b'"', b"1e999", b"-", b"\\ud800", b"\xff", b"9999-12-31T23:59:59-12:00", b"true"]
    good, reasons = 0, []
    for turn in range(2000):
        if turn % 4 == 0:
            value = generator.randbytes(generator.randrange(80))
        else:
            mutated = bytearray(whole)
            for _ in range(generator.randrange(1, 4)):
                at = generator.randrange(len(mutated))
                match generator.randrange(4):
                    case 0:
                        mutated[at] = generator.randrange(256)
                    case 1:
                        del mutated[at : at + generator.randrange(1, 9)]
                    case 2:
                        mutated[at:at] = generator.choice(pieces)
                    case _:
                        mutated[at] = generator.choice(b'0123456789.e-"[]{},: ')
            value = bytes(mutated)
        for decode in (schema.decode, schema.decode_instance):
            try:
                row = decode(value)
            except RecordError as error:
                reasons.append(error.reason)
            else:
                good += 1
                assert not np.isinf(schema.numeric([row])).any()
    assert good > 200
    assert set(reasons) == {"not_json", "wrong_type", "not_finite", "no_label"}


@pytest.mark.parametrize(
    ("features", "roles"),
    [
        ({"a": "numeric", "a.b": "numeric"}, {}),
        ({"a.b": "numeric", "a": "numeric"}, {}),
        ({"y.b": "numeric"}, {}),
        ({"a": "numeric"}, {"label": "a.b"}),
        ({"a": "numeric"}, {"time": "a.b"}),
    ],
)
def test_a_field_inside_a_field_is_refused(features: dict[str, str], roles: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="schema"):
        schema_of(features, **roles)


# CSV


def test_csv_cells_become_what_their_columns_are(schema: FeatureSchema) -> None:
    cells = {
        "y": "-1.5",
        "size": " 3 ",
        "weather.wind": "2e1",
        "weather.sky.cover": "7",
        "open": "TRUE",
        "kind": "1.0",
        "sensors": "[1, 2, 3.5]",
        "at": "1372680000000",
        "meta.id": "007",
        "meta.time": "2500",
        "other": "5",
    }
    record = schema.from_csv(cells)
    assert record == {
        "y": -1.5,
        "size": 3.0,
        "weather": {"wind": 20.0, "sky": {"cover": "7"}},
        "open": True,
        "kind": "1.0",
        "sensors": [1, 2, 3.5],
        "at": 1372680000000,
        "meta": {"id": "007", "time": 2500},
        "other": "5",
    }
    row = schema.decode(encode(record))
    assert (row.label, row.time_s) == (-1.5, 2.5)
    assert schema.identity(record) == "007"


@pytest.mark.parametrize("cell", [" ", "NA", "N/A", " NaN", "null", "None"])
def test_a_cell_that_says_there_is_none_is_null_but_for_a_category(schema: FeatureSchema, cell: str) -> None:
    assert schema.from_csv({"size": cell, "open": cell, "at": cell}) == dict.fromkeys(("size", "open", "at"))
    assert schema.from_csv({"kind": cell, "other": cell}) == dict.fromkeys(
        ("kind", "other"), cell if cell.strip() else None
    )


def test_empty_cells_are_null_and_short_lines_have_them(schema: FeatureSchema) -> None:
    assert schema.from_csv({"size": "", "kind": "", "at": None, "other": ""}) == dict.fromkeys(
        ("size", "kind", "at", "other")
    )


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("size", "big"),
        ("size", "inf"),
        ("size", "1e400"),
        ("open", "perhaps"),
        ("sensors", "[1,"),
        ("at", "noon"),
    ],
)
def test_a_cell_that_is_not_of_its_kind_stays_text_and_the_record_is_rejected(
    schema: FeatureSchema, column: str, cell: str
) -> None:
    record = schema.from_csv({"y": "1", column: cell})
    assert record[column] == cell
    assert error_of(schema.decode, record).field == column


def test_a_column_with_the_name_of_an_object_gives_way_to_the_columns_inside(schema: FeatureSchema) -> None:
    for order in (("weather", "weather.wind"), ("weather.wind", "weather")):
        assert schema.from_csv(dict.fromkeys(order, "3")) == {"weather": {"wind": 3.0}}
