"""`tailstream evaluate`: how well a configuration learns a file, row by row, before it is let near a topic."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from trainer.command import ConfigFile, explained, say
from trainer.errors import ConfigError
from trainer.memory import freeze_heap, keep_freed

if TYPE_CHECKING:
    from trainer.batching import Batch
    from trainer.class_evaluation import ClassAnswers
    from trainer.config import Settings
    from trainer.evaluation import Answers
    from trainer.schema import FeatureSchema


class Report(NamedTuple):
    """How runs of a task are shown."""

    title: str
    columns: dict[str, str]  # metric = heading
    digits: str  # format of a number
    notes: tuple[str, ...]


REPORTS = {
    "regression": Report(
        "Prequential errors, label units",
        {
            "mae": "MAE",
            "rmse": "RMSE",
            "balanced_mae": "balanced",
            "mae_top_5_percent": "top 5%",
            "mae_top_1_percent": "top 1%",
            "log_score": "log score",
            "coverage_second_half": "coverage",
        },
        ".4g",
        (
            "b: balance. balanced, top 5%, top 1%: MAE over label regions alike, and of the largest labels.",
            "coverage: of 90% intervals at balance 0, second half of the rows.",
        ),
    ),
    "classification": Report(
        "Prequential metrics",
        {
            "accuracy": "accuracy",
            "macro_recall": "recall",
            "recall_many": "many",
            "recall_medium": "medium",
            "recall_few": "few",
            "g_mean": "G-mean",
            "log_loss": "log loss",
            "calibration_error": "calibration",
        },
        ".3f",
        (
            "b: balance. recall: the mean over classes of the share answered right; many, medium, few: over those with",
            "at least a 50th, a 500th, and less of the rows. calibration: expected calibration error.",
        ),
    ),
}
REGIONS = 30
LEAST_WIDTH = 110  # characters; a narrower terminal wraps what it must, and a file loses nothing


@explained
def evaluate(
    file: Annotated[Path, typer.Argument(help="JSON lines or CSV, .gz too; - is standard input.", allow_dash=True)],
    config: ConfigFile,
    changes: Annotated[list[str], typer.Option("--set", help="Another value: learner.lr=1e-3 (TOML).")] = [],  # noqa: B006
    compare: Annotated[str, typer.Option(help="Losses, by commas; by default the configuration's.")] = "",
    balance: Annotated[str, typer.Option(help="Label priors to answer at, by commas.")] = "0,1",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each loss, with seeds from the configuration's on.")] = 1,
    rows: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the error by label region there (needs matplotlib).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all runs there.", dir_okay=False)] = None,
) -> None:
    """Learn from a file, each row predicted before it is learned from, and show the errors: no broker needed."""
    from trainer.config import load

    settings = load(config, dict(_parsed(change) for change in changes))
    balances = _balances(balance)
    losses = [loss.strip() for loss in compare.split(",") if loss.strip()] or [settings.learner.loss]
    _check_losses(losses, settings)
    batches, schema = _batches(file, settings, rows)
    runs, answers = _run_all(settings, schema, batches, losses, balances, seeds)
    say(_table(REPORTS[settings.task], runs, losses, balances))
    if json_file is not None:
        speed = max(a.rows_per_second for a in answers.values())
        json_file.write_text(json.dumps({"rows_per_second": speed, "runs": runs}, indent=1) + "\n")
    if plot is not None:
        _draw(plot, answers, settings.record_schema.label)


def _parsed(change: str) -> tuple[str, Any]:
    key, equals, text = change.partition("=")
    if not equals:
        raise ConfigError(f"--set {change}: give KEY=VALUE, as in learner.lr=1e-3")
    try:
        return key.strip(), tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), text  # a bare word is a string


def _balances(text: str) -> list[float]:
    try:
        balances = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--balance {text}: give numbers from 0 to 1, by commas") from None
    if not all(0 <= balance <= 1 for balance in balances):
        raise ConfigError(f"--balance {text}: each lies between 0 (the stream's prior) and 1 (all labels alike)")
    return balances


def _check_losses(losses: Sequence[str], settings: "Settings") -> None:
    from trainer.losses import LOSSES

    known = [name for name, entry in LOSSES.items() if entry.task == settings.task]
    for loss in losses:
        if loss not in known:
            raise ConfigError(f"--compare: there is no loss {loss!r} of {settings.task}; there are {', '.join(known)}")


def _batches(file: Path, settings: "Settings", rows: int | None) -> tuple[list["Batch"], "FeatureSchema"]:
    """The file, decoded once for all runs."""
    from itertools import islice

    from trainer.batching import Batcher, Record
    from trainer.files import read_values
    from trainer.schema import FeatureSchema

    schema = FeatureSchema.of(settings)
    batcher = Batcher(schema, settings.batch.size)
    records = (Record(0, n, 0.0, None, value) for n, value in enumerate(islice(read_values(file, schema), rows)))
    batches = list(batcher.add(records))
    if batcher.pending:
        batches.append(batcher.flush())
    rejected = [rejection for batch in batches for rejection in batch.rejected]
    if rejected:
        record, error = rejected[0]
        say(f"{len(rejected)} records cannot be learned from, the first is number {record.offset}: {error}")
    if sum(map(len, batches)) <= settings.batch.size:
        raise ConfigError(f"{file} has no more than one batch of rows that can be learned from: nothing to evaluate")
    return batches, schema


def _run_all(
    settings: "Settings",
    schema: "FeatureSchema",
    batches: Sequence["Batch"],
    losses: Sequence[str],
    balances: Sequence[float],
    seeds: int,
) -> tuple[list[dict[str, Any]], dict[str, "Answers | ClassAnswers"]]:
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from trainer.class_evaluation import run_classes
    from trainer.evaluation import for_loss, run
    from trainer.process import choose_device

    torch.set_num_threads(settings.threads)
    keep_freed()
    freeze_heap()
    runs: list[dict[str, Any]] = []
    answers: dict[str, Answers | ClassAnswers] = {}
    run_task = run_classes if settings.task == "classification" else run
    total = sum(map(len, batches))
    with Progress(console=Console(stderr=True)) as progress:
        for loss in losses:
            for seed in range(settings.seed, settings.seed + seeds):
                task = progress.add_task(f"{loss}, seed {seed}", total=total)
                chosen = for_loss(settings, loss).model_copy(update={"seed": seed})
                advance = partial(progress.advance, task)
                done = run_task(chosen, schema, batches, balances, choose_device(settings.device), advance)
                answers.setdefault(loss, done)
                runs += [{"loss": loss, "seed": seed, "balance": b, **done.summary(b)} for b in balances]
    return runs, answers


def _table(report: Report, runs: Sequence[dict[str, Any]], losses: Sequence[str], balances: Sequence[float]) -> str:
    from rich.console import Console
    from rich.table import Table

    from trainer.evaluation import averaged

    seeds = len({run["seed"] for run in runs})
    table = Table(title=report.title + (f"; means over {seeds} seeds" if seeds > 1 else ""))
    for heading in ("loss", "b", *report.columns.values()):
        table.add_column(heading, justify="left" if heading == "loss" else "right")
    for loss in losses:
        for balance in balances:
            means = averaged([run for run in runs if run["loss"] == loss and run["balance"] == balance])
            cells = (_figure(means[name], report.digits) for name in report.columns)
            table.add_row(loss, f"{balance:g}", *cells)
    constant = runs[0].get("constant_balanced_mae")
    console = Console()
    console.width = max(console.width, LEAST_WIDTH)
    with console.capture() as captured:
        console.print(table)
        for note in report.notes:
            console.print(note)
        best = f"the best constant answer, chosen in hindsight: balanced MAE {_figure(constant)}"
        console.print(best if constant else "")
    return captured.get().rstrip()


def _figure(value: float | None, digits: str = ".4g") -> str:
    """So many digits, or all before the point; an exponent would say less in more letters."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:{digits}}"


def _draw(path: Path, answers: Mapping[str, "Answers | ClassAnswers"], label: str) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None
    import numpy as np

    figure, (quality, counts) = plt.subplots(2, 1, sharex=True, height_ratios=[3, 1], figsize=(8, 6), layout="tight")
    for loss, answer in answers.items():
        curves = answer.curves(REGIONS)
        for balance, values in curves.values.items():
            quality.plot(curves.places, values, marker=".", label=f"{loss}, balance {balance:g}")
    places = np.asarray(curves.places)
    numbers = places if places.dtype.kind == "f" else np.arange(len(places))
    counts.bar(curves.places, curves.rows, width=0.9 * float(np.ptp(numbers)) / max(1, len(numbers)), color="0.6")
    quality.set(ylabel=curves.measure, title=f"{curves.measure.capitalize()}, each row predicted before it was learned")
    quality.legend()
    quality.grid(alpha=0.3)
    counts.set(xlabel=label, ylabel="rows", yscale="log")
    figure.savefig(path, dpi=120)
    plt.close(figure)
