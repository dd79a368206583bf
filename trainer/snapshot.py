"""Snapshots: all that resuming and predicting need, of one moment, in one folder that exists whole or not at all.

<store>/00000042/model.safetensors      what inference needs
                 training.safetensors   the rest of what resuming needs
                 manifest.json          written last: a folder without a valid one does not exist
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import safetensors
import safetensors.torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from trainer.batching import PartitionProgress
from trainer.config import LearnerSettings, ModelSettings, Settings
from trainer.errors import SnapshotCorrupt, SnapshotError, SnapshotMismatch, StoreLocked

FORMAT_VERSION: Final = 1
MODEL_FILE: Final = "model.safetensors"
TRAINING_FILE: Final = "training.safetensors"
MANIFEST_FILE: Final = "manifest.json"
ACTIVE_FILE: Final = "active.json"
LOCK_FILE: Final = ".lock"
TEMPORARY: Final = ".tmp-"
DIGEST_KEY: Final = b'"sha256": "'  # in the manifest; its last occurrence is the manifest's own
KEEP_NEWEST: Final = 5
KEEP_HOURLY_S: Final = 24 * 3600


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
    sha256: str = ""  # of the manifest's own bytes, with this field empty; the last one


class Snapshot(NamedTuple):
    """A verified snapshot, read into memory."""

    manifest: Manifest
    model: dict[str, Tensor]
    training: dict[str, Tensor]  # empty where only the model was asked for


class SnapshotStore:
    """A folder of snapshots on a disk. One process writes (`lock`), any number read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # Reading

    def versions(self) -> list[int]:
        """Versions that claim to exist, in ascending order; none where the folder is absent."""
        try:
            names = [name for name in os.listdir(self.path) if name.isdecimal()]
            return sorted(int(name) for name in names if (self.path / name / MANIFEST_FILE).exists())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise SnapshotError(f"the snapshot store {self.path} cannot be read: {error}") from error

    def manifest(self, version: int) -> Manifest:
        """The manifest of a version; its files are not looked at.

        Raises:
            SnapshotCorrupt: it is absent or not a manifest of a format known here.
        """
        path = self.folder(version) / MANIFEST_FILE
        try:
            data = path.read_bytes()
            manifest = Manifest.model_validate_json(data)
        except (OSError, ValidationError) as error:
            raise SnapshotCorrupt(f"snapshot {version} has no valid manifest at {path}: {error}") from error
        if manifest.version != version:
            raise SnapshotCorrupt(f"{path} is the manifest of snapshot {manifest.version}: the folder was renamed")
        if manifest.sha256 != _sha256_without_itself(data):
            raise SnapshotCorrupt(f"{path} is not as it was written: its bytes do not match its own sha256")
        return manifest

    def load(self, version: int, *, training: bool) -> Snapshot:
        """Reads and verifies a version.

        Args:
            version: which one.
            training: whether to read what resuming needs too.

        Raises:
            SnapshotCorrupt: a file is absent, or differs in size or SHA-256 from what the manifest says.
        """
        manifest = self.manifest(version)
        model = self._read(manifest, MODEL_FILE)
        return Snapshot(manifest, model, self._read(manifest, TRAINING_FILE) if training else {})

    def is_readable(self, version: int) -> bool:
        """Whether a version's manifest is there and valid; its files are not looked at."""
        try:
            self.manifest(version)
        except SnapshotCorrupt:
            return False
        return True

    def newest(self, *, training: bool) -> tuple[Snapshot | None, list[SnapshotCorrupt]]:
        """The newest valid snapshot, and what was wrong with the newer ones."""
        faults: list[SnapshotCorrupt] = []
        for version in reversed(self.versions()):
            try:
                return self.load(version, training=training), faults
            except SnapshotCorrupt as fault:
                faults.append(fault)
        return None, faults

    def folder(self, version: int) -> Path:
        """Where a version lies."""
        return self.path / f"{version:08d}"

    def _read(self, manifest: Manifest, name: str) -> dict[str, Tensor]:
        path = self.folder(manifest.version) / name
        entry = manifest.files.get(name)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise SnapshotCorrupt(f"snapshot {manifest.version} lacks {path}: {error}") from error
        if entry is None or entry.bytes != len(data) or entry.sha256 != hashlib.sha256(data).hexdigest():
            raise SnapshotCorrupt(f"{path} is not the file that the manifest of snapshot {manifest.version} describes")
        try:
            return safetensors.torch.load(data)
        except safetensors.SafetensorError as error:
            raise SnapshotCorrupt(f"{path} is not a safetensors file: {error}") from error

    # Writing

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Makes this process the store's only writer, and clears away what a crash left unfinished.

        Raises:
            StoreLocked: another process holds the lock; the message says which.
            SnapshotError: the folder cannot be made, written to or locked.
        """
        try:
            if not self.path.exists():
                self.path.mkdir(parents=True, exist_ok=True)
                _sync_folder(self.path.parent)
            handle = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise SnapshotError(f"the snapshot store {self.path} cannot be written to: {error}") from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise SnapshotError(
                        f"the snapshot store {self.path} cannot be locked against a second trainer: {error}; put it "
                        "on a file system that knows flock"
                    ) from error
                owner = os.read(handle, 1024).decode(errors="replace") or "unknown"
                raise StoreLocked(
                    f"another trainer writes to {self.path} ({owner}): stop it, or give this one its own store.url"
                ) from None
            with suppress(OSError):  # a full disk is no reason not to start; only the owner's name is not there then
                os.truncate(handle, 0)
                os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
            for leftover in self.path.glob(f"{TEMPORARY}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield
        finally:
            os.close(handle)

    def write(self, manifest: Manifest, model: dict[str, Tensor], training: dict[str, Tensor]) -> Manifest:
        """Writes a snapshot as the next version; whoever reads sees all of it or nothing.

        Args:
            manifest: as it should be; version, time and files are filled in here.
            model: tensors for `model.safetensors`, on the CPU.
            training: tensors for `training.safetensors`, on the CPU.

        Raises:
            OSError: the disk refused; nothing of the snapshot is left.
        """
        tensors = {MODEL_FILE: model, TRAINING_FILE: training}
        return self._write(manifest, {name: safetensors.torch.save(part) for name, part in tensors.items()})

    def rollback(self, version: int) -> Manifest:
        """Writes a version once more, as the newest: versions only grow, and the next trainer resumes from there.

        The caller holds the lock.

        Raises:
            SnapshotCorrupt: the version is not there whole.
            OSError: the disk refused; nothing is changed.
        """
        manifest = self.load(version, training=True).manifest
        generation = 1 + max(self.manifest(other).generation for other in self.versions() if self.is_readable(other))
        contents = {name: (self.folder(version) / name).read_bytes() for name in manifest.files}
        return self._write(manifest.model_copy(update={"generation": generation, "copy_of": version}), contents)

    def pin(self, version: int | None) -> None:
        """Makes the service stay with a version, or with None follow the newest again.

        Raises:
            SnapshotCorrupt: there is no such version, or it is not whole.
            OSError: the disk refused; nothing is changed.
        """
        before = self.active()
        if version is not None:
            self.load(version, training=False)
        self._activate(version)
        if version is not None:
            try:
                self.load(version, training=False)  # the trainer may have removed it before it was pinned
            except SnapshotCorrupt:
                self._activate(before)
                raise

    def _activate(self, version: int | None) -> None:
        target = self.path / ACTIVE_FILE
        if version is None:
            target.unlink(missing_ok=True)
        else:
            temporary = self.path / f"{ACTIVE_FILE}.{os.getpid()}"
            temporary.unlink(missing_ok=True)  # of one that died here, with a number that comes again in a container
            try:
                _write_durably(temporary, json.dumps({"version": version}).encode())
                temporary.replace(target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        _sync_folder(self.path)

    def _write(self, manifest: Manifest, contents: Mapping[str, bytes]) -> Manifest:
        version = 1 + max((int(name) for name in os.listdir(self.path) if name.isdecimal()), default=0)
        temporary = self.path / f"{TEMPORARY}{version:08d}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            files = {}
            for name, data in contents.items():
                files[name] = FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
                _write_durably(temporary / name, data)
            changes = {"version": version, "created_s": time.time(), "files": files}
            manifest, data = _sealed(manifest.model_copy(update=changes))
            _write_durably(temporary / MANIFEST_FILE, data)
            _sync_folder(temporary)
            temporary.rename(self.folder(version))
            _sync_folder(self.path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return manifest

    def prune(self, now_s: float) -> list[int]:
        """Removes all but the newest five, the newest healthy one, the first of each hour of the last day, the active.

        Returns:
            The versions removed.

        Raises:
            SnapshotError: it cannot be read which one is active; none is removed.
        """
        versions = self.versions()
        keep = {*versions[-KEEP_NEWEST:], self._newest_healthy(versions), self.active()}
        hours: set[int] = set()
        for version in versions:
            try:
                written_s = (self.folder(version) / MANIFEST_FILE).stat().st_mtime
            except FileNotFoundError:
                continue
            hour = int(written_s // 3600)
            if now_s - written_s <= KEEP_HOURLY_S and hour not in hours:
                hours.add(hour)
                keep.add(version)
        removed = [version for version in versions if version not in keep]
        for version in removed:
            folder = self.folder(version)
            (folder / MANIFEST_FILE).unlink(missing_ok=True)  # first, so that a half-removed folder does not exist
            shutil.rmtree(folder, ignore_errors=True)
        return removed

    def _newest_healthy(self, versions: Sequence[int]) -> int | None:
        """What a service that starts now would answer with, however long ago the model went astray."""
        for version in reversed(versions):
            with suppress(SnapshotCorrupt):
                if self.manifest(version).healthy:
                    return version
        return None

    def active(self) -> int | None:
        """The version that the service has pinned, None where it follows the newest.

        Raises:
            SnapshotError: it cannot be read, so there may be one.
        """
        path = self.path / ACTIVE_FILE
        try:
            version = json.loads(path.read_text())["version"]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SnapshotError(f"{path} cannot be read: {error}") from error
        except (ValueError, KeyError, TypeError):
            return None
        return version if isinstance(version, int) else None


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


def _sealed(manifest: Manifest) -> tuple[Manifest, bytes]:
    """A manifest with its own digest, and the bytes to write: a flipped bit in it would move offsets, and shows."""
    digest = hashlib.sha256(_manifest_bytes(manifest.model_copy(update={"sha256": ""}))).hexdigest()
    sealed = manifest.model_copy(update={"sha256": digest})
    return sealed, _manifest_bytes(sealed)


def _manifest_bytes(manifest: Manifest) -> bytes:
    return manifest.model_dump_json(indent=1).encode()


def _sha256_without_itself(data: bytes) -> str:
    before, found, digest = data.rpartition(DIGEST_KEY)
    return hashlib.sha256(before + found + digest[64:]).hexdigest()


def _get(table: dict[str, Any], name: str) -> Any:
    return table.get(name, "(absent)")


def _write_durably(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
