"""Other libraries of online learning on the same streams: River and Vowpal Wabbit, which the extra `rivals` installs.

Both get what the learner gets: rows in order, each batch of 256 predicted before any of its labels is learned from.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BATCH_ROWS = 256
Record = Mapping[str, Any]


class Regressor(NamedTuple):
    """What a library is to do with one record."""

    predict: Callable[[Record], float]
    learn: Callable[[Record, float], Any]


def river_linear(features: Mapping[str, str], seed: int) -> Regressor:
    """Linear regression by stochastic gradient descent: numbers standardised, categories one-hot."""
    from river import linear_model, preprocessing

    scaler = preprocessing.StandardScaler()
    # By itself it diverges where a number lies many standard deviations out.
    model = preprocessing.TargetStandardScaler(linear_model.LinearRegression(clip_gradient=1.0))

    def encoded(record: Record) -> dict[str, float]:
        numbers, words = _parted(record, features)
        return {**scaler.transform_one(numbers), **{f"{name}={word}": 1.0 for name, word in words.items()}}

    def learn(record: Record, label: float) -> None:
        scaler.learn_one(_parted(record, features)[0])
        model.learn_one(encoded(record), label)

    return Regressor(lambda record: model.predict_one(encoded(record)), learn)


def river_forest(features: Mapping[str, str], seed: int) -> Regressor:
    """An adaptive random forest of ten trees; its leaves answer with means, as linear models take no categories."""
    from river import forest

    model = forest.ARFRegressor(seed=seed, leaf_prediction="mean")

    def fields(record: Record) -> dict[str, Any]:
        numbers, words = _parted(record, features)
        return {**numbers, **words}

    return Regressor(
        lambda record: model.predict_one(fields(record)), lambda record, label: model.learn_one(fields(record), label)
    )


def vowpal_wabbit(features: Mapping[str, str], seed: int, loss: str) -> Regressor:
    """A linear model with all pairs of features, by adaptive, normalised steps; label standardised."""
    from vowpalwabbit import Workspace

    workspace = Workspace(f"-q :: -b 22 --loss_function {loss} --quiet")

    def line(record: Record) -> str:
        numbers, words = _parted(record, features)
        parts = [f"{name}:{value!r}" for name, value in numbers.items()]
        parts += [f"{name}={word}".translate(_RESERVED) for name, word in words.items()]
        return f"|f {' '.join(parts)}"

    # By itself it takes very long to reach labels in the thousands.
    count, mean, squares = 0, 0.0, 0.0

    def sd() -> float:
        return float(np.sqrt(squares / max(count, 1))) or 1.0

    def learn(record: Record, label: float) -> None:
        nonlocal count, mean, squares
        count += 1
        shift = label - mean
        mean += shift / count
        squares += shift * (label - mean)
        workspace.learn(f"{(label - mean) / sd()!r} {line(record)}")

    return Regressor(lambda record: mean + sd() * workspace.predict(line(record)), learn)


_RESERVED = str.maketrans({" ": "_", ":": "_", "|": "_"})

LIBRARIES: Mapping[str, Callable[[Mapping[str, str], int], Regressor]] = {
    "River, linear": river_linear,
    "Vowpal Wabbit, squared": lambda features, seed: vowpal_wabbit(features, seed, "squared"),
    "Vowpal Wabbit, absolute": lambda features, seed: vowpal_wabbit(features, seed, "quantile"),
}
SLOW_LIBRARIES = {"River, forest": river_forest}


def predictions(
    regressor: Regressor, records: Iterable[Record], label: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Labels (N,), predictions (N,), and rows a second; the first batch, of which nothing is known, is left out."""
    truth: list[float] = []
    found: list[float] = []
    rows, began = 0, time.perf_counter()
    stream = iter(records)
    while batch := list(itertools.islice(stream, BATCH_ROWS)):
        if rows:
            found += [float(regressor.predict(record)) for record in batch]
            truth += [float(record[label]) for record in batch]
        for record in batch:
            regressor.learn(record, float(record[label]))
        rows += len(batch)
    speed = rows / (time.perf_counter() - began)
    return np.array(truth), np.array(found), speed


def _parted(record: Record, features: Mapping[str, str]) -> tuple[dict[str, float], dict[str, str]]:
    """The numbers and the categories of a record; what is missing is left out, as these libraries have it."""
    present: Sequence[tuple[str, str, Any]] = [
        (name, kind, record[name]) for name, kind in features.items() if record[name] is not None
    ]
    numbers = {name: float(value) for name, kind, value in present if kind == "numeric"}
    return numbers, {name: str(value) for name, kind, value in present if kind != "numeric"}
