"""The compiled decoder takes what is plain, to the same last bit as msgspec, and leaves the rest alone."""

import json
import math
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from trainer import decoding
from trainer.config import SchemaSettings, TaskName
from trainer.decoding import distinct_texts
from trainer.errors import RecordError
from trainer.schema import FLOAT32_MAX, Columns, FeatureSchema, explain

FEATURES = {"x": "numeric", "on": "boolean", "carrier": "categorical", "größe": "numeric", "origin": "categorical"}
pytestmark = pytest.mark.skipif(not decoding.is_loaded(), reason="it is not compiled here")
MOST = 1000


def make_schema(features: dict[str, Any] = FEATURES) -> FeatureSchema:
    return FeatureSchema(SchemaSettings(label="y", features=features), 64)


def by_msgspec(schema: FeatureSchema, body: bytes) -> Columns:
    """What the other decoder makes of a body that is an array of records."""
    try:
        return schema.columns(msgspec.json.Decoder(list[schema.instance_type]).decode(body))  # type: ignore[name-defined]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise explain(error) from None


def same(one: Columns, other: Columns) -> bool:
    return all(a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


def between(bits: int) -> float:
    """Half-way between two neighbouring 32-bit floats, where an error in the 64th bit becomes one in the 32nd."""
    number = struct.unpack("f", struct.pack("I", bits))[0]
    following = float(np.nextafter(np.float32(number), np.float32(np.inf)))
    return (number + following) / 2 if math.isfinite(number) and math.isfinite(following) else 0.0


FLOATS = st.floats(-FLOAT32_MAX, FLOAT32_MAX) | st.integers(0, 2**32 - 1).map(between) | st.floats(-10, 10)
DECIMALS = st.builds("{}.{}".format, st.integers(-(10**9), 10**9), st.from_regex(r"[0-9]{1,18}", fullmatch=True))
POWERS = st.builds("{}{}{}".format, st.integers(-(10**17), 10**17), st.sampled_from("eE"), st.integers(-30, 25))
NUMBERS = FLOATS.map(repr) | st.integers(-(2**70), 2**70).map(str) | DECIMALS | POWERS
SPACE = st.sampled_from(["", " ", "\n\t\r "])
TEXTS = st.text(max_size=5).map(json.dumps) | st.text(max_size=5).map(lambda text: json.dumps(text, ensure_ascii=False))
SCALARS = st.sampled_from(["null", "true", "false", '"UA"', "[]", "{}", "-", "01", "1.", ".5", "+1", "NaN", "1e400"])
VALUES = {
    '"x"': NUMBERS | st.just("null"),
    '"größe"': NUMBERS,
    '"on"': st.sampled_from(["true", "false", "null"]),
    '"carrier"': TEXTS | NUMBERS | st.sampled_from(["null", "true", '"UA"']),
    '"origin"': TEXTS,
    '"beside"': TEXTS | NUMBERS,
}


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Arrays of records, nearly all of them right, with space anywhere."""
    space = draw(SPACE)
    records = []
    for _ in range(draw(st.integers(1, 4))):
        names = draw(st.permutations(list(VALUES)))[: draw(st.integers(0, len(VALUES)))]
        if names and draw(st.integers(0, 9)) == 0:
            names.append(names[0])  # the last one counts
        values = [draw(SCALARS if draw(st.integers(0, 29)) == 0 else VALUES[name]) for name in names]
        fields = f"{space},{space}".join(f"{n}{space}:{space}{v}" for n, v in zip(names, values, strict=True))
        records.append(f"{{{space}{fields}{space}}}")
    text = f"[{space}" + f"{space},{space}".join(records) + f"{space}]"
    return text.encode("utf-8", "surrogatepass")


@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bodies())
@example(b'[{"x": 9007199254740993}, {"x": 1.00000005960464477539062500001}, {"x": 7.0064923216240853e-46}]')
@example(b'[{"x": -0}, {"x": -0.0}, {"x": 0e5}, {"x": 3.4028235677973366e38}]')
def test_what_it_takes_is_what_msgspec_makes_of_it(body: bytes) -> None:
    schema = make_schema()
    found = schema.columns_within(b"before" + body + b" after", 6, MOST)
    try:
        expected = by_msgspec(schema, body)
    except RecordError:
        assert found is None
        return
    if found is not None:
        assert same(found[0], expected)
        assert found[1] == 6 + len(body)


def make_labelled_schema(task: TaskName, time: str | None) -> FeatureSchema:
    return FeatureSchema(SchemaSettings(label="y", features=FEATURES, time=time), 64, task)


LABELLED = {
    **VALUES,
    '"y"': NUMBERS | TEXTS | st.sampled_from(["null", "1", "1.0", '"1"', '"UA"']),
    '"t"': st.sampled_from(['"2026-03-01T12:00:00Z"', '"never"', "1767225600000", "null", "true"]) | NUMBERS,
}


@st.composite
def labelled_values(draw: st.DrawFn) -> bytes:
    """A record with a label and a time, or something that is nearly one."""
    space = draw(SPACE)
    names = draw(st.permutations(list(LABELLED)))[: draw(st.integers(len(LABELLED) - 2, len(LABELLED)))]
    names += draw(st.lists(st.sampled_from(list(LABELLED)), max_size=1))  # the last one counts
    values = [draw(SCALARS if draw(st.integers(0, 29)) == 0 else LABELLED[name]) for name in names]
    fields = f"{space},{space}".join(f"{n}{space}:{space}{v}" for n, v in zip(names, values, strict=True))
    before, after = (draw(st.sampled_from([*4 * [""], " ", "{}", ",", "["])) for _ in range(2))
    return f"{before}{{{space}{fields}{space}}}{after}".encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("task", ["regression", "classification"])
@pytest.mark.parametrize("time", [None, "t"])
@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=st.lists(labelled_values(), max_size=6))
@example(values=[b'{"y": 1', b', "x": 2}'])
@example(values=[b'{"y": 1}', b"", b'{"y": 2}{"y": 3}', b'{"y": 4, "carrier": "\xff"}'])
def test_labelled_values_are_what_each_is_by_itself(task: TaskName, time: str | None, values: list[bytes]) -> None:
    """Rows, labels (classes numbered in the order of the records), times and what is wrong, as `decode` has them."""
    judge, schema = make_labelled_schema(task, time), make_labelled_schema(task, time)
    rows, places, faults = [], [], {}
    for place, value in enumerate(values):
        try:
            rows.append(judge.decode(value))
        except RecordError as error:
            faults[place] = (error.reason, str(error))
        else:
            places.append(place)
    try:
        parsed = schema.parsed(values)
        labelled = schema.labelled(parsed)
    except RecordError:  # of a fault that is found late
        assert faults
        return
    assert {place: (error.reason, str(error)) for place, error in parsed.rejected.items()} == faults
    assert parsed.place.tolist() == places
    assert same(labelled.features, Columns(judge.numeric(rows), judge.categorical(rows)))
    assert labelled.label.tobytes() == np.array([row.label for row in rows], dtype=np.float64).tobytes()
    times = [math.nan if row.time_s is None else row.time_s for row in rows]
    np.testing.assert_array_equal(labelled.time_s, times)


def test_values_between_which_some_are_not_plain_are_read_by_both() -> None:
    schema = make_labelled_schema("regression", None)
    values = [b'{"y":1,"x":5}', b'{"y":2,"x":6,"more":{}}', b'{"y":3}', b"{", b'{"x":1}']
    assert schema._plain_labelled is not None
    assert schema._plain_labelled.decode_values(values).taken.tolist() == [True, False, True, False, True]
    parsed = schema.parsed(values)
    assert parsed.place.tolist() == [0, 1, 2]
    assert {place: error.reason for place, error in parsed.rejected.items()} == {3: "not_json", 4: "no_label"}
    assert schema.labelled(parsed).label.tolist() == [1, 2, 3]


@given(st.lists(st.text("abé", max_size=3), max_size=40))
def test_distinct_texts_are_each_looked_at_once(texts: list[str]) -> None:
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([len(text) for text in encoded], dtype=np.int32)
    starts = ends - np.array([len(text) for text in encoded], dtype=np.int32)
    other = np.zeros((len(texts), 2), dtype=np.int32)
    places = np.stack([other, np.stack([starts, ends], 1)], 1)
    found, which = distinct_texts(b"".join(encoded), places, 1)
    assert found == list(dict.fromkeys(encoded))
    assert [found[number] for number in which] == encoded


@pytest.mark.parametrize(
    "body",
    [
        b'[{"x":1.5,"on":true,"carrier":"UA","origin":null},{}]',
        '[ {"größe": -1.25e-7, "carrier": 12, "more": "yes", "origin": "M\\u00fcnchen \\" \\\\"} ]'.encode(),
        b'[{"x":0.1234567890123456789,"x":1234567890.1234567,"carrier":"\xc3\xbc"}]',
    ],
)
def test_what_is_plain_is_taken(body: bytes) -> None:
    schema = make_schema()
    found = schema.columns_within(body, 0, MOST)
    assert found is not None
    assert same(found[0], by_msgspec(schema, body))


@pytest.mark.parametrize(
    "record",
    [
        *(
            b"",
            b"1",
            b"null",
            b"[]",
            b"{",
            b'{"x"}',
            b'{"x":}',
            b'{"x":1,}',
            b'{,"x":1}',
            b'{"x":1 "on":true}',
            b"{x:1}",
        ),
        *(
            b'{"x":"1"}',
            b'{"x":true}',
            b'{"x":1e39}',
            b'{"x":00}',
            b'{"x":-01}',
            b'{"x":1e}',
            b'{"x":- 1}',
            b'{"x":0x1}',
        ),
        *(
            b'{"on":1}',
            b'{"on":"true"}',
            b'{"on":truefalse}',
            b'{"carrier":[]}',
            b'{"carrier":{}}',
            b'{"carrier":"\n"}',
        ),
        *(
            b'{"carrier":"\\x"}',
            b'{"carrier":"\xff"}',
            b'{"carrier":"',
            b'{"carrier":"\\',
            b'{"carrier":"\\"',
            b'{"x":1',
        ),
        *(b'{"more":"\xff"}', b'{"more":{"nested":1}}', b'{"\\u0078":1}', b'{"x":1.7976931348623157e309}'),
    ],
    ids=repr,
)
def test_what_is_not_plain_is_left(record: bytes) -> None:
    for body in (b"[%b]" % record, b'[{"x":1},%b]' % record, b"[%b" % record):
        assert make_schema().columns_within(body, 0, MOST) is None


def test_no_body_is_read_beyond_its_end() -> None:
    """Each body that is cut short is none, whatever follows it in memory."""
    whole = b'[{"x":12.5e-3,"on":false,"carrier":"U\\u0041","more":null},{"on":true}]'
    schema = make_schema()
    assert schema.columns_within(whole, 0, MOST) is not None
    for length in range(len(whole)):
        assert schema.columns_within(whole[:length], 0, MOST) is None


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_no_mutated_body_has_memory_read_or_written_that_is_not_its_own(tmp_path: Path) -> None:
    """A million of them, checked by the compiler's sanitizers."""
    program = tmp_path / "mutated_records"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover"]
    sources = [str(decoding.SOURCE), str(Path(__file__).with_name("mutated_records.c"))]
    subprocess.run(["cc", "-O1", "-g", "-std=gnu11", *sanitizers, *sources, "-o", str(program), "-lm"], check=True)
    run = subprocess.run([str(program), "1", "1000000"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert all(int(taken) > 10_000 for taken in run.stdout.split())  # arrays, and values


def test_longer_arrays_are_not_taken() -> None:
    schema = make_schema()
    assert schema.columns_within(b"[{},{},{}]", 0, 3) is not None
    assert schema.columns_within(b"[{},{},{}]", 0, 2) is None
    assert schema.columns_within(b"[]", 0, 3) is None


@pytest.mark.parametrize(
    "features",
    [
        {"a.b": "numeric"},
        {"t": "timestamp"},
        {"v": {"kind": "vector", "size": 2}},
    ],
)
def test_records_that_it_does_not_know_are_left(features: dict[str, Any]) -> None:
    assert make_schema(features).columns_within(b"[{}]", 0, MOST) is None
