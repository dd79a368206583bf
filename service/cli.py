"""The console script `tailstream`: the trainer's commands, and those that start processes."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from trainer.cli import register
from trainer.command import ConfigFile, explained, load_settings


class Task(StrEnum):
    """What a demo learns."""

    regression = "regression"
    classification = "classification"


app = typer.Typer(
    help="Train on a Kafka stream with a balanced loss; serve predictions from a model that is seconds old.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
register(app)


@app.command()
@explained
def serve(
    config: ConfigFile,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that answer; else service.workers.")] = None,
) -> None:
    """Answer predictions over HTTP from the newest snapshot, until SIGTERM or Ctrl-C."""
    from service.serve import serve as run

    settings = load_settings(config)
    if workers is not None:
        service = settings.service.model_copy(update={"workers": workers})
        settings = settings.model_copy(update={"service": service})
    run(settings)


@app.command()
@explained
def demo(
    task: Annotated[
        Task, typer.Option(help="Delays of 327,346 flights (a number), or species of 30,738 rodents (a class).")
    ] = Task.regression,
    rows: Annotated[int | None, typer.Option(min=1, help="Records to publish; all by default.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Records a second at most.")] = None,
    bootstrap_servers: Annotated[str | None, typer.Option(help="A Kafka to use; by default one is started.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the service.")] = 8000,
    data_dir: Annotated[Path | None, typer.Option(help="Empty folder to keep; a temporary one by default.")] = None,
    inject_bad: Annotated[int, typer.Option(min=0, help="Broken records to publish among them.")] = 0,
    kill_trainer_at: Annotated[
        int | None, typer.Option(min=1, help="SIGKILL the trainer after this many rows.")
    ] = None,
    exit_when_done: Annotated[bool, typer.Option("--exit-when-done", help="End when all is learned.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write a summary there.", dir_okay=False)] = None,
) -> None:
    """Watch a model learn a data set from a Kafka stream, and ask it for predictions."""
    from service.children import stop_as_by_ctrl_c
    from service.demo import DemoOptions, run_demo

    stop_as_by_ctrl_c()
    run_demo(
        DemoOptions(
            task=task.value,
            rows=rows,
            rate=rate,
            bootstrap_servers=bootstrap_servers,
            port=port,
            data_dir=data_dir,
            inject_bad=inject_bad,
            kill_trainer_at=kill_trainer_at,
            exit_when_done=exit_when_done,
            json_file=json_file,
        )
    )


def main() -> None:
    """Entry point of the console script."""
    app()
