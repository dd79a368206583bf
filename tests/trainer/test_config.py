from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from trainer.config import Settings, SigmaInLabelUnits, load
from trainer.errors import ConfigError

SMALLEST = """\
[kafka]
bootstrap_servers = ["broker:9092"]
topic = "prices"
[schema]
label = "price"
[schema.features]
size = "numeric"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tailstream.toml"
    path.write_text(SMALLEST)
    return path


def with_lines(table: str, lines: str) -> str:
    """The smallest configuration with lines added to one of its tables, which may be new."""
    head = f"[{table}]\n"
    return SMALLEST.replace(head, head + lines + "\n") if head in SMALLEST else f"{SMALLEST}{head}{lines}\n"


def refused(path: Path, text: str | None = None) -> str:
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    return str(caught.value)


def test_the_smallest_file_is_enough_and_the_rest_has_defaults(file: Path) -> None:
    settings = load(file)
    assert settings.kafka.bootstrap_servers == ["broker:9092"]
    assert settings.record_schema.features["size"].kind == "numeric"
    assert settings.learner.loss == "bmc"
    assert settings.kafka.dead_letters == "prices.dead-letters"


def test_the_dead_letter_topic_can_be_named(file: Path) -> None:
    file.write_text(with_lines("kafka", 'dead_letter_topic = "bad"'))
    assert load(file).kafka.dead_letters == "bad"


@pytest.mark.parametrize(
    ("variable", "value", "key", "expected"),
    [
        ("TAILSTREAM_SEED", "7", "seed", 7),
        ("tailstream_seed", "8", "seed", 8),
        ("TAILSTREAM_DEVICE", "cuda:1", "device", "cuda:1"),
        ("TAILSTREAM_KAFKA__TOPIC", "other", "kafka.topic", "other"),
        ("TAILSTREAM_KAFKA__TOPIC", "123", "kafka.topic", "123"),
        ("TAILSTREAM_KAFKA__BOOTSTRAP_SERVERS", "a:1, [::1]:2", "kafka.bootstrap_servers", ["a:1", "[::1]:2"]),
        ("TAILSTREAM_KAFKA__OPTIONS", '{"sasl_mechanism": "PLAIN"}', "kafka.options", {"sasl_mechanism": "PLAIN"}),
        ("TAILSTREAM_MODEL__HIDDEN", "64, 32", "model.hidden", [64, 32]),
        ("TAILSTREAM_MODEL__HIDDEN", "64", "model.hidden", [64]),
        ("TAILSTREAM_LEARNER__SIGMA", "0.3", "learner.sigma", 0.3),
        ("TAILSTREAM_LEARNER__SIGMA", "adaptive", "learner.sigma", "adaptive"),
        ("TAILSTREAM_LEARNER__SIGMA", '{"label_units": 8}', "learner.sigma", SigmaInLabelUnits(label_units=8)),
        ("TAILSTREAM_LEARNER__SIGMA__LABEL_UNITS", "8", "learner.sigma", SigmaInLabelUnits(label_units=8)),
        ("TAILSTREAM_SERVICE__MAX_MODEL_AGE_S", "3", "service.max_model_age_s", 3.0),
        ("TAILSTREAM_SERVICE__ALLOW_UNAUTHENTICATED", "true", "service.allow_unauthenticated", True),
        ("TAILSTREAM_SCHEMA__LABEL", "cost", "record_schema.label", "cost"),
        ("TAILSTREAM_SCHEMA__TIME", "when", "record_schema.time", "when"),
    ],
)
def test_the_environment_wins_over_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, key: str, expected: Any
) -> None:
    file.write_text("seed = 1\n" + with_lines("model", "hidden = [8]"))
    monkeypatch.setenv(variable, value)
    found: Any = load(file)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == expected


def test_the_environment_changes_one_key_of_a_table_and_leaves_the_others(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAILSTREAM_KAFKA__TOPIC", "other")
    monkeypatch.setenv("TAILSTREAM_SCHEMA__FEATURES__SIZE", "categorical")
    settings = load(file)
    assert (settings.kafka.topic, settings.kafka.bootstrap_servers) == ("other", ["broker:9092"])
    assert (settings.record_schema.features["size"].kind, settings.record_schema.label) == ("categorical", "price")


def test_a_table_in_the_environment_is_json(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILSTREAM_SCHEMA__FEATURES", '{"Weather.Wind": {"kind": "vector", "size": 3}}')
    features = load(file).record_schema.features
    assert features["Weather.Wind"].size == 3
    monkeypatch.setenv("TAILSTREAM_KAFKA__OPTIONS", "sasl_mechanism=PLAIN")
    assert '"kafka"' in refused(file)
    assert "JSON" in refused(file)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("sed = 1\n" + SMALLEST, "sed"),
        (with_lines("kafka", "topics = 1"), "kafka.topics"),
        (with_lines("schema", "labels = 1"), "schema.labels"),
        (with_lines("schema.features", 'age = {kind = "numeric", bucket = 3}'), "schema.features.age.bucket"),
        (with_lines("learner", "sigma = {label_unit = 8.0}"), "learner.sigma.SigmaInLabelUnits.label_unit"),
        (with_lines("trainers", "metrics_port = 1"), "trainers"),
    ],
)
def test_an_unknown_key_in_the_file_is_refused_by_its_dotted_name(file: Path, text: str, key: str) -> None:
    assert f"\n  {key}: unknown key" in refused(file, text)


@pytest.mark.parametrize(
    ("variable", "key"),
    [
        ("TAILSTREAM_SED", "sed"),
        ("TAILSTREAM_KAFKA__TOPICS", "kafka.topics"),
        ("TAILSTREAM_SCHEMA__LABELS", "schema.labels"),
        ("TAILSTREAM_KAFKA_TOPIC", "kafka_topic"),
        ("TAILSTREAM_TRAINERS__METRICS_PORT", "trainers.metrics_port"),
    ],
)
def test_an_unknown_key_in_the_environment_is_refused_by_its_dotted_name(
    file: Path, monkeypatch: pytest.MonkeyPatch, variable: str, key: str
) -> None:
    monkeypatch.setenv(variable, "1")
    assert f"\n  {key}: unknown key" in refused(file)


def test_all_that_is_wrong_is_said_at_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILSTREAM_SED", "1")
    message = refused(file, with_lines("batch", 'size = 0\nmax_wait_s = "soon"'))
    for part in (str(file), "sed: unknown key", "batch.size:", "batch.max_wait_s:"):
        assert part in message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (with_lines("schema.features", 'price = "numeric"'), ["schema", "'price'"]),
        (with_lines("schema.features", 'price = "number"'), ["schema.features.price.kind"]),
        (with_lines("schema.features", 'v = "vector"'), ["schema.features.v", "size"]),
        (with_lines("schema.features", 'v = {kind = "numeric", size = 2}'), ["schema.features.v", "size"]),
        (with_lines("schema.features", 'v = {kind = "numeric", buckets = 2}'), ["schema.features.v", "buckets"]),
        (with_lines("schema.features", 'v = {kind = "categorical", buckets = 1}'), ["schema.features.v.buckets"]),
        (SMALLEST.replace('size = "numeric"', ""), ["schema.features"]),
        (with_lines("schema", 'time = "price"'), ["schema", "time", "label"]),
        (with_lines("schema", 'time = "v"') + 'v = {kind = "vector", size = 2}', ["schema", "time", "vector"]),
        (SMALLEST.replace('label = "price"', 'label = ""'), ["schema.label"]),
        (SMALLEST.replace('label = "price"', ""), ["schema.label"]),
        (SMALLEST.replace('topic = "prices"', ""), ["kafka.topic"]),
        (SMALLEST.replace('["broker:9092"]', "[]"), ["kafka.bootstrap_servers"]),
        (SMALLEST.replace("broker:9092", "broker"), ["kafka.bootstrap_servers", "'broker'"]),
        (with_lines("kafka", 'start = "yesterday"'), ["kafka.start", "'yesterday'"]),
        (with_lines("kafka", 'on_lost_offsets = "ignore"'), ["kafka.on_lost_offsets"]),
        (with_lines("learner", "replay_rows = 255"), ["replay_rows is 255", "batch.size 256"]),
        (with_lines("learner", "lr = 0"), ["learner.lr"]),
        (with_lines("learner", "lr = inf"), ["learner.lr"]),
        (with_lines("learner", "sigma = nan"), ["learner.sigma"]),
        (with_lines("learner", "sigma = -1.0"), ["learner.sigma"]),
        (with_lines("learner", "weight_averaging = 1.0"), ["learner.weight_averaging"]),
        (with_lines("batch", "max_wait_s = inf"), ["batch.max_wait_s"]),
        (with_lines("model", 'body = "my module"'), ["model.body", "'my module'"]),
        (with_lines("model", "hidden = []"), ["model.hidden"]),
        (with_lines("model", "hidden = [0]"), ["model.hidden.0"]),
        (with_lines("store", 'url = "ftp://host/x"'), ["store.url", "'ftp://host/x'", "s3://"]),
        (with_lines("store", 'url = "s3://"'), ["store.url", "names no bucket"]),
        (with_lines("store", 'options = {region = "x"}'), ["store: options and cache are for an object store"]),
        (with_lines("trainer", "metrics_port = 65536"), ["trainer.metrics_port"]),
        (with_lines("service", "default_balance = 1.5"), ["service.default_balance"]),
        ('device = "tpu"\n' + SMALLEST, ["device"]),
        ('task = "ranking"\n' + SMALLEST, ["task"]),
        ("seed = -1\n" + SMALLEST, ["seed"]),
    ],
)
def test_what_cannot_work_is_refused_by_name(file: Path, text: str, named: list[str]) -> None:
    message = refused(file, text)
    assert str(file) in message
    for part in named:
        assert part in message


def test_a_file_that_is_absent_or_not_toml_is_said_so(tmp_path: Path) -> None:
    assert "no configuration file" in refused(tmp_path / "absent.toml")
    assert "TOML" in refused(tmp_path / "broken.toml", "[kafka")
    (tmp_path / "latin.toml").write_bytes(b"device = '\xe9'")
    assert "TOML" in refused(tmp_path / "latin.toml")
    assert "cannot be read" in refused(tmp_path)


@pytest.mark.parametrize("start", ["earliest", "latest", "2013-07-01", "2013-07-01T12:00:00+02:00"])
def test_a_first_start_is_at_an_end_or_a_time(file: Path, start: str) -> None:
    file.write_text(with_lines("kafka", f'start = "{start}"'))
    assert load(file).kafka.start == start


def test_a_store_is_a_path_or_a_file_url(file: Path) -> None:
    for url in ("/data/store", "file:///data/store"):
        file.write_text(with_lines("store", f'url = "{url}"'))
        assert load(file).store.path == Path("/data/store")


def test_nothing_can_be_changed_afterwards(file: Path) -> None:
    file.write_text(with_lines("learner", "sigma = {label_units = 8.0}"))
    settings = load(file)
    tables = [settings, *tables_of(settings)]
    assert len(tables) == 12
    for table in tables:
        for name in type(table).model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(table, name, getattr(table, name))


def tables_of(model: BaseModel) -> list[BaseModel]:
    inside = [value for value in vars(model).values() if isinstance(value, BaseModel)]
    for value in vars(model).values():
        if isinstance(value, dict):
            inside += [entry for entry in value.values() if isinstance(entry, BaseModel)]
    return [found for table in inside for found in (table, *tables_of(table))]


def test_every_setting_says_what_it_is_for() -> None:
    for name, info in Settings.model_fields.items():
        table = info.annotation
        if isinstance(table, type) and issubclass(table, BaseModel):
            assert table.__doc__
            missing = [key for key, field in table.model_fields.items() if not field.description]
            assert not missing, f"{name}: {missing}"
        else:
            assert info.description, name


def test_a_table_has_one_name(file: Path) -> None:
    assert "unknown key" in refused(file, SMALLEST.replace("[schema", "[record_schema"))
