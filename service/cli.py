"""The console script `tailstream`: the trainer's commands, and those that start processes."""

import typer

from trainer.cli import ConfigFile, explained, register

app = typer.Typer(
    help="Train on a Kafka stream with a balanced loss; serve predictions from a model that is seconds old.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
register(app)


@app.command()
@explained
def serve(config: ConfigFile) -> None:
    """Answer predictions over HTTP from the newest snapshot, until SIGTERM or Ctrl-C."""
    from service.serve import serve as run
    from trainer.config import load
    from trainer.log import configure_logging

    settings = load(config)
    configure_logging(settings.trainer.log_format)
    run(settings)


def main() -> None:
    """Entry point of the console script."""
    app()
