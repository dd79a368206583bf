"""Which fields of a sample are the label, the id, the time and the features, and what to be wary of."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.config import FeatureKind, FeatureSettings, ModelSettings, SchemaSettings, TaskName
from trainer.errors import ConfigError
from trainer.fields import Field, Sample, inspect, percent, shorten
from trainer.leaks import after, strength, together

LABEL_WORDS: Final = {"label", "target", "y", "outcome", "response"}  # y not where there is z: then it is a coordinate
ID_WORDS: Final = {"id", "key", "uuid", "guid", "index", "rownames"}
CALENDAR_WORDS: Final = {"month", "weekday", "yearday", "hour"}
# Whole numbers with such a name are names, or come round again, rather than amounts.
CODE_WORDS: Final = {"id", "code", "zip", "postcode", "type", "category", "class", *CALENDAR_WORDS}
TIME_WORDS: Final = {"time", "timestamp", "date", "ts", "at", "epoch"}
EPOCH_S: Final = (1e8, 4.2e9)
EPOCH_S_REMARK: Final = "it seems to be seconds since 1970, and times are read as milliseconds or ISO 8601"
NUMBER_TEXT: Final = re.compile(r"\s*[-+]?[\d.,' ]*\d[\d.,' ]*(?:[eE][-+]?\d+)?\s*%?")
DATE_TEXT: Final = re.compile(r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}")
LEAST_IDS: Final = 20  # rows; among fewer, different values mean little
FEW_ROWS: Final = 1000
NEARLY_UNIQUE: Final = 0.5  # distinct values a row: such categories hardly come back
MANY_CATEGORIES: Final = 100
MOST_BUCKETS: Final = 16_384
MOST_CLASSES: Final = int(SchemaSettings.model_fields["max_classes"].default)
FEW_VALUES: Final = 10  # of a whole number, which may then stand for classes
LEAK: Final = 0.995  # of a correlation with the label, or the share of its variance that a category explains
CLOSE: Final = 0.9
CANDIDATES_SHOWN: Final = 12
NAMES_SHOWN: Final = 8

Floats = NDArray[np.float64]


class Feature(NamedTuple):
    """A field as it could stand among the features."""

    name: str
    settings: FeatureSettings | None  # None where it can be none
    comment: str  # what was seen of it
    left_out: str = ""  # why, "" where it is used


class Proposal(NamedTuple):
    """What a configuration would say, with comments on each part."""

    task: TaskName
    label: str
    label_comment: str
    id: str | None
    id_comment: str
    time: str | None
    time_comment: str
    features: list[Feature]
    notes: list[str]  # what to look at, the weightiest first


def propose(sample: Sample, label: str | None) -> Proposal:
    """Chooses roles for the fields of a sample.

    Args:
        sample: records of one file.
        label: the field to learn, None to find the one that is obviously meant.

    Raises:
        ConfigError: there is no such label, or none that is obvious, or it cannot be learned, or nothing tells of it.
    """
    if not sample.records:
        raise ConfigError("there are no records in the file")
    fields = inspect(sample)
    target, why = _label(fields, label)
    of_classes = _is_of_classes(target)
    if of_classes:
        target = replace(target, numbers=None)
    others = [field for field in fields if field.name != target.name or field.problem]
    ids = [field for field in others if _is_id(field)]
    identity = max(ids, key=lambda field: bool(field.words() & ID_WORDS), default=None)
    times = [field for field in others if field not in ids and _kind(field) == "timestamp"]
    time = _event_time(times)
    calendar = [field.name for field in others if field.words() & CALENDAR_WORDS and not field.constant]
    features, remarks = [], dict[str, list[str]]()
    for field in others:
        feature, remark = _feature(field, field in ids, target, time)
        if field is time and calendar and not feature.left_out:
            # The cycles of a stretch of time shorter than a year only move on, which costs more than they add.
            feature = feature._replace(left_out=f"{shorten(calendar[0])} says what comes round again in it")
        features.append(feature)
        if remark:
            remarks.setdefault(remark, []).append(shorten(field.name))
    used = {feature.name for feature in features if feature.settings and not feature.left_out}
    if not used:
        reasons = "".join(f"\n  {feature.name}: {feature.left_out}" for feature in features[:CANDIDATES_SHOWN])
        raise ConfigError(f"there is no field to learn {target.name!r} from{reasons}")
    numbers = [field for field in others if field.name in used and _kind(field) == "numeric"]
    notes = [
        *(
            f"{', '.join(names[:NAMES_SHOWN])}{', ...' if len(names) > NAMES_SHOWN else ''}: {remark}"
            for remark, names in remarks.items()
        ),
        *together(numbers, target),
        *_general(sample, target),
    ]
    return Proposal(
        "classification" if of_classes else "regression",
        target.name,
        f"{_told(target)}{f'; {percent(target.missing)} missing' if target.missing and not of_classes else ''}{why}",
        identity.name if identity else None,
        "another value in each row" if identity else "",
        time.name if time else None,
        _time_comment(time) if time else "",
        features,
        notes,
    )


# The label


def _label(fields: Sequence[Field], name: str | None) -> tuple[Field, str]:
    """The label, and a remark on how it was found."""
    if name is None:
        return _obvious_label(fields)
    field = next((field for field in fields if field.name == name), None)
    if field is None:
        close = difflib.get_close_matches(name, [field.name for field in fields], n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        known = ", ".join(shorten(field.name) for field in fields[: 2 * CANDIDATES_SHOWN])
        raise ConfigError(f"--label {name}: there is no such field{hint} The fields are {known}")
    if problem := _label_problem(field):
        raise ConfigError(f"--label {name}: {problem}")
    return field, ""


def _label_problem(field: Field) -> str:
    if field.problem:
        return f"it cannot be learned, as {field.problem}"
    if not field.present.any():
        return "no record has it"
    if not _is_of_classes(field):
        return "all its values are the same" if len(field.texts) == 1 else ""
    if field.numbers is None and (hint := _text_hint(field)):
        return f"its values are text ({field.seen('categorical')}); {hint}"
    if not field.kinds or len(field.texts) > min(MOST_CLASSES, NEARLY_UNIQUE * field.present.sum()):
        return f"its values are neither numbers nor a few classes ({field.seen('categorical')})"
    return "all its values are the same" if len(field.texts) == 1 else ""


def _is_of_classes(field: Field) -> bool:
    """Whether a label is learned as classes: text, or true and false."""
    return field.numbers is None or "numeric" not in field.kinds


def _obvious_label(fields: Sequence[Field]) -> tuple[Field, str]:
    possible = [
        field
        for field in fields
        if not _label_problem(field) and not _is_id(field) and _kind(field) == "numeric" and len(field.texts) > 2
    ]
    words = LABEL_WORDS - ({"y"} if any(field.name.lower() == "z" for field in fields) else set())
    named = [field for field in fields if not _label_problem(field) and not _is_id(field) and field.words() & words]
    if len(named) == 1:
        return named[0], "; taken for its name"
    if len(possible) == 1:
        return possible[0], "; the only number"
    if not possible:
        raise ConfigError("no field could be the label, as none is a number that varies; name one with --label")
    skewed_first = sorted(named or possible, key=_skewness, reverse=True)
    lines = [f"  {shorten(field.name)}: {_told(field)}" for field in skewed_first[:CANDIDATES_SHOWN]]
    more = len(skewed_first) - len(lines)
    raise ConfigError(
        "which field is to be learned? Give --label NAME; it could be (the most skewed first)\n"
        + "\n".join(lines)
        + (f"\n  and {more} more" if more else "")
    )


def _spread(field: Field) -> str:
    assert field.numbers is not None
    known = field.numbers[field.present]
    middle, rare = np.quantile(known, [0.5, 0.99])
    return f"{known.min():.6g} to {known.max():.6g}, half below {middle:.6g}, 1% above {rare:.6g}"


def _told(field: Field) -> str:
    return field.seen("categorical") if _is_of_classes(field) else _spread(field)


def _skewness(field: Field) -> float:
    if field.numbers is None:
        return 0.0
    known = field.numbers[field.present]
    sd = float(known.std())
    return float(abs(np.mean(((known - known.mean()) / sd) ** 3))) if 0 < sd < np.inf else 0.0


# Other roles


def _is_id(field: Field) -> bool:
    """Whether each row has another value, and not because it is a measurement, a time or a text."""
    if not field.unique or len(field.present) < LEAST_IDS or field.problem or _is_epoch_s(field):
        return False
    if field.numbers is None:
        return field.times_s is None and not _is_prose(field)
    rising = bool((np.diff(field.numbers) > 0).all())
    return field.whole and (bool(field.words() & ID_WORDS) or not field.name or (rising and field.times_s is None))


def _is_prose(field: Field) -> bool:
    return float(np.mean([text.count(" ") for text in field.texts])) >= 3


def _event_time(times: Sequence[Field]) -> Field | None:
    """The time that records come in the order of; else the earliest one."""

    def rank(field: Field) -> tuple[bool, bool, float]:
        assert field.times_s is not None
        median = float(np.median(field.times_s[field.present]))
        return (field.missing > 0, not _never_falls(field.times_s, field), median)

    return min(times, key=rank, default=None)


def _time_comment(time: Field) -> str:
    order = "never falls" if _never_falls(time.times_s, time) else "the rows are not in its order"
    return f"{time.seen('timestamp')}; {order}"


def _kind(field: Field) -> FeatureKind | None:
    """The kind of feature that a field would be."""
    if not field.kinds:
        return None
    if "vector" in field.kinds or "boolean" in field.kinds or "timestamp" in field.kinds:
        return next(kind for kind in ("vector", "boolean", "timestamp") if kind in field.kinds)
    if "numeric" in field.kinds and not (field.whole and field.words() & CODE_WORDS):
        return "numeric"
    return "categorical"


def _feature(field: Field, is_id: bool, target: Field, time: Field | None) -> tuple[Feature, str]:
    """The field as a feature, and a remark where someone should look at it."""
    kind = _kind(field)
    if kind is None or not field.name:
        return Feature(field.name, None, "", field.problem or "it has no name"), ""
    seen = field.seen(kind)
    settings = FeatureSettings(kind=kind, size=field.size)

    def out(why: str) -> Feature:
        return Feature(field.name, settings, seen, why)

    if field.constant:
        return out("it never changes" if field.present.any() else "it is always missing"), ""
    if is_id:
        return out("another value in each row says nothing about others"), ""
    if kind == "categorical" and (why := _never_back(field)):
        return out(why), ""
    if kind == "numeric" and _is_epoch_s(field):
        return out(EPOCH_S_REMARK), f"left out, as {EPOCH_S_REMARK}"
    given_away, how = strength(field, kind, target)
    if given_away >= LEAK:
        return out(f"it gives the label away ({how})"), "left out, as it gives the label away: is it known before it?"
    remark = _remark(field, kind)
    if given_away >= CLOSE:
        seen, remark = f"{seen}; {how}", "close to the label; keep only what is known before it"
    if time is not None and field is not time and kind == "timestamp":
        later, told = after(field, time, target)
        if told >= CLOSE:
            why = f"it gives the label away (the time since {shorten(time.name)} has correlation {told:.3f} with it)"
            return out(why), f"left out, as the time since {shorten(time.name)} gives the label away"
        if later == 1:
            remark = f"never before {shorten(time.name)}; keep only what is known before the label"
    if kind == "categorical":
        settings = FeatureSettings(kind=kind, buckets=_buckets(field))
    return Feature(field.name, settings, seen), remark


def _remark(field: Field, kind: FeatureKind) -> str:
    if kind == "timestamp" and field.numbers is not None:
        return "read as milliseconds since 1970"
    if kind == "categorical" and field.numbers is not None:
        return "taken for codes, not for amounts, by name"
    if kind == "categorical" and (hint := _text_hint(field)):
        return f"learned as categories, but {hint}"
    if kind == "numeric" and len(field.texts) > LEAST_IDS and _never_falls(field.numbers, field):
        return "only grows, so what comes next was never seen; leave it out if it is a counter"
    return ""


def _never_falls(values: Floats | None, field: Field) -> bool:
    return values is not None and not (np.diff(values[field.present]) < 0).any()


def _never_back(field: Field) -> str:
    """Why a category cannot be learned from, as its values hardly come again."""
    if field.numbers is None and field.texts and len(field.texts) > LEAST_IDS and _is_prose(field):
        return "it is prose, which no kind of feature reads"
    distinct = len(field.texts)
    if distinct > LEAST_IDS and distinct > NEARLY_UNIQUE * field.present.sum():
        return f"nearly each row has another value{f'; {hint}' if (hint := _text_hint(field)) else ''}"
    if distinct > MANY_CATEGORIES and (hint := _text_hint(field)):
        return hint
    return ""


def _text_hint(field: Field) -> str:
    """What text seems to be that would be worth more written otherwise."""
    if field.numbers is not None or field.times_s is not None or not field.texts:
        return ""
    if all(map(DATE_TEXT.match, field.texts)):
        return "they seem to be dates: written as ISO 8601 (2013-12-31) they could be a timestamp"
    if all(map(NUMBER_TEXT.fullmatch, field.texts)):
        return "they seem to be numbers, written as text: without quotes, with a point and no separators they are read"
    return ""


def _is_epoch_s(field: Field) -> bool:
    if field.numbers is None or not field.whole or not field.words() & TIME_WORDS:
        return False
    known = field.numbers[field.present]
    return bool(known.min() >= EPOCH_S[0] and known.max() <= EPOCH_S[1])


def _buckets(field: Field) -> int | None:
    """Twice the categories seen, as a power of two, where the default would put many into one bucket."""
    if 2 * len(field.texts) <= int(ModelSettings().category_buckets):
        return None
    return int(min(MOST_BUCKETS, 1 << (2 * len(field.texts) - 1).bit_length()))


def _general(sample: Sample, target: Field) -> list[str]:
    notes = []
    if len(sample.records) < FEW_ROWS:
        notes.append(f"only {len(sample.records)} rows were there to look at")
    if target.whole and len(target.texts) <= FEW_VALUES:
        notes.append(f'{shorten(target.name)} has {len(target.texts)} values: task = "classification" learns classes')
    if target.missing:
        notes.append(f"{percent(target.missing)} of the rows have no label, and become dead letters")
    if sample.uneven is not None:
        notes.append(
            f"line {sample.uneven} has not as many cells as the header: is a separator missing, or in a value?"
        )
    return notes
