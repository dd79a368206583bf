import socket
import time
from urllib.request import urlopen

import numpy as np
import pytest

from tests.trainer.stream import make_manifest, make_settings
from trainer.batching import Batch, PartitionProgress, Record, Rejection
from trainer.errors import ConfigError, RecordError
from trainer.learner import Readings
from trainer.metrics import TrainerMetrics
from trainer.task import Noise

READINGS = Readings(
    train_loss=0.5,
    noise=Noise(0.3, 6.0),
    nonfinite_steps=2,
    drift_alarms=1,
    drift_statistic=0.25,
    metrics={
        "fading": {
            "rows": 9.0,
            "coverage": 0.9,
            "0": {"mae": 1.0, "mae_many": 2.0, "mae_medium": None, "mae_few": 4.0, "balanced_mae": 5.0},
            "1": {"mae": 6.0, "mae_many": 7.0, "mae_medium": 8.0, "mae_few": 9.0, "balanced_mae": None},
            "median": {"mae": 3.0},
        }
    },
    healthy=True,
    newest=[],
)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> TrainerMetrics:
    return TrainerMetrics(clock)


def batch(rows: int, *reasons: str, skipped: int = 0, newest_s: float = 50.0) -> Batch:
    rejected = tuple(Rejection(Record(0, 0, 0.0, None, b""), RecordError(reason, "bad")) for reason in reasons)
    progress = {0: PartitionProgress(next_offset=9, trained=rows, rejected=len(reasons), skipped=skipped)}
    empty = np.empty((rows, 0))
    return Batch(
        empty.astype(np.float32), empty.astype(np.int64), np.zeros(rows), np.zeros(rows), progress, rejected, newest_s
    )


def value(metrics: TrainerMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"tailstream_{name}", labels)


def test_batches_are_counted_as_they_pass(metrics: TrainerMetrics) -> None:
    metrics.trained(batch(32, "not_json", "not_json", "no_label", skipped=3), 0.004)
    metrics.trained(batch(0, "no_label"), 9.0)
    assert value(metrics, "train_samples_total") == 32
    assert value(metrics, "train_step_seconds_count") == 1  # a batch without rows took no step
    assert value(metrics, "train_step_seconds_sum") == 0.004
    assert value(metrics, "records_rejected_total", reason="not_json") == 2
    assert value(metrics, "records_rejected_total", reason="no_label") == 2
    assert value(metrics, "records_skipped_total") == 3


def test_readings_are_shown(metrics: TrainerMetrics) -> None:
    metrics.read(READINGS, steps=12, lag={0: 5, 3: 0}, lost_records=4)
    expected = {"train_loss": 0.5, "noise_sigma": 0.3, "noise_sigma_label_units": 6.0, "train_steps_total": 12}
    expected |= {"nonfinite_steps_total": 2, "records_lost_total": 4, "prequential_coverage": 0.9}
    assert {name: value(metrics, name) for name in expected} == expected
    assert [value(metrics, "consumer_lag_records", partition=p) for p in ("0", "3")] == [5, 0]
    shots = ("all", "many", "medium", "few")
    assert [value(metrics, "prequential_mae", shots=s, balance="0") for s in shots] == [1, 2, None, 4]
    assert [value(metrics, "prequential_mae", shots=s, balance="1") for s in shots] == [6, 7, 8, 9]
    assert [value(metrics, "prequential_balanced_mae", balance=b) for b in "01"] == [5, None]


def test_totals_kept_elsewhere_are_not_added_up_again(metrics: TrainerMetrics) -> None:
    for steps in (10, 10, 25):
        metrics.read(READINGS, steps=steps, lag={}, lost_records=4)
    assert (value(metrics, "train_steps_total"), value(metrics, "nonfinite_steps_total")) == (25, 2)
    assert value(metrics, "records_lost_total") == 4


def test_the_rate_is_that_of_the_time_between_readings_and_fades(metrics: TrainerMetrics, clock: Clock) -> None:
    rates = []
    for rows in (100, 200, 0, 0):
        metrics.trained(batch(rows), 0.1)
        clock.now_s += 2.0
        metrics.read(READINGS, 0, {}, 0)
        rates.append(metrics.samples_per_second)
    assert rates == pytest.approx([50, 50 + 0.3 * 50, 65 * 0.7, 65 * 0.49])
    assert value(metrics, "train_samples_per_second") == rates[-1]


def test_before_the_first_readings_nothing_is_claimed(metrics: TrainerMetrics) -> None:
    metrics.read(READINGS._replace(train_loss=None, metrics={"fading": {"rows": 0.0, "coverage": None}}), 0, {}, 0)
    assert value(metrics, "train_samples_per_second") == 0
    assert value(metrics, "prequential_mae", shots="all", balance="0") is None
    assert np.isnan(value(metrics, "freshness_seconds") or 0.0)


def test_freshness_is_the_age_of_the_newest_record_trained(metrics: TrainerMetrics) -> None:
    now_s = time.time()
    metrics.trained(batch(1, newest_s=now_s - 60), 0.1)
    metrics.trained(batch(1, newest_s=now_s - 90), 0.1)  # older ones do not make it stale
    assert (value(metrics, "freshness_seconds") or 0.0) >= 60
    assert metrics.newest_append_s == now_s - 60


def test_a_timestamp_from_the_future_makes_nothing_fresher_than_now(metrics: TrainerMetrics) -> None:
    metrics.trained(batch(1, newest_s=time.time() + 86400), 0.1)
    assert 0 <= (value(metrics, "freshness_seconds") or 0.0) < 3600


def test_snapshots_are_counted(metrics: TrainerMetrics) -> None:
    metrics.saved(7, 1234, 0.25)
    metrics.save_failed()
    found = [value(metrics, f"snapshot_{name}") for name in ("version", "bytes", "seconds", "failures_total")]
    assert found == [7, 1234, 0.25, 1]


def test_an_address_that_is_taken_is_a_configuration_error(metrics: TrainerMetrics) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be bound"):
            metrics.serve("127.0.0.1", port)


def test_they_are_answered_over_http(metrics: TrainerMetrics) -> None:
    metrics.trained(batch(32), 0.004)
    port = metrics.serve("127.0.0.1", 0)
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert b"tailstream_train_samples_total 32.0" in answer.read()


def test_after_a_resume_counters_count_what_this_process_did(metrics: TrainerMetrics) -> None:
    metrics.resumed(make_manifest(make_settings(), step=10, nonfinite_steps=1, newest_append_s=77.0))
    metrics.read(READINGS, 12, {}, 0)
    assert (value(metrics, "train_steps_total"), value(metrics, "nonfinite_steps_total")) == (2, 1)
    assert metrics.newest_append_s == 77.0
