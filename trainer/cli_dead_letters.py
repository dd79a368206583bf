"""`tailstream dead-letters`: what was rejected and why, and sending it back once it can be learned from."""

from collections import Counter, deque
from typing import Annotated

import typer

from trainer.command import ConfigFile, explained, load_settings, say

app = typer.Typer(help="List rejected records, and send them back.", no_args_is_help=True)
Reason = Annotated[str | None, typer.Option(help="Only letters with this reason, for instance wrong_type.")]


@app.command("list")
@explained
def list_letters(
    config: ConfigFile,
    reason: Reason = None,
    limit: Annotated[int, typer.Option(help="Letters to show, the newest; all are counted.", min=0)] = 20,
) -> None:
    """List the newest rejected records with their partition, offset and the reason; count all of them by reason."""
    from trainer.letter_replay import read_letters

    settings = load_settings(config).kafka
    newest = deque[str](maxlen=limit)
    reasons: Counter[str] = Counter()
    for letter in read_letters(settings):
        if reason is None or letter.reason == reason:
            reasons[letter.reason] += 1
            newest.append(f"{letter.partition:>9} {letter.offset:>12}  {letter.message}")
    if newest:
        say(f"{'partition':>9} {'offset':>12}  reason")
    for line in newest:
        say(line)
    by_reason = ", ".join(f"{count} {name}" for name, count in reasons.most_common())
    say(f"{reasons.total()} dead letters of {settings.topic}" + (f": {by_reason}" if by_reason else ""))


@app.command()
@explained
def replay(
    config: ConfigFile,
    reason: Reason = None,
    again: Annotated[bool, typer.Option("--again", help="Those too that were replayed before.")] = False,
) -> None:
    """Send rejected records back to their topic, with key, value and original headers, without the reason.

    Each is sent once, unless --again asks for more. What still cannot be learned from is rejected anew.
    """
    from trainer.letter_replay import replay as send

    settings = load_settings(config).kafka
    done = send(settings, reason, again=again)
    rest = [
        *([f"{done.before} were replayed before (--again sends them too)"] if done.before else []),
        *([f"{done.others} have other reasons"] if done.others else []),
        *([f"{done.omitted} were too large to be kept whole"] if done.omitted else []),
    ]
    say(f"replayed {done.sent} dead letters to {settings.topic}" + (f"; {', '.join(rest)}" if rest else ""))
