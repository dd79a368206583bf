"""The trainer's commands. Each imports what it needs when it runs, so that `--help` answers at once."""

import os
import signal
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from trainer import cli_dead_letters, cli_snapshots
from trainer.cli_evaluate import evaluate
from trainer.cli_init import init
from trainer.command import ConfigFile, explained, load_settings, say


class DatasetName(StrEnum):
    """Data sets that `dataset` can write."""

    flights = "flights"
    diamonds = "diamonds"
    portal = "portal"
    incomes = "incomes"


@explained
def train(config: ConfigFile) -> None:
    """Learn from the topic until SIGTERM or Ctrl-C, then save and stop.

    Exit codes: 0 stopped cleanly, 2 configuration, 3 the stop took longer than trainer.stop_grace_s, 4 Kafka,
    5 snapshots, 130 a second signal.
    """
    _stop_cleanly_while_starting()
    settings = load_settings(config)  # before the imports that take seconds: a typo is better heard of now
    from trainer.process import run

    run(settings)


@explained
def publish(
    file: Annotated[Path, typer.Argument(help="JSON lines or CSV, .gz too; - is standard input.", allow_dash=True)],
    config: ConfigFile,
    rate: Annotated[float | None, typer.Option(help="Records a second at most.", min=0.001)] = None,
    partitions: Annotated[int, typer.Option(help="Of the topic, if it has to be made; -1: the broker's default.")] = -1,
) -> None:
    """Send a data file to the topic, keyed by the schema's id."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from trainer.files import read_values
    from trainer.publish import publish as send
    from trainer.schema import FeatureSchema

    settings = load_settings(config)
    schema = FeatureSchema.of(settings)
    console = Console(stderr=True)
    with Progress(
        TextColumn("publishing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as bar:
        task = bar.add_task("publish", total=None)
        done = send(
            settings,
            schema,
            read_values(file, schema),
            records_per_s=rate,
            partitions=partitions,
            progress=lambda sent: bar.update(task, completed=sent),
        )
        bar.update(task, total=done.sent, completed=done.sent)
    unkeyed = f", {done.unkeyed} of them without a key" if done.unkeyed else ""
    say(f"published {done.sent} records to {settings.kafka.topic}{unkeyed}")


@explained
def dataset(
    name: Annotated[DatasetName, typer.Argument(help="Which data set.")],
    out: Annotated[Path, typer.Argument(help="File to write, JSON lines.", dir_okay=False)],
) -> None:
    """Write a real data set that ships in a Python package as JSON lines."""
    from trainer.datasets import DATASETS, write_jsonl

    say(f"wrote {write_jsonl(DATASETS[name](), out)} records to {out}")


@explained
def check(config: ConfigFile) -> None:
    """Look whether everything a trainer needs is there: one line each, and what to do where it is not."""
    from trainer.checks import run_checks

    if not run_checks(load_settings(config), say):
        raise typer.Exit(1)


def _stop_cleanly_while_starting() -> None:
    """Makes a signal that comes during the imports, which take seconds, a clean end: nothing has been learned yet."""

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(0)  # an exception might be swallowed by whatever is being imported

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


def register(app: typer.Typer) -> None:
    """Adds the trainer's commands to an application."""
    for command in (init, evaluate, check, publish, train, dataset):
        app.command()(command)
    app.add_typer(cli_snapshots.app, name="snapshots")
    app.add_typer(cli_dead_letters.app, name="dead-letters")
