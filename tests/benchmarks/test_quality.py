"""The benchmark of quality judges as it says, and runs; the streams with a hard start are not lost on."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.benchmarks import quality
from tests.benchmarks.cold_start import STREAMS as HARD
from tests.benchmarks.cold_start import after_turn, errors
from tests.benchmarks.quality import BALANCES, STREAMS, best_baselines, judge, measure, settings_of, variants

FLIGHTS = STREAMS["flights"]


def result(variant: str, balance: float, mae: float, rmse: float, balanced: float, seed: int = 0) -> dict[str, Any]:
    figures = {
        "mae": float(mae),
        "rmse": float(rmse),
        "balanced_mae": float(balanced),
        "coverage_second_half": 0.9,
        "rows_per_second": 1.0,
    }
    return {"variant": variant, "seed": seed, "balance": balance, **figures}


RUNS = [
    *(result("ours", balance, 10, 20, 40 - 10 * balance, seed) for balance in BALANCES for seed in (0, 1)),
    *(result("mse", 0.0, 11, 19 + 2 * seed, 50, seed) for seed in (0, 1)),
    *(result("l1", 0.0, 9 + 2 * seed, 22, 32, seed) for seed in (0, 1)),
]


def test_baselines_stand_with_the_best_of_all_for_each_metric_on_the_mean_of_seeds() -> None:
    assert best_baselines(RUNS) == {"mae": ("l1", 10), "rmse": ("mse", 20), "balanced_mae": ("l1", 32)}


def test_goals_are_reached_up_to_the_bound_and_not_past_it() -> None:
    assert [goal.measured for goal in judge(FLIGHTS, RUNS)] == [1, 1, 30 / 32, 0.9]
    assert all(goal.reached for goal in judge(FLIGHTS, RUNS))
    assert not judge(STREAMS["diamonds"], RUNS)[2].reached
    worse = [{**r, "mae": r["mae"] + 0.1, "coverage_second_half": 0.92} if r["variant"] == "ours" else r for r in RUNS]
    assert [goal.reached for goal in judge(FLIGHTS, worse)] == [False, True, True, False]


def test_baselines_are_the_plain_losses_each_with_its_rates_and_weights() -> None:
    chosen = variants(settings_of(FLIGHTS.label, FLIGHTS.features))
    assert len(chosen) == 13
    of = {
        (s.learner.loss, s.learner.lr, s.learner.weight_averaging, s.model.head)
        for n, s in chosen.items()
        if n != "ours"
    }
    assert len(of) == 12
    assert {head for *_, head in of} == {"gaussian"}


def test_it_runs_every_variant_and_seed_on_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "LOSSES", ("l1",))
    monkeypatch.setattr(quality, "AVERAGING", (0.0,))
    done: list[None] = []
    runs = measure(STREAMS["diamonds"], 700, 2, lambda: done.append(None))
    assert (len(done), len(runs)) == (2 * 3, 2 * (2 + len(BALANCES)))
    assert len({run["constant_balanced_mae"] for run in runs}) == 1
    assert all(goal.measured > 0 for goal in judge(STREAMS["diamonds"], runs))


@pytest.mark.parametrize("stream", HARD)
def test_a_hard_start_costs_little_more_than_it_costs_plain_regression(stream: str) -> None:
    """A mixture that explained the labels' distribution first would have two to three times the error here."""
    torch.set_num_threads(1)
    ours, plain = errors(stream, "bmc"), errors(stream, "mse")
    assert ours.mean() < 1.4 * plain.mean()
    if stream == "new year":
        assert after_turn(ours).mean() < 1.4 * after_turn(plain).mean()
        assert np.median(after_turn(ours)) < 3 * np.median(ours)
