"""What the live page draws over time: a point for each model that answered, fewer of them the longer it goes on."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from trainer.errors import SnapshotError
from trainer.manifest import Manifest
from trainer.snapshot import SnapshotStore

MOST_POINTS: Final = 600  # as many as a chart has columns
FIRST_STEP_S: Final = 1.0
FACTS: Final = ("samples_per_second", "lag_records", "train_loss", "noise_sigma_label_units", "drift_alarms")
# Of each answer (a balance, or a constant) the error that counts rows alike, and the one that counts labels alike.
ERRORS: Final = {"regression": ("mae", "balanced_mae"), "classification": ("accuracy", "macro_recall")}
ANSWERS: Final = {"regression": ("0", "1", "median"), "classification": ("0", "1", "majority")}

Point = dict[str, float | None]


def point_of(manifest: Manifest) -> Point:
    """What a model adds to the charts; a metric of an answer is called `metric.answer`, recent as always."""
    point: Point = {"time_s": manifest.created_s, **{name: getattr(manifest, name) for name in FACTS}}
    newest_s = manifest.newest_append_s
    point["freshness_s"] = max(0.0, manifest.created_s - newest_s) if newest_s else None
    fading = manifest.metrics.get("fading") or {}
    for answer in ANSWERS[manifest.task]:
        found = fading.get(answer) or {}
        point |= {f"{metric}.{answer}": found.get(metric) for metric in ERRORS[manifest.task]}
    return point


class History:
    """Points in the order of time, from the first model to the newest.

    Where they become too many, every second one goes and those to come are twice as far apart: the whole time is
    covered, with as many points after a week as after an hour.
    """

    def __init__(self) -> None:
        self._points: list[Point] = []
        self._step_s = FIRST_STEP_S
        self._newest_s = float("-inf")

    def add(self, manifest: Manifest) -> None:
        """Notes a model, unless it is older than the newest one (rolled back to) or comes too soon after it."""
        if manifest.created_s < self._newest_s + self._step_s:
            return
        self._newest_s = manifest.created_s
        self._points.append(point_of(manifest))
        if len(self._points) > MOST_POINTS:
            self._points = self._points[::2]
            self._step_s *= 2

    def columns(self) -> dict[str, list[float | None]]:
        """All points, a column for each of their names."""
        names = self._points[0] if self._points else ()
        return {name: [point[name] for point in self._points] for name in names}


def kept_manifests(store: SnapshotStore, task: str) -> Iterable[Manifest]:
    """What the store still knows of the time before: manifests of this task, from the oldest."""
    found = []
    with suppress(SnapshotError):
        for version in store.versions():
            with suppress(SnapshotError):  # removed meanwhile, or damaged
                manifest = store.manifest(version)
                if manifest.task == task:
                    found.append(manifest)
    return sorted(found, key=lambda manifest: manifest.created_s)
