import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.calibration import WINDOW_ROWS, LevelCalibration

ROWS = int(10 * WINDOW_ROWS)


def observed(levels: torch.Tensor) -> LevelCalibration:
    calibration = LevelCalibration()
    for batch in levels.split(256):
        calibration.observe(batch)
    return calibration


def beta(a: float, b: float, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).beta(a, b, ROWS)).float()


def share_within(levels: torch.Tensor, ends: torch.Tensor) -> float:
    return float(((levels >= ends[0]) & (levels <= ends[1])).double().mean())


@pytest.mark.parametrize("interval", [0.5, 0.9, 0.99])
@pytest.mark.parametrize(("a", "b"), [(1, 1), (0.5, 0.5), (2, 2), (3, 1), (0.3, 1)])
def test_an_interval_holds_what_it_promises_however_wrong_the_prediction_is(
    a: float, b: float, interval: float
) -> None:
    ends = observed(beta(a, b)).ends(interval)
    fresh = beta(a, b, seed=1)
    assert share_within(fresh, ends) == pytest.approx(interval, abs=0.015)
    tail = (1 - interval) / 2
    assert float((fresh < ends[0]).double().mean()) == pytest.approx(tail, abs=0.015)


def test_before_anything_was_seen_the_levels_are_those_asked_for() -> None:
    asked = torch.tensor([0.05, 0.95], dtype=torch.float64)
    torch.testing.assert_close(LevelCalibration().ends(0.9), asked, atol=1e-5, rtol=0)


def test_at_balance_1_the_levels_are_those_asked_for_and_between_they_go_linearly() -> None:
    calibration = observed(beta(0.5, 0.5))
    natural, half, uniform = (calibration.ends(0.9, balance) for balance in (0.0, 0.5, 1.0))
    torch.testing.assert_close(uniform, torch.tensor([0.05, 0.95], dtype=torch.float64))
    torch.testing.assert_close(half, (natural + uniform) / 2)
    assert natural[0] < 0.01


def test_old_levels_are_forgotten() -> None:
    calibration = observed(torch.cat([beta(0.2, 0.2), beta(1, 1)]))
    torch.testing.assert_close(calibration.ends(0.9), observed(beta(1, 1)).ends(0.9), atol=1e-3, rtol=0)


@given(
    st.lists(st.floats(0, 1, width=32), max_size=50),
    st.floats(1e-15, 1 - 1e-15),
    st.floats(0, 1),
)
def test_the_levels_are_ordered_and_inside(levels: list[float], interval: float, balance: float) -> None:
    lower, upper = observed(torch.tensor(levels)).ends(interval, balance).tolist()
    assert 0 < lower <= upper < 1


def test_a_restored_calibration_is_the_one_that_was_saved() -> None:
    calibration, other = observed(beta(2, 2)), LevelCalibration()
    other.load_state_dict(calibration.state_dict())
    assert torch.equal(other.ends(0.8), calibration.ends(0.8))
