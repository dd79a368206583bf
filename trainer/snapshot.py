"""Snapshots: all that resuming and predicting need, of one moment, in one place that has it whole or not at all.

<store>/00000042/model.safetensors      what inference needs
                 training.safetensors   the rest of what resuming needs
                 manifest.json          written last: a folder without a valid one does not exist

Where they lie, on a disk or in an object store, is the matter of `trainer.storage`.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from trainer.config import StoreSettings
from trainer.disk_storage import DiskStorage
from trainer.errors import SnapshotCorrupt
from trainer.file_cache import FileCache
from trainer.manifest import FileEntry, Manifest, opened, sealed
from trainer.object_storage import ObjectStorage
from trainer.objects import Objects
from trainer.storage import MANIFEST_FILE, SnapshotKey, Storage

MODEL_FILE: Final = "model.safetensors"
TRAINING_FILE: Final = "training.safetensors"
KEEP_NEWEST: Final = 5
KEEP_HOURLY_S: Final = 24 * 3600


class Snapshot(NamedTuple):
    """A verified snapshot, read into memory."""

    manifest: Manifest
    model: dict[str, Tensor]
    training: dict[str, Tensor]  # empty where only the model was asked for


def open_store(settings: StoreSettings) -> "SnapshotStore":
    """The store that a configuration names; nothing is connected or made yet."""
    if settings.is_folder:
        return SnapshotStore(DiskStorage(settings.path))
    objects = Objects(settings.url, settings.options)
    cache = Path(settings.cache) if settings.cache else _cache_of_user(settings.url)
    return SnapshotStore(ObjectStorage(objects, settings.lease_s), FileCache(cache))


class SnapshotStore:
    """The snapshots of one model. One process writes (`lock`), any number read.

    Args:
        storage: where they lie; a path is a folder on a disk.
        cache: keeps models that have been read on this machine's disk, where the storage is far away.
    """

    def __init__(self, storage: Storage | Path, cache: FileCache | None = None) -> None:
        self.storage: Storage = DiskStorage(storage) if isinstance(storage, Path) else storage
        self._cache = cache
        self._healthy: dict[SnapshotKey, bool] = {}  # what manifests said of those that retention has looked at

    @property
    def where(self) -> str:
        """The place, for messages."""
        return self.storage.where

    # Reading

    def snapshots(self) -> list[SnapshotKey]:
        """What claims to exist, by ascending version; none where the place is absent.

        Raises:
            SnapshotError: the place cannot be read.
        """
        return self.storage.snapshots()

    def versions(self) -> list[int]:
        """Versions that claim to exist, in ascending order; none where the place is absent."""
        return [key.version for key in self.snapshots()]

    def key(self, version: int) -> SnapshotKey | None:
        """The key of a version; None where there is none of that number."""
        return next((key for key in self.snapshots() if key.version == version), None)

    def manifest(self, version: int) -> Manifest:
        """The manifest of a version; its files are not looked at.

        Raises:
            SnapshotCorrupt: it is absent or not a manifest of a format known here.
        """
        where = self.storage.locate(version, MANIFEST_FILE)
        try:
            data = self.storage.read(version, MANIFEST_FILE)
        except OSError as error:
            raise SnapshotCorrupt(f"snapshot {version} has no valid manifest at {where}: {error}") from error
        manifest = opened(data, version, where)
        fence = self.storage.fence(version)
        if fence is not None and manifest.fence != fence:
            raise SnapshotCorrupt(f"{where} is of a writer with fencing number {manifest.fence}, and not {fence}")
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
        model = self._tensors(manifest, MODEL_FILE)
        return Snapshot(manifest, model, self._tensors(manifest, TRAINING_FILE) if training else {})

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

    def active(self) -> int | None:
        """The version that the service has pinned, None where it follows the newest.

        Raises:
            SnapshotError: it cannot be read, so there may be one.
        """
        try:
            version = json.loads(self.storage.read_active() or b"null")["version"]
        except (ValueError, KeyError, TypeError):
            return None
        return version if isinstance(version, int) else None

    def _tensors(self, manifest: Manifest, name: str) -> dict[str, Tensor]:
        try:
            return safetensors.torch.load(self._read(manifest, name))
        except safetensors.SafetensorError as error:
            where = self.storage.locate(manifest.version, name)
            raise SnapshotCorrupt(f"{where} is not a safetensors file: {error}") from error

    def _read(self, manifest: Manifest, name: str) -> bytes:
        where = self.storage.locate(manifest.version, name)
        entry = manifest.files.get(name)
        cache = self._cache if name == MODEL_FILE else None
        if cache is not None and entry is not None and (cached := cache.get(entry.sha256)) is not None:
            return cached
        try:
            data = self.storage.read(manifest.version, name)
        except OSError as error:
            raise SnapshotCorrupt(f"snapshot {manifest.version} lacks {where}: {error}") from error
        if entry is None or entry.bytes != len(data) or entry.sha256 != hashlib.sha256(data).hexdigest():
            raise SnapshotCorrupt(f"{where} is not the file that the manifest of snapshot {manifest.version} describes")
        if cache is not None:
            cache.put(entry.sha256, data)
        return data

    # Writing

    def lock(self) -> AbstractContextManager[None]:
        """Makes this process the store's only writer, and clears away what a crash left unfinished.

        Raises:
            StoreLocked: another process holds the lock; the message says which.
            SnapshotError: the store cannot be made or written to.
        """
        return self.storage.lock()

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
        contents = {name: self._read(manifest, name) for name in manifest.files}
        return self._write(manifest.model_copy(update={"generation": generation, "copy_of": version}), contents)

    def _write(self, manifest: Manifest, contents: Mapping[str, bytes]) -> Manifest:
        version, fence = self.storage.next_version()
        files = {
            name: FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in contents.items()
        }
        changes = {"version": version, "created_s": time.time(), "files": files, "fence": fence}
        manifest, data = sealed(manifest.model_copy(update=changes))
        self.storage.publish(version, {**contents, MANIFEST_FILE: data})
        return manifest

    def pin(self, version: int | None) -> None:
        """Makes the service stay with a version, or with None follow the newest again.

        Raises:
            SnapshotCorrupt: there is no such version, or it is not whole.
            OSError: the disk refused; nothing is changed.
        """
        before = self.storage.read_active()
        if version is None:
            self.storage.write_active(None)
            return
        self.load(version, training=False)
        self.storage.write_active(json.dumps({"version": version}).encode())
        try:
            self.load(version, training=False)  # the trainer may have removed it before it was pinned
        except SnapshotCorrupt:
            self.storage.write_active(before)
            raise

    def prune(self, now_s: float) -> list[int]:
        """Removes all but the newest five, the newest healthy one, the first of each hour of the last day, the active.

        Returns:
            The versions removed.

        Raises:
            SnapshotError: it cannot be read which one is active; none is removed.
        """
        keys = self.snapshots()
        keep = {*(key.version for key in keys[-KEEP_NEWEST:]), self._newest_healthy(keys), self.active()}
        hours: set[int] = set()
        for version, written_ns in keys:
            written_s = written_ns / 1e9
            hour = int(written_s // 3600)
            if now_s - written_s <= KEEP_HOURLY_S and hour not in hours:
                hours.add(hour)
                keep.add(version)
        removed = [key.version for key in keys if key.version not in keep]
        self.storage.remove(removed)
        return removed

    def _newest_healthy(self, keys: Sequence[SnapshotKey]) -> int | None:
        """What a service that starts now would answer with, however long ago the model went astray."""
        self._healthy = {key: healthy for key, healthy in self._healthy.items() if key in keys}
        for key in reversed(keys):
            if key not in self._healthy:
                try:
                    self._healthy[key] = self.manifest(key.version).healthy
                except SnapshotCorrupt:
                    self._healthy[key] = False
            if self._healthy[key]:
                return key.version
        return None


def _cache_of_user(url: str) -> Path:
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"tailstream-{os.getuid()}" / name
