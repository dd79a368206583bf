"""What the service says of itself: /model, /metrics, the OpenAPI document and the pages."""

import json
import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.app import create_app
from tests.service.conftest import running, until
from tests.service.store import METRICS, instance, make_settings, write_snapshot
from trainer.config import Settings
from trainer.errors import ConfigError

GAUGES = {
    "model_version": 1.0,
    "model_healthy": 1.0,
    "model_loss": 0.5,
    "model_noise_sigma": 0.25,
    "model_noise_sigma_label_units": 10.0,
    "model_samples": 320.0,
    "model_samples_per_second": 1234.5,
    "model_lag_records": 42.0,
    "predict_queue_length": 0.0,
}


def test_model_says_what_the_manifest_says(client: httpx.Client, settings: Settings) -> None:
    model = client.get("/model").json()
    assert (model["version"], model["step"], model["samples"]) == (1, 20, 320)
    assert model["partitions"] == {"0": {"next_offset": 330, "trained": 320, "rejected": 8, "skipped": 2}}
    assert model["schema"] == settings.record_schema.model_dump(mode="json")
    assert (model["noise_sigma"], model["noise_sigma_label_units"]) == (0.25, 10.0)
    assert model["metrics"] == METRICS
    assert model["newest"] == [{"time_s": 1.7e9, "label": 3.0, "prediction": 4.0}]
    assert model["healthy"] is True
    assert model["trouble"] is None
    assert model["age_s"] >= 0


def scrape(client: httpx.Client) -> dict[tuple[str, ...], float]:
    """Samples by name and sorted labels."""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = list(text_string_to_metric_families(response.text))
    assert all(family.documentation for family in families)
    assert all(family.name.startswith("tailstream_") for family in families)
    return {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_have_the_documented_names(settings: Settings) -> None:
    with running(settings) as client:
        client.post("/predict", json={"instances": [instance(0)] * 3})
        client.post("/predict", content=b"{")
        client.get("/no/such/path")
        samples = scrape(client)
    for name, value in GAUGES.items():
        assert samples[f"tailstream_{name}",] == value
    assert samples["tailstream_model_age_seconds",] >= 0
    assert samples["tailstream_predictions_total",] == 3
    for balance, mae in (("0", 10.0), ("1", 20.0)):
        of = f"balance={balance}"
        assert samples["tailstream_model_prequential_mae", of, "shots=all"] == mae
        assert samples["tailstream_model_prequential_mae", of, "shots=many"] == mae + 3
        assert samples["tailstream_model_prequential_mae", of, "shots=medium"] == mae + 4
        assert ("tailstream_model_prequential_mae", of, "shots=few") not in samples  # it had no rows
        assert samples["tailstream_model_prequential_balanced_mae", of] == mae + 2
    total = "tailstream_http_requests_total"
    assert samples[total, "handler=/predict", "method=POST", "status=200"] == 1
    assert samples[total, "handler=/predict", "method=POST", "status=400"] == 1
    assert samples[total, "handler=none", "method=GET", "status=404"] == 1
    assert samples["tailstream_http_request_duration_seconds_count", "handler=/predict", "method=POST"] == 2


def test_metrics_of_a_service_without_a_model(empty: Settings) -> None:
    with running(empty) as client:
        samples = scrape(client)
        of_models = [name for name, *_ in samples if name.startswith("tailstream_model_")]
        assert of_models == ["tailstream_model_pinned"]  # a pin can come before the model
        assert samples["tailstream_predictions_total",] == 0


def test_an_unhealthy_model_is_told_everywhere(empty: Settings) -> None:
    write_snapshot(empty, healthy=False, metrics={}, train_loss=None, lag_records=None)
    with running(empty) as client:
        assert client.get("/model").json()["healthy"] is False
        assert "unhealthy" in client.get("/model").json()["trouble"]
        assert scrape(client)["tailstream_model_healthy",] == 0
        write_snapshot(empty, healthy=True)
        until(lambda: scrape(client)["tailstream_model_healthy",] == 1)


def test_the_example_in_the_api_description_works_as_printed(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for example in schemas["PredictRequest"]["examples"] + schemas["Instance"]["examples"]:
        response = client.post("/predict", json=example)
        assert response.status_code == 200
        assert set(response.json()) <= set(schemas["PredictResponse"]["properties"])


def test_the_api_description_is_complete(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    versions = {"/models", "/models/latest/activate", "/models/{version}/activate"}
    assert set(document["paths"]) == {
        "/predict",
        "/predict/density",
        "/model",
        "/livez",
        "/readyz",
        "/healthz",
        "/metrics",
        *versions,
    }
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names) == 10
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document)):
        place = document
        for part in reference.split("/"):
            place = place[part]
    predict = document["paths"]["/predict"]["post"]
    assert set(predict["responses"]) == {"200", "400", "401", "404", "408", "409", "413", "415", "421", "422", "503"}
    for status, response in predict["responses"].items():
        assert list(response["content"]) == ["application/json" if status == "200" else "application/problem+json"]


@pytest.mark.parametrize("page", ["/", "/docs"])
def test_pages_load_nothing_from_elsewhere_and_run_nothing_inline(client: httpx.Client, page: str) -> None:
    html = client.get(page).text
    assert not re.search(r'(?:src|href)="(?:https?:)?//', html)
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", html)
    for path in re.findall(r'(?:src|href)="([^"#]+)"', html):
        response = client.get(f"/{path}")
        assert response.status_code == 200, path
        assert response.content


def test_a_service_needs_a_usable_configuration(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "store", api_keys_file=str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="api_keys_file"):
        create_app(settings)
