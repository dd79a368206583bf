"""What a demo can learn: a data set for each task, with its schema, broken records, and words for how it goes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from trainer.datasets import (
    FLIGHTS_FEATURES,
    FLIGHTS_LABEL,
    PORTAL_FEATURES,
    PORTAL_LABEL,
    flights,
    portal,
)

if TYPE_CHECKING:
    import pandas as pd

Whole = Mapping[str, Mapping[str, float | None]]  # metrics over the whole stream, by answer


@dataclass(frozen=True)
class Story:
    """A data set, in the order in which it is learned.

    Attributes:
        topic: of the records.
        frame: reads them.
        features: field = kind.
        schema: of the configuration, as TOML, without its features.
        bad: records that cannot be learned from.
        title: of the final table.
        answers: heading by answer, in the table's order.
        metrics: heading by metric, in the table's order.
        digits: format of the table's numbers.
        shown: metrics that are told while it learns, with their text: answer, metric, format.
        summary: field of the summary by answer and metric.
    """

    topic: str
    frame: "Callable[[], pd.DataFrame]"
    features: Mapping[str, str]
    schema: str
    bad: tuple[bytes, ...]
    title: str
    answers: Mapping[str, str]
    metrics: Mapping[str, str]
    digits: str
    shown: tuple[tuple[str, str, str], ...]
    summary: Mapping[str, tuple[str, str]]

    def note(self, whole: Whole) -> str:
        """How it goes, in a few words; empty before there is anything to tell."""
        found = [(text, whole.get(answer, {}).get(metric)) for answer, metric, text in self.shown]
        return "" if any(value is None for _, value in found) else ", ".join(text.format(v) for text, v in found)

    def instance(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The features of a record, to predict for."""
        return {name: value for name, value in record.items() if name in self.features}


FLIGHTS: Final = Story(
    topic="flights",
    frame=flights,
    features=FLIGHTS_FEATURES,
    schema=f"""\
label = "{FLIGHTS_LABEL}"
id = "flight_id"
time = "time_hour"
""",
    bad=(
        b"this is not JSON",
        b'{"arr_delay": "late", "dep_delay": 3}',
        b'{"dep_delay": 3, "carrier": "UA"}',
        b'{"arr_delay": null, "dep_delay": 3}',
        b'{"arr_delay": 12, "dep_delay": "three"}',
        b'{"arr_delay": 1e999}',
        b'[{"arr_delay": 12}]',
        b'{"arr_delay": 12, "carrier": {"code": "UA"}}',
    ),
    title="Prequential error, minutes (each flight predicted before it is learned)",
    answers={"0": "balance 0", "1": "balance 1", "median": "running median"},
    metrics={
        "mae": "MAE",
        "rmse": "RMSE",
        "balanced_mae": "balanced MAE",
        "mae_many": "many",
        "mae_medium": "medium",
        "mae_few": "few",
    },
    digits=".2f",
    shown=(("0", "mae", "MAE {:.2f} min"), ("1", "balanced_mae", "balanced {:.2f}")),
    summary={"mae_balance_0": ("0", "mae"), "balanced_mae_balance_1": ("1", "balanced_mae")},
)

PORTAL: Final = Story(
    topic="portal",
    frame=portal,
    features=PORTAL_FEATURES,
    schema=f"""\
label = "{PORTAL_LABEL}"
id = "record_id"
""",
    bad=(
        b"this is not JSON",
        b'{"species_id": 1.5, "weight": 40}',
        b'{"weight": 40, "sex": "M"}',
        b'{"species_id": null, "weight": 40}',
        b'{"species_id": "DM", "weight": "heavy"}',
        b'{"species_id": "DM", "weight": 1e999}',
        b'[{"species_id": "DM"}]',
        b'{"species_id": ["DM", "DO"], "weight": 40}',
    ),
    title="Prequential metrics (each rodent's species predicted before it is learned)",
    answers={"0": "balance 0", "1": "balance 1", "majority": "majority"},
    metrics={
        "accuracy": "accuracy",
        "macro_recall": "mean recall",
        "recall_many": "many",
        "recall_medium": "medium",
        "recall_few": "few",
        "log_loss": "log loss",
    },
    digits=".3f",
    shown=(("0", "accuracy", "accuracy {:.3f}"), ("1", "macro_recall", "balanced recall {:.3f}")),
    summary={"accuracy_balance_0": ("0", "accuracy"), "macro_recall_balance_1": ("1", "macro_recall")},
)

STORIES: Final[Mapping[str, Story]] = {"regression": FLIGHTS, "classification": PORTAL}
