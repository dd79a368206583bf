"""`tailstream init`: a configuration for a data file, written by looking at it."""

from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from trainer.command import explained, say
from trainer.errors import ConfigError


@explained
def init(
    file: Annotated[Path, typer.Argument(help="JSON lines or CSV, .gz too; - is standard input.", allow_dash=True)],
    label: Annotated[str | None, typer.Option(help="Field to learn, by its dotted path.")] = None,
    out: Annotated[Path, typer.Option(help="Where to write; - is standard output.", allow_dash=True)] = Path(
        "tailstream.toml"
    ),
    rows: Annotated[int | None, typer.Option(min=1, help="Read only the first rows.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Look at a data file and write a configuration for it, with comments on what was seen and what is unsure.

    The whole file is read, and some 20,000 of its rows are looked at: the first 10,000, and others drawn by chance.
    """
    from trainer.config_text import config_text
    from trainer.fields import draw_sample
    from trainer.files import is_csv, read_lines
    from trainer.proposal import propose

    to_screen = str(out) == "-"
    if not to_screen and not force and out.exists():
        raise ConfigError(f"{out} is there already: --force replaces it, --out writes another file")
    sample = draw_sample(islice(read_lines(file), rows), csv=is_csv(file))
    try:
        proposal = propose(sample, label)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    looked_at = f"{sample.rows:,} rows of {file.name}"
    if len(sample.records) < sample.rows:
        looked_at += f", {len(sample.records):,} of them looked at"
    text = config_text(proposal, file.name, f"It has read {looked_at}.")
    if to_screen:
        say(text.rstrip("\n"))
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror or error}") from error
    used = sum(not feature.left_out for feature in proposal.features)
    say(f"wrote {out}: {proposal.label} from {used} fields, by {looked_at}")
    for note in proposal.notes:
        say(f"  look at it: {note}")
    say(f"next: tailstream evaluate {quote(str(file))} --config {quote(str(out))}")
