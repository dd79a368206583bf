"""What is drawn over time: all of it, however long, in as many points as a chart has room for."""

import itertools
from pathlib import Path

import pytest

from service.history import FIRST_STEP_S, MOST_POINTS, History, kept_manifests, point_of
from tests.service.store import make_settings, manifest, write_snapshot
from trainer.config import Settings
from trainer.snapshot import SnapshotStore


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return make_settings(tmp_path / "store")


def test_a_point_has_what_the_charts_show(settings: Settings) -> None:
    point = point_of(manifest(settings, created_s=1.7e9 + 3, drift_alarms=2))
    assert (point["time_s"], point["freshness_s"], point["drift_alarms"]) == (1.7e9 + 3, 3.0, 2)
    assert (point["samples_per_second"], point["lag_records"], point["train_loss"]) == (1234.5, 42, 0.5)
    assert (point["mae.0"], point["balanced_mae.1"], point["mae.median"]) == (10.0, 22.0, 30.0)


def test_what_is_not_known_yet_is_null(settings: Settings) -> None:
    point = point_of(manifest(settings, newest_append_s=0.0, metrics={}, train_loss=None))
    assert (point["freshness_s"], point["train_loss"], point["mae.0"]) == (None, None, None)


def test_classes_have_metrics_of_their_own(settings: Settings) -> None:
    metrics = {"fading": {"0": {"accuracy": 0.8}, "1": {"macro_recall": 0.5}, "majority": {"accuracy": 0.4}}}
    point = point_of(manifest(settings, task="classification", metrics=metrics))
    assert (point["accuracy.0"], point["macro_recall.1"], point["accuracy.majority"]) == (0.8, 0.5, 0.4)


def test_a_long_time_is_covered_by_as_many_points_as_a_short_one(settings: Settings) -> None:
    history = History()
    assert history.columns() == {}
    hours = 9
    template = manifest(settings)
    for second in range(0, hours * 3600, 2):
        history.add(template.model_copy(update={"created_s": 1e9 + second}))
    times = history.columns()["time_s"]
    assert MOST_POINTS / 2 <= len(times) <= MOST_POINTS
    assert times[0] == 1e9
    gaps = {later - earlier for earlier, later in itertools.pairwise(times)}
    assert max(gaps) <= 2 * min(gaps)
    assert 1e9 + hours * 3600 - times[-1] <= 2 * max(gaps)


def test_what_is_rolled_back_to_is_no_news(settings: Settings) -> None:
    history = History()
    for created_s in (100.0, 200.0, 150.0, 200.0 + FIRST_STEP_S / 2, 300.0):
        history.add(manifest(settings, created_s=created_s))
    assert history.columns()["time_s"] == [100.0, 200.0, 300.0]


def test_kept_manifests_are_of_this_task_and_readable(settings: Settings) -> None:
    store = SnapshotStore(settings.store.path)
    assert list(kept_manifests(store, "regression")) == []
    written = [write_snapshot(settings), write_snapshot(settings), write_snapshot(settings, task="classification")]
    (settings.store.path / f"{written[1].version:08d}" / "manifest.json").write_text("torn")
    assert [found.version for found in kept_manifests(store, "regression")] == [written[0].version]
