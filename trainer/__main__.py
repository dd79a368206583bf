"""`python -m trainer --config FILE` is `tailstream train --config FILE`."""

import typer

from trainer.cli import train

typer.run(train)
