"""Classes over HTTP: labels and probabilities are the model's own, under any prior, and swap as others do."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from service.answers import Asked
from service.predictor import Predictor, Question
from tests.service.conftest import running, until
from tests.service.store import instance, make_settings, manifest
from tests.service.test_state import scrape
from trainer.batching import Batcher, Record
from trainer.class_model import build_class_model, load_classifier
from trainer.class_predictive import class_log_probabilities
from trainer.config import Settings
from trainer.learner import Learner
from trainer.schema import Columns, FeatureSchema
from trainer.snapshot import SnapshotStore

ASKED: list[dict[str, Any]] = [{"balance": 0.0}, {"balance": 1.0, "top": 2}, {"balance": 0.3, "top": 9}, {}]
ROWS = 32  # of a batch


def class_settings(store: Path, **service: Any) -> Settings:
    numbers = make_settings(store)
    schema = {**numbers.record_schema.model_dump(), "label": "outcome"}
    return Settings(
        task="classification",
        kafka=numbers.kafka.model_dump(),
        schema=schema,
        batch={"size": ROWS},
        model={"hidden": [128, 128], "embedding": 4, "category_buckets": 64},
        learner={"step_rows": ROWS, "replay_rows": 512},
        store={"url": str(store)},
        service={"port": 0, "poll_interval_s": 0.02, **service},
    )


def outcome(record: dict[str, Any]) -> str | int:
    delay = record.get("dep_delay") or 0
    return "early" if delay < 0 else 7 if record.get("carrier") == "DL" else "late" if delay > 55 else "on time"


def learned(settings: Settings, rows: int) -> Learner:
    schema = FeatureSchema.of(settings)
    learner = Learner(settings, schema, torch.device("cpu"))
    batcher = Batcher(schema, settings.batch.size)
    values = [msgspec.json.encode({**instance(i), "outcome": outcome(instance(i))}) for i in range(rows)]
    for batch in batcher.add(Record(0, i, 0.0, None, value) for i, value in enumerate(values)):
        learner.step(batch)
    return learner


def write(settings: Settings, rows: int = 640, **changes: Any) -> Learner:
    learner = learned(settings, rows)
    readings = learner.read()
    settings.store.path.mkdir(parents=True, exist_ok=True)
    known = {"task": "classification", "noise_sigma": None, "noise_sigma_label_units": None, "newest": []}
    told = manifest(settings, **{**known, "metrics": readings.metrics, **changes})
    SnapshotStore(settings.store.path).write(told, learner.inference_state(), {})
    return learner


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    settings = class_settings(tmp_path_factory.mktemp("store"))
    newest = [{"time_s": 1.0, "label": "late", "prediction": "on time"}]
    write(settings, newest=newest)
    return settings


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[httpx.Client]:
    with running(settings) as client:
        yield client


@pytest.fixture(scope="module")
def columns(settings: Settings) -> Columns:
    schema = FeatureSchema.of(settings)
    rows = [schema.decode_instance(msgspec.json.encode(instance(i))) for i in range(200)]
    return Columns(schema.numeric(rows), schema.categorical(rows))


def predictor_of(settings: Settings, version: int = 1) -> Predictor:
    return Predictor.from_snapshot(SnapshotStore(settings.store.path).load(version, training=False), settings)


def picked(columns: Columns, numbers: list[int]) -> Columns:
    return Columns(columns.numeric[numbers], columns.categorical[numbers])


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_http_equals_in_process_alone_and_in_a_batch(
    client: httpx.Client, settings: Settings, columns: Columns, asked: dict[str, Any]
) -> None:
    whole = client.post("/predict", json={"instances": [instance(i) for i in range(200)], **asked}).json()
    question = Question(columns, Asked(asked.get("balance", 0.5), top=asked.get("top")))
    assert whole == json.loads(msgspec.json.encode(predictor_of(settings).answer([question])[0]))
    assert whole["balance"] == asked.get("balance", 0.5)
    for i in range(0, 200, 17):
        alone = client.post("/predict", json={"instances": [instance(i)], **asked}).json()
        assert alone["predictions"] == [whole["predictions"][i]]
        assert alone["probabilities"] == [whole["probabilities"][i]]


@hypothesis_settings(max_examples=30, deadline=None)
@given(
    parts=st.lists(
        st.tuples(
            st.integers(0, 199), st.integers(1, 130), st.sampled_from([Asked(0.0), Asked(1.0, top=1), Asked(0.3)])
        ),
        min_size=1,
        max_size=5,
    )
)
def test_an_answer_depends_on_nothing_else_in_the_pass(
    settings: Settings, columns: Columns, parts: list[tuple[int, int, Asked]]
) -> None:
    predictor = predictor_of(settings)
    numbers = [[(start + k) % 200 for k in range(count)] for start, count, _ in parts]
    questions = [Question(picked(columns, own), asked) for own, (_, _, asked) in zip(numbers, parts, strict=True)]
    assert predictor.answer(questions) == [predictor.answer([question])[0] for question in questions]


def test_probabilities_are_bayes_rule_on_the_networks_logits(
    settings: Settings, columns: Columns, client: httpx.Client
) -> None:
    state = SnapshotStore(settings.store.path).load(1, training=False).model
    model = build_class_model(FeatureSchema.of(settings), settings.model)
    names, priors = load_classifier(state, model)
    logits = model.eval()(torch.from_numpy(columns.numeric), torch.from_numpy(columns.categorical)).values
    for balance in (0.0, 0.5, 1.0):
        own = class_log_probabilities(logits.detach(), priors, balance).exp()
        answer = client.post(
            "/predict", json={"instances": [instance(i) for i in range(200)], "balance": balance}
        ).json()
        for row, label, told in zip(own, answer["predictions"], answer["probabilities"], strict=True):
            assert told == pytest.approx(dict(zip(names, row.tolist(), strict=True)), abs=1e-5)
            assert math.fsum(told.values()) == pytest.approx(1, abs=1e-9)
            assert list(told.values()) == sorted(told.values(), reverse=True)
            assert label == next(iter(told))


def test_the_model_tells_classes_apart_and_names_them_by_their_text(client: httpx.Client) -> None:
    asked = {"instances": [instance(i) for i in range(200)], "balance": 0, "top": 1}
    found = client.post("/predict", json=asked).json()
    right = [label == str(outcome(instance(i))) for i, label in enumerate(found["predictions"])]
    assert sum(right) > 170
    assert set(found["predictions"]) == {"early", "7", "late", "on time"}
    assert all(len(told) == 1 for told in found["probabilities"])


def test_a_bare_record_is_answered_like_one_instance(client: httpx.Client) -> None:
    bare = client.post("/predict", json=instance(3)).json()
    assert bare == client.post("/predict", json={"instances": [instance(3)]}).json()
    assert list(bare) == ["predictions", "balance", "model_version", "probabilities"]


@pytest.mark.parametrize(("field", "value"), [("interval", 0.9), ("point", "mean"), ("top", 0), ("top", "all")])
def test_what_is_asked_of_numbers_is_refused(client: httpx.Client, field: str, value: Any) -> None:
    response = client.post("/predict", json={"instances": [instance(0)], field: value})
    assert response.status_code == 422
    assert field in response.text


def test_model_metrics_and_description_are_those_of_classes(client: httpx.Client) -> None:
    model = client.get("/model").json()
    assert (model["task"], model["noise_sigma"], model["newest"][0]["label"]) == ("classification", None, "late")
    samples = scrape(client)
    for name in ("accuracy", "macro_recall", "g_mean", "log_loss", "calibration_error"):
        for balance in ("0", "1"):
            shown = samples[f"tailstream_model_prequential_{name}", f"balance={balance}"]
            assert shown == model["metrics"]["fading"][balance][name]
    assert samples["tailstream_model_prequential_recall", "balance=0", "shots=many"] > 0.5
    assert ("tailstream_model_prequential_mae", "balance=0", "shots=all") not in samples
    assert client.get("/models").json()["models"][0]["accuracy"] == model["metrics"]["fading"]["0"]["accuracy"]
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for example in schemas["PredictRequest"]["examples"] + schemas["Instance"]["examples"]:
        response = client.post("/predict", json=example)
        assert response.status_code == 200
        assert set(response.json()) <= set(schemas["PredictClassesResponse"]["properties"])


def test_a_model_with_more_classes_is_swapped_in_and_rolled_back(tmp_path: Path) -> None:
    settings = class_settings(tmp_path)
    first = write(settings, rows=ROWS)
    with running(settings) as client:
        before = client.post("/predict", json={"instances": [instance(1)]}).json()
        second = write(settings, rows=640)
        assert len(second.task.names) >= len(first.task.names)
        until(lambda: client.get("/model").json()["version"] == 2)
        after = client.post("/predict", json={"instances": [instance(1)]}).json()
        assert sorted(after["probabilities"][0]) == sorted(second.task.names)
        assert after != before
        assert client.post("/models/1/activate").status_code == 200
        until(lambda: client.get("/model").json()["version"] == 1)
        assert client.post("/predict", json={"instances": [instance(1)]}).json() == before
        assert client.post("/predict?version=2", json={"instances": [instance(1)]}).json() == after
