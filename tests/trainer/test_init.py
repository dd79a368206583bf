"""What `tailstream init` makes of tables: any table gives a configuration that loads and reads its own rows."""

import csv
import io
import json
import re
import tomllib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer import Typer
from typer.testing import CliRunner, Result

from trainer.batching import Batcher, Record
from trainer.cli_init import init
from trainer.config import FeatureSettings, SchemaSettings, Settings, load
from trainer.config_text import config_text, topic_name
from trainer.datasets import DATASETS, FLIGHTS_FEATURES, FLIGHTS_LABEL, records
from trainer.errors import ConfigError
from trainer.evaluation import run
from trainer.fields import MOST_ROWS, draw_sample
from trainer.files import Line, as_json, is_csv, read_lines, read_values
from trainer.process import choose_device
from trainer.proposal import Proposal, propose
from trainer.schema import FeatureSchema


def settings_of(proposal: Proposal) -> Settings:
    return Settings(**tomllib.loads(config_text(proposal, "data.csv", "It has read a table.")))


def schema_of(given: Settings) -> FeatureSchema:
    return FeatureSchema.of(given)


def look(table: Sequence[dict[str, Any]], label: str | None = "price") -> Proposal:
    return propose(draw_sample([Line(n, record, True) for n, record in enumerate(table, 1)], csv=False), label)


def used(proposal: Proposal) -> dict[str, str]:
    return {f.name: f.settings.kind for f in proposal.features if f.settings and not f.left_out}


def left_out(proposal: Proposal) -> dict[str, str]:
    return {f.name: f.left_out for f in proposal.features if f.left_out}


# Any table

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    | st.sampled_from(["2013-01-01", "2013-07-01T05:00:00Z", "12", "1,5", "yes", 1_372_680_000_000, 1_372_680_000])
)
names = st.sampled_from(["a", "b", "a.b", "id", "time", "größe", "x y", 'q"', "", "\n"]) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=4
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(st.integers(0, 9), max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=4,
)
tables = st.lists(
    st.tuples(st.dictionaries(names.filter(lambda name: name != "price"), values, max_size=5), st.floats(-9, 9)),
    min_size=2,
    max_size=30,
)


@given(tables)
@example([({"a": {}}, 1.0), ({"a": 5}, 2.0)])
@example([({"a": 1e300}, 1.0), ({"a": -5}, 2.0)])
@example([({"a": {"b": 1}, "a.b": 2}, 1.0), ({"a": None}, 2.0)])
@settings(max_examples=150, deadline=None)
def test_any_table_of_json_gives_a_configuration_that_reads_its_rows(table: list[tuple[dict[str, Any], float]]) -> None:
    rows = [{**record, "price": label, "size": number % 7} for number, (record, label) in enumerate(table)]
    try:
        proposal = look(rows)
    except ConfigError:
        assert len({label for _, label in table}) == 1 or len(rows) < 31
        return
    schema = schema_of(settings_of(proposal))
    for row in rows:
        assert schema.decode(as_json(row)).label == row["price"]


cells = st.sampled_from(["", " ", "NA", "1", "0", "-2.5", "1e3", "true", "No", "2013-01-01", "1372680000000", "nan"])


@given(
    st.lists(names.filter(lambda name: name != "price" and "\r" not in name), unique=True, min_size=1, max_size=4),
    st.lists(st.lists(cells | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=5), max_size=5)),
    st.sampled_from(",;\t"),
)
@settings(max_examples=150, deadline=None)
def test_any_table_of_csv_gives_a_configuration_that_reads_its_rows(
    tmp_path_factory: pytest.TempPathFactory, columns: list[str], rows: list[list[str]], delimiter: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(["price", "size", *columns])
    writer.writerows([[number, number % 7, *row] for number, row in enumerate([*rows, ["x"], ["y"]])])
    path.write_text(text.getvalue(), newline="")
    if "\n" in "".join(columns) or any(other in "".join(columns) for other in ",;\t|"):
        return  # which delimiter is meant is a guess there
    proposal = propose(draw_sample(read_lines(path), csv=is_csv(path)), "price")
    schema = schema_of(settings_of(proposal))
    assert [schema.decode(value).label for value in read_values(path, schema)] == list(range(len(rows) + 2))


@pytest.mark.parametrize("label", ["price", "kind"])
def test_every_setting_is_there_with_its_default_and_is_toml_once_it_is_no_comment(label: str) -> None:
    rows = [{"size": n % 7, "price": n % 5, "kind": f"k{n % 3}"} for n in range(40)]
    text = config_text(look(rows, label), "data.jsonl", "Seen.")
    chosen = Settings(**tomllib.loads(text))
    uncommented = re.sub(r"^# (?=\w+ = )", "", text, flags=re.M)
    assert Settings(**tomllib.loads(uncommented)) == chosen
    assert len(re.findall(r"^# (?=\w+ = )", text, flags=re.M)) > 40
    for line in text.splitlines():
        assert not line.startswith("# ") or line.isprintable()


# What is taken for what

TABLE = [
    {
        "orderId": f"A{number:05}",
        "items": number % 23,
        "express": number % 3 == 0,
        "courier": f"c{number % 7}",
        "placed_at": f"2024-03-{1 + number // 24:02}T{number % 24:02}:00:00Z",
        "sensors": [number % 5, 1.5, 0],
        "address": {"zip": 1000 + number % 9, "city": None if number % 4 else "Bonn"},
        "price": float((number * 7919) % 101) ** 2,
        "version": 3,
        "remark": f"left {number} boxes at the door of house {number}",
        "list": ["a"],
        "gone": None,
        "amounts": f"{number % 9},5",
    }
    for number in range(600)
]


def test_kinds_and_roles_are_found() -> None:
    proposal = look(TABLE)
    assert used(proposal) == {
        "items": "numeric",
        "express": "boolean",
        "courier": "categorical",
        "placed_at": "timestamp",
        "sensors": "vector",
        "address.zip": "categorical",
        "address.city": "categorical",
        "amounts": "categorical",
    }
    assert (proposal.task, proposal.label) == ("regression", "price")
    assert (proposal.id, proposal.time) == ("orderId", "placed_at")
    why = left_out(proposal)
    assert set(why) == {"orderId", "version", "remark", "list", "gone"}
    assert why["version"] == "it never changes"
    assert why["gone"] == "it is always missing"
    assert "prose" in why["remark"]
    assert settings_of(proposal).record_schema.features["sensors"] == FeatureSettings(kind="vector", size=3)


def test_comments_say_what_was_seen() -> None:
    text = config_text(look(TABLE), "orders.jsonl", "Seen.")
    assert re.search(r'^items = "numeric" +# 23 distinct values, 0 to 22$', text, flags=re.M)
    assert "# 7 distinct values: c0, c1, c2, ...\n" in text
    assert "# true in 33%\n" in text
    assert "# 1 distinct value: Bonn, 75% missing\n" in text
    assert "2024-03-01 00:00 to 2024-03-25 23:00; never falls" in text
    assert '# version = "numeric"' in text


def test_many_categories_get_buckets_enough() -> None:
    proposal = look([{"part": f"p{n % 900}", "price": n % 77} for n in range(4000)])
    assert settings_of(proposal).record_schema.features["part"] == FeatureSettings(kind="categorical", buckets=2048)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("cost", lambda n, price: price, "it is the label"),
        ("cost", lambda n, price: price**3, "gives the label away (correlation 1.000"),
        ("band", lambda n, price: f"band {price // 4:.0f}", "its categories explain 100.0%"),
        ("created_at", lambda n, price: 1_700_000_000 + n, "seconds since 1970"),
        ("delivered", lambda n, price: f"2024-01-01T{int(price) // 60:02}:{int(price) % 60:02}:00Z", "the label away"),
        ("session", lambda n, price: f"s{2 * n // 3}", "nearly each row has another value"),
        ("amount", lambda n, price: f"{n % 400},5", "seem to be numbers"),
        ("day", lambda n, price: f"{1 + n % 28}.{1 + n % 11}.2024", "seem to be dates"),
    ],
)
def test_what_would_mislead_is_left_out_and_said(name: str, value: Any, why: str) -> None:
    prices = [float((n * 7919) % 997) for n in range(1000)]
    rows = [{"size": n % 7, name: value(n, price), "price": price} for n, price in enumerate(prices)]
    assert why in left_out(look(rows))[name]


def test_a_time_after_the_event_that_gives_the_label_away_is_left_out() -> None:
    rows = [
        {
            "placed": 1_700_000_000_000 + 3_600_000 * n,
            "promised": 1_700_000_000_000 + 3_600_000 * (n + 30),
            "arrived": 1_700_000_000_000 + 3_600_000 * n + 60_000 * ((n * 7919) % 499),
            "minutes": (n * 7919) % 499,
        }
        for n in range(500)
    ]
    proposal = look(rows, "minutes")
    assert proposal.time == "placed"
    assert used(proposal) == {"placed": "timestamp", "promised": "timestamp"}
    assert "since placed" in left_out(proposal)["arrived"]
    assert any(note.startswith("promised: never before placed") for note in proposal.notes)


def test_numbers_that_add_up_to_the_label_are_said() -> None:
    rows = [{"net": (n * 7919) % 101, "tax": (n * 31) % 17, "size": n % 7} for n in range(500)]
    proposal = look([{**row, "price": row["net"] + row["tax"]} for row in rows])
    assert "net and tax add up to the label: are they known before it?" in proposal.notes


def test_a_correlation_is_a_warning_and_no_more() -> None:
    rows = [{"size": (n * 7919) % 101 + 20 * (n % 2), "price": (n * 7919) % 101} for n in range(500)]
    proposal = look(rows)
    assert used(proposal) == {"size": "numeric"}
    assert proposal.notes[0] == "size: close to the label; keep only what is known before it"


# The label


def test_a_label_of_text_or_truth_is_learned_as_classes() -> None:
    rows = [{**row, "courier name": f"Mr {row['courier']}"} for row in TABLE]
    for label in ("courier", "express"):
        proposal = look(rows, label)
        chosen = settings_of(proposal)
        assert (chosen.task, chosen.learner.loss) == ("classification", "logit_adjusted")
        schema = FeatureSchema.of(chosen)
        assert all(schema.decode(as_json(row)).label >= 0 for row in rows)
    assert "tell 100.0% of the classes" in left_out(look(rows, "courier"))["courier name"]
    assert not left_out(look(TABLE, "courier")).get("items")
    few = look([{"size": n % 7, "grade": n % 3} for n in range(99)], "grade")
    assert 'grade has 3 values: task = "classification" learns classes' in few.notes


@pytest.mark.parametrize(
    ("names", "found"), [(["a", "target"], "target"), (["x", "y"], "y"), (["kind", "size"], "size")]
)
def test_an_obvious_label_is_found(names: list[str], found: str) -> None:
    rows = [
        {name: f"k{n % 3}" if name == "kind" else (n * 31) % (7 + i) for i, name in enumerate(names)} for n in range(99)
    ]
    assert look(rows, None).label == found


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, r"Give --label NAME; it could be \(the most skewed first\)\n  (items|price): .*\n  (items|price): .*$"),
        ("prize", "there is no such field; did you mean price"),
        ("orderId", "its values are neither numbers nor a few classes"),
        ("amounts", "its values are text .* they seem to be numbers"),
        ("version", "all its values are the same"),
        ("gone", "no record has it"),
        ("list", "it cannot be learned"),
    ],
)
def test_a_label_that_is_not_clear_or_cannot_be_is_said(label: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        look(TABLE, label)


def test_nothing_to_learn_from_is_said() -> None:
    with pytest.raises(ConfigError, match=r"no field to learn 'price' from\n  note: it never changes"):
        look([{"price": n, "note": "a"} for n in range(50)])
    with pytest.raises(ConfigError, match="no records"):
        look([])


# The sample


def test_the_sample_is_the_first_rows_and_some_of_all_others_and_bounded() -> None:
    drawn = draw_sample((Line(n, {"n": n}, True) for n in range(5 * MOST_ROWS)), csv=False)
    numbers = [record["n"] for record in drawn.records]
    assert (drawn.rows, len(numbers)) == (5 * MOST_ROWS, MOST_ROWS)
    assert numbers[: MOST_ROWS // 2] == list(range(MOST_ROWS // 2))
    later = numbers[MOST_ROWS // 2 :]
    assert later == sorted(set(later))
    assert abs(sum(later) / len(later) - 2.75 * MOST_ROWS) < 0.05 * MOST_ROWS
    wide = draw_sample((Line(n, {f"f{i}": i for i in range(2000)}, True) for n in range(3000)), csv=False)
    assert len(wide.records) == 1000


def test_keys_that_are_data_are_refused() -> None:
    with pytest.raises(ConfigError, match="are keys of an object data"):
        look([{"counts": {f"user{n}-{i}": 1 for i in range(50)}, "price": n} for n in range(200)])


# Files and the command


def invoke(*arguments: object) -> Result:
    app = Typer()
    app.command()(init)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_a_file_once_and_says_what_to_look_at(tmp_path: Path) -> None:
    data, out = tmp_path / "my orders.jsonl", tmp_path / "out.toml"
    data.write_text("".join(json.dumps(record) + "\n" for record in TABLE))
    first = invoke(data, "--label", "price", "--out", out)
    assert first.exit_code == 0, first.output
    assert "price from 8 fields, by 600 rows of my orders.jsonl" in first.output
    assert "look at it: only 600 rows" in first.output
    assert load(out).kafka.topic == "my-orders"
    again = invoke(data, "--label", "price", "--out", out)
    assert again.exit_code == 2
    assert "is there already: --force replaces it" in again.output
    few = invoke(data, "--label", "price", "--out", out, "--force", "--rows", 100)
    assert (few.exit_code, "100 rows of" in few.output) == (0, True)
    shown = invoke(data, "--label", "price", "--out", "-")
    assert load(out).record_schema == Settings(**tomllib.loads(shown.output)).record_schema


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("torn.jsonl", b'{"a": 1}\n{"a": 2', "torn.jsonl, line 2 is not JSON"),
        ("list.json", b'[{"a": 1}]', "line 1 is not a JSON object, and each line is to be one; jq"),
        ("prices.txt", b"a,b\n1,2\n", "line 1 is not JSON: .*; a CSV file has a name that ends in .csv"),
        ("latin.csv", "a,b\n1,größe\n".encode("latin-1"), r"line 2 is not UTF-8 \(byte 0xf6\)"),
        ("latin.jsonl", '{"a": "größe"}\n'.encode("latin-1"), r"line 1 is not UTF-8"),
        ("twice.csv", b"a,a\n1,2\n", "line 1: two columns are called 'a'"),
        ("rows.parquet", b"PAR1\x15", "is a Parquet file: convert it"),
        ("rows.xlsx", b"PK\x03\x04\x15", "is a ZIP archive or a spreadsheet"),
        ("rows.jsonl", b"\x1f\x8b\x08", "is gzip: a name that ends in .gz"),
        ("empty.jsonl", b"", "there are no records in the file"),
        ("empty.csv", b"a,b\n", "there are no records in the file"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_line(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    done = invoke(path, "--out", tmp_path / "out.toml")
    assert done.exit_code == 2
    assert re.search(message, done.output), done.output
    assert not (tmp_path / "out.toml").exists()


def test_a_row_with_other_cells_than_the_header_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("price,size\n" + "".join(f"{n},{n % 7}\n" for n in range(50)) + "1,2,3\n")
    sample = draw_sample(read_lines(path), csv=True)
    assert any("line 52 has not as many cells" in note for note in propose(sample, "price").notes)


def test_a_topic_is_called_for_its_file() -> None:
    assert topic_name("My Orders (2).csv.gz") == "My-Orders-2"
    assert topic_name("-") == "records"


# Real data


@pytest.mark.parametrize(
    ("name", "label", "id_"), [("flights", FLIGHTS_LABEL, "flight_id"), ("diamonds", "price", "diamond_id")]
)
def test_what_is_found_in_a_real_table_does_about_as_well_as_what_was_written_by_hand(
    name: str, label: str, id_: str
) -> None:
    rows = list(islice(records(DATASETS[name]()), 5000))  # of flights all in January
    proposal = look(rows, label)
    assert (proposal.label, proposal.id) == (label, id_)
    by_hand = (
        FLIGHTS_FEATURES
        if name == "flights"
        else {
            **dict.fromkeys(("carat", "depth", "table", "x", "y", "z"), "numeric"),
            **dict.fromkeys(("cut", "color", "clarity"), "categorical"),
        }
    )
    found = used(proposal)
    assert set(by_hand) - set(found) <= {"month"}
    chosen = settings_of(proposal)
    schema = {"label": label, "features": by_hand}
    written = chosen.model_copy(update={"record_schema": SchemaSettings.model_validate(schema)})
    assert mae(chosen, rows) < 1.05 * mae(written, rows)


def mae(given: Settings, rows: Sequence[dict[str, Any]]) -> float:
    schema = schema_of(given)
    batcher = Batcher(schema, given.batch.size)
    batches = list(batcher.add(Record(0, n, 0.0, None, as_json(row)) for n, row in enumerate(rows)))
    assert not any(batch.rejected for batch in batches)
    error = run(given, schema, batches, [0.0], choose_device("cpu"), lambda rows: None).summary(0.0)["mae"]
    assert error is not None
    return error
