"""What every command has: its configuration option, and errors said in a line instead of a traceback."""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from trainer.errors import TailstreamError

if TYPE_CHECKING:
    from trainer.config import Settings

ConfigFile = Annotated[Path, typer.Option("--config", help="Configuration file (TOML).", dir_okay=False)]
P = ParamSpec("P")


def explained(command: Callable[P, None]) -> Callable[P, None]:
    """A command that ends an expected error with its message and its exit code, not with a traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except TailstreamError as error:
            print(f"error: {error}", file=sys.stderr)  # noqa: T201 - what a command says is its output
            raise typer.Exit(error.exit_code) from error

    return run


def load_settings(path: Path) -> "Settings":
    """The configuration, with logging set up as it says."""
    from trainer.config import load
    from trainer.log import configure_logging

    settings = load(path)
    configure_logging(settings.trainer.log_format)
    return settings


def say(line: str) -> None:
    """Prints a line of a command's output."""
    print(line)  # noqa: T201
