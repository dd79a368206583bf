"""The manifest: what a snapshot says of itself, sealed by its own digest, and whether it fits a configuration."""

import hashlib
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.batching import PartitionProgress
from trainer.config import LearnerSettings, ModelSettings, Settings
from trainer.errors import SnapshotCorrupt, SnapshotMismatch

FORMAT_VERSION: Final = 1
DIGEST_KEY: Final = b'"sha256": "'  # its last occurrence is the manifest's own


class FileEntry(BaseModel):
    """What a file of the snapshot must be."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    sha256: str


class Sample(BaseModel):
    """A newest label beside what the model said before it learned it."""

    model_config = ConfigDict(frozen=True)

    time_s: float
    label: float | str
    prediction: float | str


class Manifest(BaseModel):
    """What a snapshot says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    format_version: Literal[1] = FORMAT_VERSION
    version: int
    created_s: float  # seconds since the epoch
    step: int  # optimiser steps taken
    samples: int  # rows trained on
    cluster_id: str | None
    topic: str
    topic_id: str | None
    partitions: dict[int, PartitionProgress]
    lag_records: int | None  # records in the topic that were not yet trained on, None where the broker did not say
    newest_append_s: float  # the youngest trained record's timestamp
    task: str
    record_schema: dict[str, Any]
    model: dict[str, Any]
    learner: dict[str, Any]
    healthy: bool
    train_loss: float | None
    noise_sigma: float | None  # label standard deviations
    noise_sigma_label_units: float | None
    samples_per_second: float
    nonfinite_steps: int
    drift_alarms: int = 0  # since the stream began
    metrics: dict[str, Any]  # prequential, see trainer.prequential
    newest: list[Sample]
    files: dict[str, FileEntry] = {}
    generation: int = 0  # rollbacks so far: progress only grows within one
    copy_of: int | None = None  # the version that a rollback went back to
    fence: int = 0  # of the writer, in an object store: grows with each writer
    sha256: str = ""  # of the manifest's own bytes, with this field empty; the last one


def sealed(manifest: Manifest) -> tuple[Manifest, bytes]:
    """A manifest with its own digest, and the bytes to write: a flipped bit in it would move offsets, and shows."""
    digest = hashlib.sha256(_as_bytes(manifest.model_copy(update={"sha256": ""}))).hexdigest()
    manifest = manifest.model_copy(update={"sha256": digest})
    return manifest, _as_bytes(manifest)


def opened(data: bytes, version: int, where: str) -> Manifest:
    """The manifest of a version from its bytes.

    Raises:
        SnapshotCorrupt: it is not a manifest of a format known here, is another version's, or is not as it was written.
    """
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise SnapshotCorrupt(f"snapshot {version} has no valid manifest at {where}: {error}") from error
    if manifest.version != version:
        raise SnapshotCorrupt(f"{where} is the manifest of snapshot {manifest.version}: the folder was renamed")
    before, found, digest = data.rpartition(DIGEST_KEY)
    if manifest.sha256 != hashlib.sha256(before + found + digest[64:]).hexdigest():
        raise SnapshotCorrupt(f"{where} is not as it was written: its bytes do not match its own sha256")
    return manifest


def check_fits(manifest: Manifest, settings: Settings) -> None:
    """Whether a snapshot is of the model that the configuration describes.

    Raises:
        SnapshotMismatch: it is not; the message lists each difference.
    """
    differences = [
        f"  {name}: the store has {_get(stored, name)!r}, the configuration {_get(wanted, name)!r}"
        for stored, wanted in [(described(manifest), described(settings))]
        for name in sorted({*stored, *wanted})
        if _get(stored, name) != _get(wanted, name)
    ]
    if differences:
        raise SnapshotMismatch(
            f"snapshot {manifest.version} holds another model than the configuration describes:\n"
            + "\n".join(differences)
            + "\nput the setting back, or give the new model its own store.url"
        )


def described(source: Manifest | Settings) -> dict[str, Any]:
    """What must stay the same for a state to be loaded: by dotted name, as JSON values."""
    if isinstance(source, Settings):
        schema = source.record_schema.model_dump(mode="json")
        model, learner = source.model.model_dump(mode="json"), source.learner.model_dump(mode="json")
    else:
        # A store from before a setting was there was made as that setting's default says.
        schema = source.record_schema
        model = {**ModelSettings().model_dump(mode="json"), **source.model}
        learner = {**LearnerSettings().model_dump(mode="json"), **source.learner}
    return {
        "task": source.task,
        "schema.label": schema.get("label"),
        "schema.features (order)": list(schema.get("features", {})),
        **{f"schema.features.{name}": kind for name, kind in schema.get("features", {}).items()},
        **{f"model.{name}": value for name, value in model.items()},
        **{f"learner.{name}": learner.get(name) for name in ("loss", "sigma", "replay_rows")},
    }


def _as_bytes(manifest: Manifest) -> bytes:
    return manifest.model_dump_json(indent=1).encode()


def _get(table: dict[str, Any], name: str) -> Any:
    return table.get(name, "(absent)")
