"""`tailstream snapshots`: look at a store, check it, choose what the service answers with, go back."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.command import ConfigFile, explained, load_settings, say

if TYPE_CHECKING:
    from trainer.snapshot import SnapshotStore

app = typer.Typer(help="List, check, pin and roll back snapshots.", no_args_is_help=True)
Version = Annotated[int, typer.Argument(help="Version of a snapshot.", min=1)]


@app.command("list")
@explained
def list_snapshots(config: ConfigFile) -> None:
    """List the versions in the store, oldest first."""
    from trainer.errors import SnapshotCorrupt

    store = _store(config)
    pinned = store.active()
    say(f"{'version':>8}  {'written (UTC)':19}  {'samples':>12}  {'MB':>8}  remarks")
    for version in store.versions():
        try:
            manifest = store.manifest(version)
        except SnapshotCorrupt as error:
            say(f"{version:>8}  broken: {error}")
            continue
        written = datetime.fromtimestamp(manifest.created_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
        size_mb = sum(entry.bytes for entry in manifest.files.values()) / 1e6
        remarks = [
            *(["pinned"] if version == pinned else []),
            *(["unhealthy"] if not manifest.healthy else []),
            *([f"rollback to {manifest.copy_of}"] if manifest.copy_of else []),
        ]
        say(f"{version:>8}  {written:19}  {manifest.samples:>12}  {size_mb:>8.2f}  {', '.join(remarks)}".rstrip())


@app.command()
@explained
def show(version: Version, config: ConfigFile) -> None:
    """Print the manifest of a version."""
    say(_store(config).manifest(version).model_dump_json(indent=1))


@app.command()
@explained
def verify(config: ConfigFile) -> None:
    """Check every file against its digest, and the counters of all versions against each other.

    Exit codes: 0 all is well, 5 something is not; the lines say what.
    """
    from trainer.audit import verify as look
    from trainer.errors import SnapshotError

    store = _store(config)
    checked = faulty = 0
    for verdict in look(store):
        checked += 1
        faulty += bool(verdict.faults)
        samples = f"{verdict.manifest.samples} samples" if verdict.manifest is not None else "unreadable"
        say(f"{'FAIL' if verdict.faults else 'ok  '} {verdict.version:>8}  {samples}")
        for fault in verdict.faults:
            say(f"              {fault}")
    if faulty:
        raise SnapshotError(
            f"{faulty} of {checked} snapshots in {store.where} are not what they say; a trainer passes over those "
            "whose files are damaged, and `tailstream snapshots rollback` goes back to one before the others"
        )
    say(f"{checked} snapshots, all whole, their counters agree")


@app.command()
@explained
def pin(
    config: ConfigFile,
    version: Annotated[int | None, typer.Argument(help="Version to stay with.", min=1)] = None,
    latest: Annotated[bool, typer.Option("--latest", help="Follow the newest again.")] = False,
) -> None:
    """Make the service answer with one version, or with --latest follow the newest again; the trainer goes on."""
    from trainer.errors import ConfigError, SnapshotError

    if latest == (version is not None):
        raise ConfigError("say which version to pin, or --latest to pin none")
    store = _store(config)
    try:
        store.pin(version)
    except OSError as error:
        raise SnapshotError(f"the pin could not be written to {store.where}: {error}") from error
    say("the service follows the newest snapshot" if version is None else f"the service stays with {version}")


@app.command()
@explained
def rollback(version: Version, config: ConfigFile) -> None:
    """Make the next trainer resume from a version, and the service answer with it; stop the trainer first.

    The version is written once more as the newest: the later ones stay where they are, and are resumed from no more.
    Records after its offsets are learned from again.
    """
    from trainer.errors import SnapshotError

    store = _store(config)
    with store.lock():
        try:
            manifest = store.rollback(version)
        except OSError as error:
            raise SnapshotError(f"the copy of {version} could not be written to {store.where}: {error}") from error
    say(f"version {manifest.version} is a copy of {version}: a trainer resumes from it, at {manifest.samples} samples")
    pinned = store.active()
    if pinned is not None:
        say(f"the service stays with {pinned}, which is pinned")


def _store(config: "ConfigFile") -> "SnapshotStore":
    from trainer.errors import SnapshotError
    from trainer.snapshot import open_store

    store = open_store(load_settings(config).store)
    if not store.storage.exists():
        raise SnapshotError(f"there is no snapshot store at {store.where}; see store.url")
    return store
