"""How well the default model learns real streams, beside plain losses at their best: python -m tests.benchmarks.quality

Four streams, prequential: each row is predicted before it is learned from. The model is the default one, answering at
the balances 0, .5 and 1. The baselines are MSE, L1 and Huber with the same body, replay and steps, each with learning
rate 1e-3 and 2e-3, with and without averaged weights. For each metric they stand with whichever of the twelve is best
at it on the mean of the seeds, so none of them has to be good at all. River and Vowpal Wabbit stand beside them where
they are installed (`pip install 'tailstream[rivals]'`); River's forest, which learns some 200 rows a second, on the
first rows alone, with the model's errors on those.

What is to hold: at balance 0 neither MAE nor RMSE (of the predicted mean) is above the best baseline's; at balance 1
the balanced MAE is lower by the share in `STREAMS`; of the labels in the second half 89 to 91% lie in their 90%
intervals. With fewer rows or seeds than the whole the same is printed, but says little.

Runs take an hour. Each is written to a file of JSON lines as it ends, and one that stands there already, with the same
settings, is not done again; so it can be stopped at any time and gone on with. Rows a second are those of the process
while others may run beside it: for speed itself see `tailstream evaluate` on an idle machine.
"""

import argparse
import functools
import itertools
import json
import math
import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tests.benchmarks.libraries import LIBRARIES, SLOW_LIBRARIES, predictions
from trainer.batching import Batch, Batcher, Record
from trainer.config import Settings
from trainer.datasets import (
    DATASETS,
    FLIGHTS_FEATURES,
    FLIGHTS_LABEL,
    INCOMES_FEATURES,
    INCOMES_LABEL,
    records,
)
from trainer.evaluation import averaged, balanced_mae, for_loss, run
from trainer.files import as_json
from trainer.schema import FeatureSchema

BALANCES = (0.0, 0.5, 1.0)
LOSSES = ("mse", "l1", "huber")
LEARNING_RATES = (1e-3, 2e-3)
AVERAGING = (0.98, 0.0)  # 0: the averaged weights are the current ones
COVERAGE = (0.89, 0.91)
METRICS = ("mae", "rmse", "balanced_mae")
FIRST_ROWS = 10_000  # that the slow library learns


class Stream(NamedTuple):
    """A real stream, and what is to be shown on it."""

    dataset: str
    rows: int  # all there are
    label: str
    features: Mapping[str, str]
    lower: float  # share by which the balanced MAE at balance 1 is to be below the best baseline's


STREAMS = {
    "flights without dep_delay": Stream(
        "flights", 327_346, FLIGHTS_LABEL, {n: k for n, k in FLIGHTS_FEATURES.items() if n != "dep_delay"}, 0.28
    ),
    "flights": Stream("flights", 327_346, FLIGHTS_LABEL, FLIGHTS_FEATURES, 0.03),
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
    "incomes": Stream("incomes", 37_887, INCOMES_LABEL, INCOMES_FEATURES, 0.0),
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


class Job(NamedTuple):
    """One run: what learns which stream, with which seed."""

    stream: str
    rows: int
    variant: str
    seed: int

    def settings(self) -> dict[str, Any]:
        """All that the result depends on, but for the code."""
        stream = STREAMS[self.stream]
        found = variants(settings_of(stream.label, stream.features)).get(self.variant)
        tables = {} if found is None else found.model_dump(mode="json", include={"batch", "learner", "model"})
        return {**self._asdict(), **tables}


def jobs_of(streams: Sequence[str], rows: int, seeds: int, libraries: Iterable[str]) -> list[Job]:
    """All runs there are to do, seed by seed; libraries have one seed, as most of them are not random."""
    found = []
    for seed, name in itertools.product(range(seeds), streams):
        stream = STREAMS[name]
        found += [Job(name, rows, variant, seed) for variant in variants(settings_of(stream.label, stream.features))]
    return [*found, *(Job(name, rows, library, 0) for library in libraries for name in streams)]


@functools.cache
def loaded(name: str, rows: int) -> tuple[FeatureSchema, list[Batch]]:
    """A stream's batches, made once a process."""
    stream = STREAMS[name]
    taken = islice(records(DATASETS[stream.dataset]()), min(rows, stream.rows))
    return batches_of(settings_of(stream.label, stream.features), taken)


def measure(job: Job) -> list[dict[str, Any]]:
    """Does a run; one result for each balance, baselines and libraries at the stream's own prior alone."""
    torch.set_num_threads(1)
    stream, said = STREAMS[job.stream], job._asdict()
    if job.variant in LIBRARIES or job.variant in SLOW_LIBRARIES:
        slow = job.variant in SLOW_LIBRARIES
        taken = islice(records(DATASETS[stream.dataset]()), min(FIRST_ROWS if slow else job.rows, stream.rows))
        regressor = {**LIBRARIES, **SLOW_LIBRARIES}[job.variant](stream.features, job.seed)
        label, found, speed = predictions(regressor, taken, stream.label)
        return [{**said, "balance": 0.0, **errors(label, found), "rows_per_second": speed}]
    given = variants(settings_of(stream.label, stream.features))[job.variant].model_copy(update={"seed": job.seed})
    schema, batches = loaded(job.stream, job.rows)
    balances = BALANCES if job.variant == "ours" else (0.0,)
    answers = run(given, schema, batches, balances, torch.device("cpu"), lambda learned: None)
    first = slice(FIRST_ROWS - given.batch.size)
    return [
        {
            **said,
            "balance": balance,
            **answers.summary(balance),
            "first": errors(answers.label[first], answers.median[balance][first], answers.mean[balance][first]),
            "rows_per_second": answers.rows_per_second,
        }
        for balance in balances
    ]


def errors(
    label: NDArray[np.float64], median: NDArray[np.float64], mean: NDArray[np.float64] | None = None
) -> dict[str, float | None]:
    """The three errors of answers (N,)."""
    absolute, squared = np.abs(label - median), np.square(label - (median if mean is None else mean))
    return {
        "mae": float(absolute.mean()),
        "rmse": float(np.sqrt(squared.mean())),
        "balanced_mae": balanced_mae(label, absolute),
    }


def known(path: Path, jobs: Sequence[Job]) -> dict[Job, list[dict[str, Any]]]:
    """The results of those jobs that stand in a file already, with the settings that they would have now."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    done = {json.dumps(line["settings"], sort_keys=True): line["results"] for line in lines}
    wanted = {job: json.dumps(job.settings(), sort_keys=True) for job in jobs}
    return {job: done[key] for job, key in wanted.items() if key in done}


def means(runs: Sequence[Mapping[str, Any]], variant: str, balance: float) -> dict[str, float]:
    """Means over seeds; NaN for what too few rows say nothing of."""
    found = averaged([run for run in runs if run["variant"] == variant and run["balance"] == balance])
    return {name: math.nan if value is None else value for name, value in found.items()}


def best_baselines(runs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, float]]:
    """For each metric the baseline that is best at it, and its mean over seeds."""
    names = {r["variant"] for r in runs} - {"ours", *LIBRARIES, *SLOW_LIBRARIES}
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
        table.add_row(f"ours, balance {balance:g}", *_cells(of))
    for metric, (baseline, value) in best_baselines(runs).items():
        cells = [f"{value:,.2f}" if metric == column else "" for column in METRICS]
        table.add_row(baseline, *cells, f"{means(runs, baseline, 0.0)['rows_per_second']:,.0f}")
    variants_run = {run["variant"] for run in runs}
    for library in LIBRARIES:
        if library in variants_run:
            table.add_row(library, *_cells(means(runs, library, 0.0)))
    for library in SLOW_LIBRARIES:
        if library in variants_run:
            table.add_row(f"{library}, first {FIRST_ROWS:,} rows", *_cells(means(runs, library, 0.0)))
            for balance in (0.0, 1.0):
                parts = [r["first"] for r in runs if r["variant"] == "ours" and r["balance"] == balance]
                cells = _cells({**averaged(parts), "rows_per_second": math.nan})
                table.add_row(f"ours, balance {balance:g}, on those", *cells)
    console.print(table)
    for goal in judge(stream, runs):
        wanted = f"at most {goal.most:g}" if not goal.least else f"{goal.least:g} to {goal.most:g}"
        verdict = "[green]reached[/]" if goal.reached else "[red]missed[/] "
        console.print(f"{verdict} {goal.what}: {goal.measured:.4f} ({wanted})")


def _cells(of: Mapping[str, float | None]) -> list[str]:
    """A row's figures; what there is none of stays empty."""
    found = [(math.nan if of[name] is None else of[name], digits) for name, digits in _COLUMNS.items()]
    return ["" if value is None or math.isnan(value) else f"{value:{digits}}" for value, digits in found]


_COLUMNS = {**dict.fromkeys(METRICS, ",.2f"), "rows_per_second": ",.0f"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write errors, goals and all runs there, at the end")
    parser.add_argument("--runs", type=Path, default=Path("quality-runs.jsonl"), help="keep each run there as it ends")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--rows", type=int, default=60_000, help="of each stream at most")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--streams", default=",".join(STREAMS), help="by commas")
    arguments = parser.parse_args()
    chosen = [name.strip() for name in arguments.streams.split(",")]
    if unknown := set(chosen) - set(STREAMS):
        parser.error(f"there is no stream {', '.join(sorted(unknown))}; there are {', '.join(STREAMS)}")
    packages = {"river": "River", "vowpalwabbit": "Vowpal Wabbit"}
    libraries = [
        library
        for package, start in packages.items()
        for library in (*LIBRARIES, *SLOW_LIBRARIES)
        if library.startswith(start) and find_spec(package)
    ]
    jobs = jobs_of(chosen, arguments.rows, arguments.seeds, libraries)
    results = known(arguments.runs, jobs)
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool,
        arguments.runs.open("a") as file,
    ):
        task = progress.add_task("", total=len(jobs), completed=len(results))
        running = {pool.submit(measure, job): job for job in jobs if job not in results}
        for future in as_completed(running):
            job = running[future]
            results[job] = future.result()
            file.write(json.dumps({"settings": job.settings(), "results": results[job]}) + "\n")
            file.flush()
            progress.advance(task)
    console = Console()
    report: dict[str, Any] = {"rows": arguments.rows, "seeds": arguments.seeds, "streams": {}}
    for name in chosen:
        stream, runs = STREAMS[name], [run for job in jobs if job.stream == name for run in results[job]]
        show(console, name, stream, runs)
        goals = [{**goal._asdict(), "reached": goal.reached} for goal in judge(stream, runs)]
        best = {metric: {"baseline": b, "value": v} for metric, (b, v) in best_baselines(runs).items()}
        report["streams"][name] = {"best": best, "goals": goals, "runs": runs}
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
