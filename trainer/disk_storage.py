"""Snapshots in a folder on a disk: made under another name, synced and renamed; the writer holds a lock of the system.

<folder>/00000042/manifest.json ...
         active.json
         .lock                      held by `flock`, which ends with the process
"""

import errno
import fcntl
import os
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from trainer.errors import SnapshotError, StoreLocked
from trainer.storage import ACTIVE_FILE, MANIFEST_FILE, SnapshotKey

LOCK_FILE: Final = ".lock"
TEMPORARY: Final = ".tmp-"


class DiskStorage:
    """A folder of snapshots.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def where(self) -> str:
        """The folder, for messages."""
        return str(self.path)

    def exists(self) -> bool:
        """Whether there is such a folder."""
        return self.path.is_dir()

    def folder(self, version: int) -> Path:
        """Where a version lies."""
        return self.path / f"{version:08d}"

    # Reading

    def snapshots(self) -> list[SnapshotKey]:
        """The versions with a manifest, in ascending order, without those that go while they are listed.

        Raises:
            SnapshotError: the folder cannot be read.
        """
        try:
            numbers = sorted(int(name) for name in os.listdir(self.path) if name.isdecimal())
            return [key for number in numbers if (key := self._key(number)) is not None]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise SnapshotError(f"the snapshot store {self.path} cannot be read: {error}") from error

    def _key(self, version: int) -> SnapshotKey | None:
        try:
            return SnapshotKey(version, (self.folder(version) / MANIFEST_FILE).stat().st_mtime_ns)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def locate(self, version: int, name: str) -> str:
        """The path of a file, for messages."""
        return str(self.folder(version) / name)

    def fence(self, version: int) -> None:
        """There is none: the system takes the lock from a writer that has ended, and from no other."""

    def read(self, version: int, name: str) -> bytes:
        """A file of a version.

        Raises:
            OSError: it is not there, or cannot be read.
        """
        return (self.folder(version) / name).read_bytes()

    def read_active(self) -> bytes | None:
        """What is noted of the pinned version, None where nothing is.

        Raises:
            SnapshotError: it cannot be read, so there may be one.
        """
        path = self.path / ACTIVE_FILE
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SnapshotError(f"{path} cannot be read: {error}") from error

    # Writing

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder's lock, and clears away what a crash left unfinished.

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

    def next_version(self) -> tuple[int, int]:
        """One more than the highest there is, valid or not; the fencing number is always 0."""
        return 1 + max((int(name) for name in os.listdir(self.path) if name.isdecimal()), default=0), 0

    def publish(self, version: int, contents: Mapping[str, bytes]) -> None:
        """Writes a version's folder under another name, syncs it, and renames it.

        Raises:
            OSError: the disk refused; nothing of the snapshot is left.
        """
        temporary = self.path / f"{TEMPORARY}{version:08d}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            for name, data in contents.items():
                _write_durably(temporary / name, data)
            _sync_folder(temporary)
            temporary.rename(self.folder(version))
            _sync_folder(self.path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def remove(self, versions: Sequence[int]) -> None:
        """Removes versions."""
        for version in versions:
            folder = self.folder(version)
            (folder / MANIFEST_FILE).unlink(missing_ok=True)  # first, so that a half-removed folder does not exist
            shutil.rmtree(folder, ignore_errors=True)

    def write_active(self, data: bytes | None) -> None:
        """Replaces what is noted of the pinned version.

        Raises:
            OSError: the disk refused; nothing is changed.
        """
        target = self.path / ACTIVE_FILE
        if data is None:
            target.unlink(missing_ok=True)
        else:
            temporary = self.path / f"{ACTIVE_FILE}.{os.getpid()}"
            temporary.unlink(missing_ok=True)  # of one that died here, with a number that comes again in a container
            try:
                _write_durably(temporary, data)
                temporary.replace(target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        _sync_folder(self.path)

    def probe(self) -> None:
        """Writes a file and removes it again.

        Raises:
            SnapshotError: the folder cannot be written to.
        """
        probe = self.path / f".probe-{os.getpid()}-{threading.get_ident()}"
        try:
            probe.write_bytes(b"probe")
            probe.unlink()
        except OSError as error:
            raise SnapshotError(f"{self.path} cannot be written to: {error}") from error


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
