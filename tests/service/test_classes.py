"""What is classes' own over HTTP: names, probabilities under any prior, metrics, more classes by a swap."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.service.conftest import running, until
from tests.service.store import columns_of, instance, learned, make_settings, outcome, write_learned
from tests.service.test_state import scrape
from trainer.class_model import build_class_model, load_classifier
from trainer.class_predictive import class_log_probabilities
from trainer.config import Settings
from trainer.schema import Columns, FeatureSchema
from trainer.snapshot import SnapshotStore


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    settings = make_settings(tmp_path_factory.mktemp("store"), task="classification", hidden=(128, 128))
    newest = [{"time_s": 1.0, "label": "late", "prediction": "on time"}]
    write_learned(settings, learned(settings, 640), newest=newest)
    return settings


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[httpx.Client]:
    with running(settings) as client:
        yield client


@pytest.fixture(scope="module")
def columns(settings: Settings) -> Columns:
    return columns_of(settings, 200)


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


@pytest.mark.parametrize(
    ("field", "value"), [("interval", 0.9), ("point", "mean"), ("top", 0), ("top", 1.5), ("top", "all")]
)
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
    settings = make_settings(tmp_path, task="classification")
    write_learned(settings, learned(settings, 320, without="late"))
    with running(settings) as client:
        before = client.post("/predict", json={"instances": [instance(1)]}).json()
        assert sorted(before["probabilities"][0]) == ["7", "early", "on time"]
        write_learned(settings, learned(settings, 320))
        until(lambda: client.get("/model").json()["version"] == 2)
        after = client.post("/predict", json={"instances": [instance(1)]}).json()
        assert sorted(after["probabilities"][0]) == ["7", "early", "late", "on time"]
        assert after != before
        assert client.post("/models/1/activate").status_code == 200
        until(lambda: client.get("/model").json()["version"] == 1)
        assert client.post("/predict", json={"instances": [instance(1)]}).json() == before
        assert client.post("/predict?version=2", json={"instances": [instance(1)]}).json() == after


def test_a_whole_number_may_be_written_as_a_fraction(client: httpx.Client) -> None:
    """As JSON Schema has it."""
    answers = [client.post("/predict", json={"instances": [instance(0)], "top": top}).json() for top in (2, 2.0)]
    assert answers[0] == answers[1]
    assert len(answers[0]["probabilities"][0]) == 2
