"""How well the default model learns real streams, beside plain losses at their best: python -m tests.benchmarks.quality

Three streams, prequential: each row is predicted before it is learned from. The model is the default one, answering at
the balances 0, .5 and 1. The baselines are MSE, L1 and Huber with the same body, replay and steps, each with learning
rate 1e-3 and 2e-3, with and without averaged weights. For each metric they stand with whichever of the twelve is best
at it on the mean of the seeds, so none of them has to be good at all.

What is to hold: at balance 0 neither MAE nor RMSE (of the predicted mean) is above the best baseline's; at balance 1
the balanced MAE is lower by the share in `STREAMS`; of the labels in the second half 89 to 91% lie in their 90%
intervals. With fewer rows or seeds than the whole the same is printed, but says little.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from trainer.batching import Batch, Batcher, Record
from trainer.config import Settings
from trainer.datasets import DATASETS, FLIGHTS_FEATURES, FLIGHTS_LABEL, records
from trainer.evaluation import averaged, for_loss, run
from trainer.files import as_json
from trainer.schema import FeatureSchema

BALANCES = (0.0, 0.5, 1.0)
LOSSES = ("mse", "l1", "huber")
LEARNING_RATES = (1e-3, 2e-3)
AVERAGING = (0.98, 0.0)  # 0: the averaged weights are the current ones
COVERAGE = (0.89, 0.91)
METRICS = ("mae", "rmse", "balanced_mae")


class Stream(NamedTuple):
    """A real stream, and what is to be shown on it."""

    dataset: str
    rows: int
    label: str
    features: Mapping[str, str]
    lower: float  # share by which the balanced MAE at balance 1 is to be below the best baseline's


STREAMS = {
    "flights without dep_delay": Stream(
        "flights", 60_000, FLIGHTS_LABEL, {n: k for n, k in FLIGHTS_FEATURES.items() if n != "dep_delay"}, 0.28
    ),
    "flights": Stream("flights", 60_000, FLIGHTS_LABEL, FLIGHTS_FEATURES, 0.03),
    "diamonds": Stream(
        "diamonds",
        53_940,
        "price",
        {
            **dict.fromkeys(("carat", "depth", "table", "x", "y", "z"), "numeric"),
            **dict.fromkeys(("cut", "color", "clarity"), "categorical"),
        },
        0.12,
    ),
}


class Goal(NamedTuple):
    """One thing that is to hold."""

    what: str
    measured: float
    least: float
    most: float

    @property
    def reached(self) -> bool:
        return self.least <= self.measured <= self.most


def settings_of(label: str, features: Mapping[str, str]) -> Settings:
    """The defaults for a stream."""
    kafka = {"bootstrap_servers": ["127.0.0.1:1"], "topic": "none"}
    return Settings(device="cpu", kafka=kafka, schema={"label": label, "features": features})


def batches_of(settings: Settings, rows: Iterable[Mapping[str, Any]]) -> tuple[FeatureSchema, list[Batch]]:
    """Records as the learner takes them, with the schema that they were decoded by."""
    schema = FeatureSchema.of(settings)
    batcher = Batcher(schema, settings.batch.size)
    batches = list(batcher.add(Record(0, n, 0.0, None, as_json(dict(row))) for n, row in enumerate(rows)))
    return schema, [*batches, batcher.flush()] if batcher.pending else batches


def variants(settings: Settings) -> dict[str, Settings]:
    """The model, `ours`, and the baselines by their names."""
    found = {"ours": settings}
    for loss, lr, averaging in itertools.product(LOSSES, LEARNING_RATES, AVERAGING):
        plain = for_loss(settings, loss)
        learner = plain.learner.model_copy(update={"lr": lr, "weight_averaging": averaging})
        name = f"{loss} {lr:g} {'averaged' if averaging else 'current'}"
        found[name] = plain.model_copy(update={"learner": learner})
    return found


def measure(stream: Stream, rows: int, seeds: int, advance: Callable[[], None]) -> list[dict[str, Any]]:
    """Runs every variant with every seed; one result for each and each balance, baselines at balance 0 alone."""
    settings = settings_of(stream.label, stream.features)
    schema, batches = batches_of(settings, islice(records(DATASETS[stream.dataset]()), min(rows, stream.rows)))
    runs = []
    for name, variant in variants(settings).items():
        balances = BALANCES if name == "ours" else (0.0,)
        for seed in range(seeds):
            chosen = variant.model_copy(update={"seed": seed})
            answers = run(chosen, schema, batches, balances, torch.device("cpu"), lambda learned: None)
            for balance in balances:
                found = answers.summary(balance)
                runs.append({"variant": name, "seed": seed, "balance": balance, **found})
                runs[-1]["rows_per_second"] = answers.rows_per_second
            advance()
    return runs


def means(runs: Sequence[Mapping[str, Any]], variant: str, balance: float) -> dict[str, float]:
    """Means over seeds; NaN for what too few rows say nothing of."""
    found = averaged([run for run in runs if run["variant"] == variant and run["balance"] == balance])
    return {name: math.nan if value is None else value for name, value in found.items()}


def best_baselines(runs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, float]]:
    """For each metric the baseline that is best at it, and its mean over seeds."""
    names = {r["variant"] for r in runs} - {"ours"}
    figures = {name: means(runs, name, 0.0) for name in sorted(names)}
    return {
        metric: min(((name, of[metric]) for name, of in figures.items()), key=lambda pair: pair[1])
        for metric in METRICS
    }


def judge(stream: Stream, runs: Sequence[Mapping[str, Any]]) -> list[Goal]:
    """What is to hold on a stream, and what was measured: ratios to the best baselines, and the coverage."""
    best = {metric: value for metric, (_, value) in best_baselines(runs).items()}
    natural, balanced = means(runs, "ours", 0.0), means(runs, "ours", 1.0)
    return [
        Goal("MAE at balance 0, of the best baseline's", natural["mae"] / best["mae"], 0, 1),
        Goal("RMSE at balance 0, of the best baseline's", natural["rmse"] / best["rmse"], 0, 1),
        Goal(
            "balanced MAE at balance 1, of the best baseline's",
            balanced["balanced_mae"] / best["balanced_mae"],
            0,
            1 - stream.lower,
        ),
        Goal("coverage of 90% intervals, second half", natural["coverage_second_half"], *COVERAGE),
    ]


def show(console: Console, name: str, stream: Stream, runs: Sequence[Mapping[str, Any]]) -> None:
    """Prints a stream's errors, and beside them what is to hold."""
    table = Table(title=f"{name}: prequential errors, label units")
    for heading in ("", "MAE", "RMSE", "balanced MAE", "rows a second"):
        table.add_column(heading, justify="left" if not heading else "right")
    for balance in BALANCES:
        of = means(runs, "ours", balance)
        table.add_row(
            f"ours, balance {balance:g}", *(f"{of[m]:,.2f}" for m in METRICS), f"{of['rows_per_second']:,.0f}"
        )
    for metric, (baseline, value) in best_baselines(runs).items():
        cells = [f"{value:,.2f}" if metric == column else "" for column in METRICS]
        table.add_row(baseline, *cells, f"{means(runs, baseline, 0.0)['rows_per_second']:,.0f}")
    console.print(table)
    for goal in judge(stream, runs):
        wanted = f"at most {goal.most:g}" if not goal.least else f"{goal.least:g} to {goal.most:g}"
        verdict = "[green]reached[/]" if goal.reached else "[red]missed[/] "
        console.print(f"{verdict} {goal.what}: {goal.measured:.4f} ({wanted})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all runs there, after each stream")
    parser.add_argument("--rows", type=int, default=60_000, help="of each stream at most")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--streams", default=",".join(STREAMS), help="by commas")
    arguments = parser.parse_args()
    chosen = [name.strip() for name in arguments.streams.split(",")]
    if unknown := set(chosen) - set(STREAMS):
        parser.error(f"there is no stream {', '.join(sorted(unknown))}; there are {', '.join(STREAMS)}")
    torch.set_num_threads(1)
    console = Console()
    report: dict[str, Any] = {"rows": arguments.rows, "seeds": arguments.seeds, "streams": {}}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        for name in chosen:
            stream = STREAMS[name]
            runs_each = 1 + len(LOSSES) * len(LEARNING_RATES) * len(AVERAGING)
            task = progress.add_task(name, total=arguments.seeds * runs_each)
            runs = measure(stream, arguments.rows, arguments.seeds, lambda task=task: progress.advance(task))  # type: ignore[misc]
            show(console, name, stream, runs)
            goals = [{**goal._asdict(), "reached": goal.reached} for goal in judge(stream, runs)]
            best = {metric: {"baseline": b, "value": v} for metric, (b, v) in best_baselines(runs).items()}
            report["streams"][name] = {"best": best, "goals": goals, "runs": runs}
            if arguments.json:
                arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
