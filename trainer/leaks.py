"""How much of the label a field gives away: what does is often known only after it, and then no use on a stream."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trainer.config import FeatureKind
from trainer.fields import Field, shorten

LEAST_ROWS: Final = 30
TOGETHER: Final = 0.9999  # share of the label's variance that a sum of features explains
WEIGHTY: Final = 0.02  # of a feature's standardised weight in that sum

Floats = NDArray[np.float64]


def strength(field: Field, kind: FeatureKind, target: Field) -> tuple[float, str]:
    """How much of the label a field gives away alone, from 0 to 1, and in words."""
    both = field.present & target.present
    if target.numbers is None:
        if kind != "categorical" or field.codes is None or target.codes is None or both.sum() < LEAST_ROWS:
            return 0.0, ""
        told = _told(field.codes[both], target.codes[both])
        return told, f"its categories tell {told:.1%} of the classes that are not the most frequent one"
    label = target.numbers[both]
    if len(label) < LEAST_ROWS or label.std() == 0:
        return 0.0, ""
    if kind == "categorical" and field.codes is not None:
        explained = _explained(field.codes[both], label)
        return explained, f"its categories explain {explained:.1%} of the label's variance"
    values = field.times_s if kind == "timestamp" else field.numbers
    if values is None:
        return 0.0, ""
    if np.array_equal(values[both], label):
        return 1.0, "it is the label"
    linear, monotone = (abs(_correlation(a, label_)) for a, label_ in _plain_and_ranked(values[both], label))
    return max(linear, monotone), f"correlation {max(linear, monotone):.3f} with the label"


def _plain_and_ranked(values: Floats, label: Floats) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats]]:
    return (values, label), (_ranks(values), _ranks(label))


def after(field: Field, time: Field, target: Field) -> tuple[float, float]:
    """How often a time is not before the event's, and the correlation of what lies between with the label."""
    assert field.times_s is not None
    assert time.times_s is not None
    if target.numbers is None:
        return 0.0, 0.0
    both = field.present & time.present & target.present
    between = field.times_s[both] - time.times_s[both]
    if len(between) < LEAST_ROWS:
        return 0.0, 0.0
    return float((between >= 0).mean()), abs(_correlation(between, target.numbers[both]))


def together(numeric: Sequence[Field], target: Field) -> list[str]:
    """A note where numeric fields, none of which is the label, give it together as a sum or a difference."""
    if target.numbers is None:
        return []
    rows = np.logical_and.reduce([target.present, *(field.present for field in numeric)])
    label = target.numbers[rows]
    if len(numeric) < 2 or len(label) < max(LEAST_ROWS, 4 * len(numeric)) or label.std() == 0:
        return []
    columns = np.stack([field.numbers[rows] for field in numeric if field.numbers is not None], axis=1)
    scale = columns.std(axis=0)
    standard = (columns - columns.mean(axis=0)) / np.where(scale > 0, scale, 1)
    aim = (label - label.mean()) / label.std()
    weights = np.linalg.lstsq(standard, aim, rcond=None)[0]
    explained = 1 - float(np.square(aim - standard @ weights).mean())
    if explained < TOGETHER:
        return []
    names = [shorten(field.name) for field, weight in zip(numeric, weights, strict=True) if abs(weight) > WEIGHTY]
    return [f"{' and '.join(names)} add up to the label: are they known before it?"]


def _explained(codes: NDArray[np.int64], label: Floats) -> float:
    """Share of the label's variance between categories, less what as many random ones would explain."""
    rows = np.bincount(codes)
    groups = int((rows > 0).sum())
    if len(label) <= 2 * groups:
        return 0.0
    means = np.bincount(codes, label) / np.maximum(rows, 1)
    left = float(np.square(label - means[codes]).sum()) / (len(label) - groups)
    return max(0.0, 1 - left / float(label.var(ddof=1)))


def _told(codes: NDArray[np.int64], classes: NDArray[np.int64]) -> float:
    """Share of the rows that the most frequent class gets wrong and the most frequent one of their category right."""
    groups = len(np.unique(codes))
    if len(classes) <= 2 * groups:
        return 0.0
    pairs, rows = np.unique(np.stack([codes, classes]), axis=1, return_counts=True)
    most = np.zeros(int(codes.max()) + 1, dtype=np.int64)
    np.maximum.at(most, pairs[0], rows)
    wrong = len(classes) - int(np.bincount(classes).max())
    return 1 - (len(classes) - int(most.sum())) / wrong if wrong else 0.0


def _ranks(values: Floats) -> Floats:
    """Ranks, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (counts.cumsum() - (counts - 1) / 2)[inverse]
    return ranks


def _correlation(a: Floats, b: Floats) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float((a * b).sum()) / norm if norm > 0 and np.isfinite(norm) else 0.0
