"""The distribution over HTTP is the one that POST /predict answers from."""

import math

import httpx
import numpy as np
import pytest

from tests.service.conftest import running
from tests.service.store import instance
from trainer.config import Settings

DENSITY = "/predict/density"


@pytest.mark.parametrize("balance", [0.0, 0.35, 1.0])
def test_it_is_what_the_prediction_and_its_interval_are_read_from(client: httpx.Client, balance: float) -> None:
    for i in range(10):
        found = client.post(DENSITY, params={"balance": balance, "interval": 0.9}, json=instance(i)).json()
        asked = {"instances": [instance(i)], "balance": balance, "interval": 0.9}
        said = client.post("/predict", json=asked).json()
        assert found["prediction"] == said["predictions"][0]
        assert (found["lower"], found["upper"]) == (said["lower"][0], said["upper"][0])
        assert (found["balance"], found["model_version"]) == (balance, said["model_version"])
        edges, probabilities = np.array(found["edges"]), np.array(found["probabilities"])
        assert len(edges) == len(probabilities) + 1 <= 257
        assert (np.diff(edges) > 0).all()
        assert (probabilities >= 0).all()
        assert math.isclose(probabilities.sum(), 1, abs_tol=1e-5)
        # No label has calibrated the levels of this model, so its interval is the plain central one.
        levels = np.interp([found["lower"], found["prediction"], found["upper"]], edges, np.cumsum([0, *probabilities]))
        assert levels == pytest.approx([0.05, 0.5, 0.95], abs=1e-4)


def test_no_interval_and_the_default_balance_where_none_is_asked_for(client: httpx.Client, settings: Settings) -> None:
    found = client.post(DENSITY, json=instance(0)).json()
    assert found["balance"] == settings.service.default_balance
    assert not {"lower", "upper"} & set(found)


@pytest.mark.parametrize(
    ("content", "query", "status"),
    [
        (b"{", {}, 400),
        (b'{"dep_delay": "late"}', {}, 422),
        (b"{}", {"balance": "2"}, 422),
        (b"{}", {"interval": "1"}, 422),
        (b'{"carrier": "' + b"A" * 8388608 + b'"}', {}, 413),
    ],
)
def test_what_cannot_be_answered_is_a_problem(
    client: httpx.Client, content: bytes, query: dict[str, str], status: int
) -> None:
    response = client.post(DENSITY, params=query, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"


def test_another_type_than_json_is_refused(client: httpx.Client) -> None:
    response = client.post(DENSITY, content=b"{}", headers={"content-type": "text/plain"})
    assert response.status_code == 415


def test_without_a_model_there_is_none(empty: Settings) -> None:
    with running(empty) as client:
        assert client.post(DENSITY, json=instance(0)).status_code == 503
