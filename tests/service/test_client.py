"""A client that a generator makes from the API's description works: names, types, errors and keys are all in there."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from service.app import create_app
from tests.service.conftest import running
from tests.service.store import instance, make_settings, write_snapshot

Part = Callable[[str], ModuleType]


@pytest.fixture
def generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[httpx.Client], Part]:
    """Makes a client of a service; gives its modules by their names."""

    def make(client: httpx.Client) -> Part:
        name = f"client_{client.base_url.port}"
        (tmp_path / "config.yaml").write_text("post_hooks: []\n")  # which would only format what is made
        options = ["--meta", "none", "--output-path", str(tmp_path / name), "--config", str(tmp_path / "config.yaml")]
        command = [sys.executable, "-m", "openapi_python_client", "generate", "--fail-on-warning", *options]
        subprocess.run([*command, "--url", f"{client.base_url}/openapi.json"], check=True, timeout=100)
        monkeypatch.syspath_prepend(tmp_path)
        return lambda part: importlib.import_module(f"{name}.{part}")

    return make


def test_a_generated_client_asks_whatever_there_is(
    client: httpx.Client, generate: Callable[[httpx.Client], Part]
) -> None:
    part = generate(client)
    models = part("models")
    ours = part("client").Client(base_url=str(client.base_url), raise_on_unexpected_status=True)
    with ours:
        weather = models.InstanceWeather(wind=3.0)
        records = [models.Instance(dep_delay=4.5, carrier="UA", weather=weather), models.Instance(cancelled=True)]
        request = models.PredictRequest(instances=records, balance=0.3, interval=0.9)
        answer = part("api.predict.predict").sync(client=ours, body=request)
        same = {"instances": [{"dep_delay": 4.5, "carrier": "UA", "weather": {"wind": 3.0}}, {"cancelled": True}]}
        raw = client.post("/predict", json={**same, "balance": 0.3, "interval": 0.9}).json()
        assert answer.to_dict() == raw
        assert len(answer.lower) == len(answer.upper) == 2

        alone = part("api.predict.predict").sync(client=ours, body=records[0], version=1)
        density = part("api.predict.predict_density").sync(client=ours, body=records[0])
        assert alone.predictions == [density.prediction]
        assert len(density.edges) == len(density.probabilities) + 1

        too_few = models.PredictRequest(instances=[])
        refused = part("api.predict.predict").sync_detailed(client=ours, body=too_few)
        assert refused.status_code == 422
        assert refused.parsed.type_ == "urn:tailstream:problem:invalid-request"
        assert refused.parsed.errors[0].field == "instances"
        absent = part("api.predict.predict").sync(client=ours, body=records[0], version=77)
        assert absent.status == 404

        model = part("api.model.get_model").sync(client=ours)
        assert (model.version, model.partitions["0"].trained) == (1, 320)
        assert part("api.versions.list_models").sync(client=ours).models[0].version == 1
        assert part("api.versions.activate_model").sync(client=ours, version=1).pinned == 1
        assert part("api.versions.activate_latest_model").sync(client=ours).pinned is None
        assert part("api.health.get_readyz").sync(client=ours).model_version == 1
        assert "tailstream_predictions_total" in part("api.health.get_metrics").sync(client=ours)


def test_a_generated_client_of_classes_with_a_key(tmp_path: Path, generate: Callable[[httpx.Client], Part]) -> None:
    (tmp_path / "keys").write_text("alice:a-long-key-1\n")
    keys = {"api_keys_file": str(tmp_path / "keys"), "metrics_need_key": True}
    settings = make_settings(tmp_path / "store", task="classification", **keys)
    write_snapshot(settings)
    with running(settings) as client:
        part = generate(client)
        models, clients = part("models"), part("client")
        request = models.PredictRequest(instances=[models.Instance.from_dict(instance(0))], balance=1.0, top=2)
        keyed: dict[str, Any] = {"base_url": str(client.base_url), "raise_on_unexpected_status": True}
        with clients.AuthenticatedClient(**keyed, token="a-long-key-1") as ours:
            answer = part("api.predict.predict").sync(client=ours, body=request)
            assert list(answer.probabilities[0].to_dict()) == sorted(
                answer.probabilities[0].to_dict(), key=answer.probabilities[0].to_dict().get, reverse=True
            )
            assert answer.predictions[0] == next(iter(answer.probabilities[0].to_dict()))
            assert "tailstream_api_key_requests_total" in part("api.health.get_metrics").sync(client=ours)
        with clients.AuthenticatedClient(**keyed, token="wrong") as theirs:
            for refused in (
                part("api.predict.predict").sync(client=theirs, body=request),
                part("api.health.get_metrics").sync(client=theirs),
            ):
                assert (refused.status, refused.type_) == (401, "urn:tailstream:problem:unauthorized")


def test_names_of_objects_inside_a_record_say_where_they_are(tmp_path: Path) -> None:
    """Whatever the keys are: they name classes of a client, and two must not have one name."""
    settings = make_settings(tmp_path)
    features = {
        "a-b.x": "numeric",
        "a b.x": "numeric",
        "a.b.x": "numeric",
        "weather.wind": "numeric",
        "é1.x": "numeric",
    }
    schema = settings.record_schema.model_copy(
        update={"features": type(settings.record_schema)(label="y", features=features).features, "time": None}
    )
    settings = settings.model_copy(update={"record_schema": schema})
    schemas = create_app(settings).openapi()["components"]["schemas"]
    names = {name for name in schemas if name.startswith("Instance")}
    assert names == {
        "Instance",
        "InstanceAB",
        "InstanceAB2",
        "InstanceA",
        "InstanceAB3",
        "InstanceWeather",
        "InstanceE1",
    }
