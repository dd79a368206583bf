"""The answer over HTTP is the model's own, to the last bit, whatever else is asked at the same time."""

import asyncio
from collections.abc import Iterator
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
from service.schemas import NARROWEST_INTERVAL, WIDEST_INTERVAL
from tests.service.conftest import running
from tests.service.store import answer_of, columns_of, in_process, instance, make_settings, write_snapshot
from trainer.calibration import LevelCalibration
from trainer.config import Settings
from trainer.predictive import Predictive
from trainer.schema import FLOAT32_MAX, Columns, FeatureSchema

MODELS: dict[str, dict[str, Any]] = {
    "mixture": {},
    "gaussian": {"head": "gaussian"},
    "classes": {"task": "classification"},
}
ASKED: dict[str, list[dict[str, Any]]] = {
    "regression": [
        {"balance": 0.0},
        {"balance": 1.0, "interval": 0.9},
        {"balance": 0.3, "interval": 0.5, "point": "mean"},
        {"balance": 0.5, "point": "mean"},
        {},
    ],
    "classification": [{"balance": 0.0}, {"balance": 1.0, "top": 2}, {"balance": 0.3, "top": 9}, {"top": 1}, {}],
}
LISTS = ("predictions", "lower", "upper", "probabilities")  # with a value for each row


@pytest.fixture(scope="module", params=MODELS)
def settings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A model of the usual width: kernels are chosen by size."""
    settings = make_settings(tmp_path_factory.mktemp("store"), hidden=(128, 128), **MODELS[request.param])
    write_snapshot(settings)
    return settings


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[httpx.Client]:
    with running(settings) as client:
        yield client


@pytest.fixture(scope="module")
def predictor(settings: Settings) -> Predictor:
    return in_process(settings, 1)


@pytest.fixture(scope="module")
def columns(settings: Settings) -> Columns:
    return columns_of(settings, 200)


def picked(columns: Columns, numbers: list[int]) -> Columns:
    return Columns(columns.numeric[numbers], columns.categorical[numbers])


def lists(answer: Predictive) -> dict[str, Any]:
    named = {"predictions": answer.point, "lower": answer.lower, "upper": answer.upper}
    return {name: column.tolist() for name, column in named.items() if column is not None}


def test_intervals_are_as_wide_as_what_came_has_shown_them_to_be(empty: Settings) -> None:
    surprised = LevelCalibration()
    surprised.observe(torch.tensor([0.01, 0.99]).repeat(1000))
    write_snapshot(empty)
    write_snapshot(empty, calibration=surprised)
    schema = FeatureSchema.of(empty)
    rows = [schema.decode_instance(msgspec.json.encode(instance(i))) for i in range(200)]
    narrow, wide = (lists(in_process(empty, version).predict(rows, 0.0, 0.9)) for version in (1, 2))
    assert narrow["predictions"] == wide["predictions"]
    assert all(low > lower for low, lower in zip(narrow["lower"], wide["lower"], strict=True))
    assert all(up < upper for up, upper in zip(narrow["upper"], wide["upper"], strict=True))
    alike = [lists(in_process(empty, version).predict(rows, 1.0, 0.9)) for version in (1, 2)]
    assert alike[0] == alike[1]


@pytest.mark.parametrize("number", range(5))
def test_http_equals_in_process_alone_and_in_a_batch(
    client: httpx.Client, settings: Settings, predictor: Predictor, columns: Columns, number: int
) -> None:
    asked = ASKED[settings.task][number]
    whole = client.post("/predict", json={"instances": [instance(i) for i in range(200)], **asked}).json()
    assert whole == answer_of(predictor, columns, asked)
    assert (whole["balance"], whole["model_version"]) == (asked.get("balance", 0.5), 1)
    told = "predictions" if settings.task == "regression" else "probabilities"
    assert len(set(map(str, whole[told]))) > 150  # the model tells rows apart
    for i in range(0, 200, 17):
        alone = client.post("/predict", json={"instances": [instance(i)], **asked}).json()
        assert alone == {name: [value[i]] if name in LISTS else value for name, value in whole.items()}


@pytest.mark.parametrize("settings", ["mixture", "gaussian"], indirect=True)
def test_points_and_intervals_are_those_of_the_model(predictor: Predictor, settings: Settings) -> None:
    schema = FeatureSchema.of(settings)
    rows = [schema.decode_instance(msgspec.json.encode(instance(i))) for i in range(200)]
    for asked in ASKED["regression"]:
        answer = predictor.predict(rows, **{"balance": 0.5, **asked})
        assert lists(answer).items() <= answer_of(predictor, columns_of(settings, 200), asked).items()


def test_concurrent_requests_do_not_touch_each_other(
    client: httpx.Client, settings: Settings, predictor: Predictor, columns: Columns
) -> None:
    """Hundreds at once, of all sizes and questions, so that passes join what differs."""

    async def ask_all() -> list[tuple[list[int], dict[str, Any], httpx.Response]]:
        async with httpx.AsyncClient(base_url=client.base_url, timeout=20) as many:

            async def ask(i: int) -> tuple[list[int], dict[str, Any], httpx.Response]:
                numbers = [(i * 7 + k) % 200 for k in range(1 if i % 3 else i % 90 + 1)]
                asked = ASKED[settings.task][i % 5]
                body = {"instances": [instance(n) for n in numbers], **asked}
                return numbers, asked, await many.post("/predict", json=body)

            return await asyncio.gather(*(ask(i) for i in range(200)))

    for numbers, asked, response in asyncio.run(ask_all()):
        assert response.status_code == 200
        assert response.json() == answer_of(predictor, picked(columns, numbers), asked)


NUMBERS = st.none() | st.integers(-1000, 1000) | st.floats(-FLOAT32_MAX, FLOAT32_MAX)
INSTANCES = st.fixed_dictionaries(
    {},
    optional={
        "dep_delay": NUMBERS,
        "weather": st.none() | st.fixed_dictionaries({}, optional={"wind": NUMBERS}),
        "carrier": st.none() | st.text() | st.integers() | st.floats(-1e9, 1e9) | st.booleans(),
        "cancelled": st.none() | st.booleans(),
        "time_hour": st.none() | st.datetimes().map(lambda time: time.isoformat()) | st.integers(0, 2**41),
        "sensors": st.none() | st.lists(st.floats(-FLOAT32_MAX, FLOAT32_MAX), min_size=3, max_size=3),
        "beside": st.text(),
    },
)
QUESTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "regression": {
        "interval": st.floats(NARROWEST_INTERVAL, WIDEST_INTERVAL),
        "point": st.sampled_from(["median", "mean"]),
    },
    "classification": {"top": st.integers(1, 9)},
}


@hypothesis_settings(max_examples=20, deadline=None)
@given(records=st.lists(INSTANCES, min_size=1, max_size=40), data=st.data())
def test_any_record_and_question_is_answered_as_in_process(
    client: httpx.Client, settings: Settings, predictor: Predictor, records: list[dict[str, Any]], data: st.DataObject
) -> None:
    """To the last bit, in a batch, alone and as a bare record."""
    asked = data.draw(st.fixed_dictionaries({}, optional={"balance": st.floats(0, 1), **QUESTIONS[settings.task]}))

    def said(body: dict[str, Any]) -> dict[str, Any]:
        response = client.post("/predict", content=msgspec.json.encode(body))
        told: dict[str, Any] = response.raise_for_status().json()
        return told

    schema = FeatureSchema.of(settings)
    some = [schema.decode_instance(msgspec.json.encode(record)) for record in records]
    columns = Columns(schema.numeric(some), schema.categorical(some))
    whole = said({"instances": records, **asked})
    assert whole == answer_of(predictor, columns, asked)
    alone = {name: value[:1] if name in LISTS else value for name, value in whole.items()}
    assert said({"instances": records[:1], **asked}) == alone
    assert said(records[0]) == answer_of(predictor, picked(columns, [0]), {})


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.integers(0, 199), st.integers(1, 130), st.integers(0, 4)),
        min_size=1,
        max_size=6,
    )
)
def test_an_answer_depends_on_nothing_else_in_the_pass(
    settings: Settings, predictor: Predictor, columns: Columns, parts: list[tuple[int, int, int]]
) -> None:
    numbers = [[(start + k) % 200 for k in range(count)] for start, count, _ in parts]
    options = [Asked(**{"balance": 0.5, **ASKED[settings.task][which]}) for _, _, which in parts]
    questions = [Question(picked(columns, own), asked) for own, asked in zip(numbers, options, strict=True)]
    together = predictor.answer(questions)
    assert together == [predictor.answer([question])[0] for question in questions]
    for own, asked, answer in zip(numbers, options, together, strict=True):
        alone = [predictor.answer([Question(picked(columns, [n]), asked)])[0].predictions[0] for n in own[:3]]
        assert list(answer.predictions[:3]) == alone


def test_a_bare_record_is_answered_like_one_instance(client: httpx.Client, settings: Settings) -> None:
    bare = client.post("/predict", json=instance(3))
    assert bare.status_code == 200
    assert bare.json() == client.post("/predict", json={"instances": [instance(3)]}).json()
    more = ["probabilities"] if settings.task == "classification" else []
    assert list(bare.json()) == ["predictions", "balance", "model_version", *more]


@pytest.mark.parametrize(
    ("change", "changes_the_answer"),
    [
        ({"dep_delay": None}, True),
        ({"carrier": "no such carrier"}, True),
        ({"extra": {"deeply": ["nested", 1]}}, False),
        ({"arr_delay": "the label, of a wrong type too"}, False),
    ],
    ids=str,
)
def test_incomplete_and_unknown_values_are_answered(
    client: httpx.Client, change: dict[str, Any], changes_the_answer: bool
) -> None:
    known = client.post("/predict", json=instance(0)).json()
    response = client.post("/predict", json={**instance(0), **change})
    assert response.status_code == 200
    assert (response.json() != known) == changes_the_answer


def test_a_missing_feature_is_a_null_one(client: httpx.Client) -> None:
    without = instance(0)
    without.pop("weather")
    null = {**instance(0), "weather": None}
    inner = {**instance(0), "weather": {"wind": None}}
    answers = [client.post("/predict", json=record).json() for record in (without, null, inner)]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("settings", ["mixture", "gaussian"], indirect=True)
def test_an_interval_holds_the_point(client: httpx.Client) -> None:
    for point in ("median", "mean"):
        body = {"instances": [instance(i) for i in range(50)], "interval": 0.8, "point": point, "balance": 1}
        answer = client.post("/predict", json=body).json()
        for low, middle, high in zip(answer["lower"], answer["predictions"], answer["upper"], strict=True):
            assert low <= middle <= high
            assert low < high
