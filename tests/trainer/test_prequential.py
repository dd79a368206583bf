import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.trainer.stream import CPU
from trainer.prequential import BINS, LEAST_ROWS, PrequentialMetrics

FADING = 0.99


def make() -> PrequentialMetrics:
    return PrequentialMetrics(["0", "1"], FADING, CPU)


def observe(metrics: PrequentialMetrics, label: NDArray[Any], zero: NDArray[Any], one: NDArray[Any]) -> None:
    covered = torch.from_numpy(np.abs(label - zero) < 1)
    score = torch.from_numpy(-np.abs(label)).float()
    answers = {"0": zero, "1": one, "median": np.zeros(len(label))}
    metrics.observe(label, {name: torch.from_numpy(answer) for name, answer in answers.items()}, covered, score)


def stream(rows: int, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    random = np.random.default_rng(seed)
    label = random.exponential(10, rows)
    return label, label + random.normal(size=rows), label * random.uniform(0.5, 1.5, rows)


def split(rows: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, rows, size)]


def fed(label: NDArray[Any], *answers: NDArray[Any], size: int = 100) -> PrequentialMetrics:
    metrics = make()
    for part in split(len(label), size):
        observe(metrics, label[part], *(answer[part] for answer in answers))
    return metrics


def exact(label: NDArray[Any], answer: NDArray[Any], weight: NDArray[Any]) -> dict[str, float | None]:
    """The definitions, on rows that were all kept."""
    error = np.abs(answer - label)
    bins = np.clip((label - label.min()) / (np.ptp(label) / BINS), 0, BINS - 1).astype(int)
    rows = np.bincount(bins, weight, BINS)
    by_bin = np.bincount(bins, weight * error, BINS)
    share = rows / rows.sum()
    enough = rows >= LEAST_ROWS
    shots = {"many": share >= 1 / 50, "medium": (share < 1 / 50) & (share >= 1 / 500), "few": (share < 1 / 500)}
    return {
        "mae": float((weight * error).sum() / weight.sum()),
        "rmse": math.sqrt((weight * error**2).sum() / weight.sum()),
        "balanced_mae": float((by_bin[enough] / rows[enough]).mean()),
        **{
            f"mae_{name}": float(by_bin[of].sum() / rows[of].sum()) if rows[of].sum() else None
            for name, of in shots.items()
        },
    }


@pytest.mark.parametrize("window", ["whole", "fading"])
def test_errors_are_those_of_the_definitions_on_all_rows(window: str) -> None:
    label, zero, one = stream(6000)
    found = fed(label, zero, one).compute()[window]
    batches_ago = (len(label) - 1 - np.arange(len(label))) // 100
    weight = np.ones(len(label)) if window == "whole" else FADING ** (100.0 * batches_ago)
    assert found["rows"] == pytest.approx(weight.sum())
    assert found["coverage"] == pytest.approx(weight @ (np.abs(label - zero) < 1) / weight.sum())
    assert found["log_score"] == pytest.approx(weight @ -np.abs(label) / weight.sum(), rel=1e-6)
    for name, answer in (("0", zero), ("1", one)):
        expected = exact(label, answer, weight)
        assert found[name]["mae"] == pytest.approx(expected["mae"])
        assert found[name]["rmse"] == pytest.approx(expected["rmse"])
        if window == "whole":  # a row at the edge of a bin may count in the next one: cells are 1/10 of a bin or finer
            for metric, tolerance in (
                ("balanced_mae", 0.05),
                ("mae_many", 0.01),
                ("mae_medium", 0.1),
                ("mae_few", 0.15),
            ):
                assert found[name][metric] == pytest.approx(expected[metric], rel=tolerance), metric


@pytest.mark.parametrize("window", ["whole", "fading"])
def test_the_regions_are_what_the_balanced_error_is_the_mean_of(window: str) -> None:
    label, zero, one = stream(6000)
    found = fed(label, zero, one).compute()[window]
    regions = found["regions"]
    assert (regions["low"], regions["high"]) == (label.min(), label.max())
    rows = np.array(regions["rows"])
    assert rows.sum() == pytest.approx(found["rows"], rel=1e-4)
    for answer in ("0", "1", "median"):
        errors = regions[answer]
        assert [error is None for error in errors] == (rows < 10).tolist()
        known = [error for error in errors if error is not None]
        assert 0 < len(known) < len(errors) == 50
        assert np.mean(known) == pytest.approx(found[answer]["balanced_mae"], rel=1e-4)


def test_fading_forgets_as_a_plain_loop_does() -> None:
    label, zero, one = stream(1000)
    metrics, rows, total = make(), 0.0, 0.0
    for part in split(1000, 70):
        observe(metrics, label[part], zero[part], one[part])
        count = len(label[part])
        rows, total = rows * FADING**count + count, total * FADING**count + np.abs(zero - label)[part].sum()
    fading = metrics.compute()["fading"]
    assert (fading["rows"], fading["0"]["mae"]) == (pytest.approx(rows), pytest.approx(total / rows))


@given(st.permutations(range(6)), st.floats(0.1, 1e6), st.floats(-1e6, 1e6))
@settings(max_examples=30, deadline=None)
def test_errors_do_not_depend_on_the_order_in_which_the_range_grows(
    order: list[int], scale: float, offset: float
) -> None:
    label, zero, one = stream(600)
    label, zero, one = ((values - 10) * scale + offset for values in (label, zero, one))
    by_size = np.argsort(np.abs(label - offset))
    groups = [by_size[part] for part in split(600, 100)]
    shuffled = np.concatenate([groups[i] for i in order])
    found = fed(label[shuffled], zero[shuffled], one[shuffled]).compute()["whole"]
    expected = exact(label, zero, np.ones(600))
    assert found["0"]["mae"] == pytest.approx(expected["mae"])
    assert found["0"]["rmse"] == pytest.approx(expected["rmse"])
    assert found["0"]["balanced_mae"] == pytest.approx(expected["balanced_mae"], rel=0.35)
    assert found["rows"] == 600


def test_the_grid_always_spans_the_labels_in_cells_that_are_powers_of_two() -> None:
    metrics = make()
    for value in (5.0, 5.0, 5.001, -3.0, 1e6, 1e6 + 1, -1e9, 1e-3):
        label = np.array([value])
        observe(metrics, label, label, label)
        assert metrics.origin <= metrics.low <= value <= metrics.high < metrics.origin + 2048 * metrics.width
        assert math.log2(metrics.width) % 1 == 0
    assert metrics.compute()["whole"]["rows"] == 8


def test_labels_that_are_all_equal_have_errors_too() -> None:
    label = np.full(50, 7.0)
    found = fed(label, label + 2, label - 3, size=10).compute()["whole"]
    assert (found["0"]["mae"], found["1"]["mae"], found["0"]["balanced_mae"]) == (2.0, 3.0, 2.0)
    assert found["0"]["mae_few"] is None


def test_before_the_first_row_there_are_no_metrics() -> None:
    metrics = make()
    none = np.empty(0)
    observe(metrics, none, none, none)
    assert metrics.compute()["whole"] == {"rows": 0.0, "coverage": None, "log_score": None}


def test_bins_of_few_rows_say_nothing_of_the_balanced_error() -> None:
    label = np.concatenate([np.zeros(100), np.full(LEAST_ROWS - 1, 50.0), np.full(LEAST_ROWS, 100.0)])
    answer = label + np.concatenate([np.full(100, 1.0), np.full(LEAST_ROWS - 1, 1000.0), np.full(LEAST_ROWS, 3.0)])
    assert fed(label, answer, answer).compute()["whole"]["0"]["balanced_mae"] == pytest.approx(2.0)


@given(st.integers(0, 10))
@settings(max_examples=11, deadline=None)
def test_restored_metrics_go_on_as_the_saved_ones(after: int) -> None:
    label, zero, one = stream(1000)
    whole = fed(label, zero, one)
    metrics = make()
    for number, part in enumerate(split(1000, 100)):
        if number == after:
            state, metrics = metrics.state_dict(), make()
            metrics.load_state_dict(state)
        observe(metrics, label[part], zero[part], one[part])
    assert metrics.compute() == whole.compute()


def test_a_saved_state_does_not_change_with_what_comes_later() -> None:
    label, zero, one = stream(300)
    metrics = fed(label, zero, one)
    state = metrics.state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    observe(metrics, label * 1e5, zero, one)
    assert all(torch.equal(state[name], kept[name]) for name in state)
