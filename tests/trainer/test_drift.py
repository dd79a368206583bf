"""An alarm when the error rises, soon and only then; and what is done about it."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.trainer.stream import make_learner, make_schema, make_settings
from trainer.batching import Batch, Batcher, Record
from trainer.drift import ACTION_ROWS, WARM_UP_ROWS, PageHinkley
from trainer.regression import Regression

ROWS = 20_000
BATCH = 128
Floats = NDArray[np.float64]


def errors(scale: Floats | float = 1.0, seed: int = 0) -> Floats:
    """Heavy-tailed errors, as those of rare labels are."""
    return np.abs(np.random.default_rng(seed).standard_t(3, ROWS)) * scale


def watched(error: Floats, threshold: float = 500.0, rows: int = BATCH) -> tuple[PageHinkley, list[int]]:
    """The rows after which there was an alarm."""
    drift, found = PageHinkley(threshold), []
    for start in range(0, len(error), rows):
        before = int(drift.alarms)
        drift.observe(torch.from_numpy(error[start : start + rows]))
        if int(drift.alarms) > before:
            found.append(min(start + rows, len(error)))
    return drift, found


@pytest.mark.parametrize("rows", [32, 128, 5000])
@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_a_step_up_is_found_soon_whatever_the_unit_and_the_batch(unit: float, rows: int) -> None:
    change = ROWS // 2
    step = np.where(np.arange(ROWS) < change, 1.0, 2.0)
    _, found = watched(unit * errors(step), rows=rows)
    assert change < found[0] <= change + max(2000, rows)
    assert len(found) == 1


def test_errors_that_stay_or_fall_raise_no_alarm() -> None:
    for scale in (1.0, np.geomspace(10, 1, ROWS), np.where(np.arange(ROWS) < ROWS // 2, 1.0, 0.2)):
        assert watched(errors(scale))[1] == []


def test_a_few_rows_far_out_raise_no_alarm() -> None:
    error = errors()
    error[ROWS // 2 :: 1000] = 1e12
    assert watched(error)[1] == []


def test_nothing_is_said_before_there_is_a_baseline() -> None:
    error = errors(np.where(np.arange(ROWS) < WARM_UP_ROWS / 2, 1.0, 10.0))[: int(WARM_UP_ROWS)]
    drift, found = watched(error)
    assert found == []
    assert float(drift.statistic) == 0


def test_what_is_done_lasts_for_a_while() -> None:
    change = ROWS // 4
    drift = PageHinkley(500.0)
    acting = []
    for batch in torch.from_numpy(errors(np.where(np.arange(ROWS) < change, 1.0, 3.0))).split(BATCH):
        drift.observe(batch)
        acting.append(bool(drift.acting))
    assert not acting[0]
    assert sum(acting) == pytest.approx(ACTION_ROWS / BATCH, abs=1)


@given(st.lists(st.lists(st.floats(0, 1e30), min_size=1, max_size=300), max_size=20))
def test_it_stays_finite(parts: list[list[float]]) -> None:
    drift = PageHinkley(50.0)
    for part in parts:
        drift.observe(torch.tensor(part))
    values = [float(value) for name, value in drift.state_dict().items() if name != "since"]
    assert np.isfinite(values).all()
    assert 0 <= float(drift.statistic) < 1


# A stream whose world changes: what was dear becomes cheap


def changing(rows: int, change: int) -> list[Batch]:
    """The price follows the size, until from one row on it goes the other way."""
    settings = make_settings(batch={"size": BATCH})
    random = np.random.default_rng(1)
    size = random.exponential(size=rows)
    price = np.where(np.arange(rows) < change, 10 * size, 40 - 10 * size) + random.normal(size=rows)
    batcher = Batcher(make_schema(settings), BATCH)
    values = (b'{"size": %f, "age": 1, "kind": "tin", "price": %f}' % pair for pair in zip(size, price, strict=True))
    return list(batcher.add(Record(0, n, 0.0, None, value) for n, value in enumerate(values)))


def after_change(action: str, rows: int, change: int) -> tuple[list[int], float]:
    """Rows of the alarms, and the mean absolute error once the first one has been raised."""
    learner: dict[str, Any] = {"drift_action": action, "lr": 5e-4, "replay_steps": 1, "replay_rows": 1024}
    learner |= {"step_rows": BATCH, "label_memory": 64}
    trained = make_learner(make_settings(batch={"size": BATCH}, learner=learner))
    alarms: list[int] = []
    error: list[float] = []
    for batch in changing(rows, change):
        before = int(trained.drift.alarms)
        result = trained.step(batch)
        if int(trained.drift.alarms) > before:
            alarms.append(trained.samples)
        if alarms:
            error.append(float((torch.from_numpy(batch.label) - result.density.answer(0.0).point).abs().mean()))
    return alarms, float(np.mean(error))


def test_a_world_that_turns_round_is_noticed_and_a_higher_rate_learns_the_new_one_sooner() -> None:
    rows, change = 9_000, 4_000
    alarms, patient = after_change("none", rows, change)
    assert change < alarms[0] <= change + 2000
    same, eager = after_change("learning_rate", rows, change)
    assert same[0] == alarms[0]
    assert eager < 0.95 * patient


def test_a_label_density_that_forgets_follows_labels_that_moved() -> None:
    def share_above(action: str) -> float:
        """Of the label density above where all labels were, some time after they moved."""
        learner: dict[str, Any] = {"drift_action": action, "replay_steps": 0, "step_rows": BATCH, "label_memory": 0}
        trained = make_learner(make_settings(batch={"size": BATCH}, learner=learner, model={"components": 1}))
        random = np.random.default_rng(2)
        price = random.normal(size=8_000) + 50 * (np.arange(8_000) >= 4_000)
        batcher = Batcher(make_schema(make_settings()), BATCH)
        values = (b'{"size": 1, "age": 1, "kind": "tin", "price": %f}' % value for value in price)
        for batch in batcher.add(Record(0, n, 0.0, None, value) for n, value in enumerate(values)):
            trained.step(batch)
        task = trained.task
        assert isinstance(task, Regression)
        grid = task.density.grid()
        mass = grid.log_density.double().exp() * grid.widths
        return float(mass[grid.centres > 25].sum())

    patient = share_above("none")
    assert patient == pytest.approx(0.5, abs=0.02)
    assert share_above("forget") > patient + 0.04
