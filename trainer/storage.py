"""Where a store's snapshots lie: what `SnapshotStore` needs of a disk or of an object store."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Final, NamedTuple, Protocol

MANIFEST_FILE: Final = "manifest.json"
ACTIVE_FILE: Final = "active.json"


class SnapshotKey(NamedTuple):
    """Tells apart snapshots of one number, where a store was emptied and begun anew."""

    version: int
    written_ns: int  # since the epoch, by the clock of the disk or of the writer


class Storage(Protocol):
    """A place for snapshots; each is a few files, and the place shows all of them or none.

    A disk raises `OSError` where it refuses, an object store `StoreUnavailable`.
    """

    @property
    def where(self) -> str:
        """The place, for messages."""
        ...

    def exists(self) -> bool:
        """Whether anybody has ever written here."""
        ...

    # Reading

    def snapshots(self) -> list[SnapshotKey]:
        """The snapshots that claim to exist, by ascending version; none where the place is absent.

        Raises:
            SnapshotError: the place cannot be read.
        """
        ...

    def locate(self, version: int, name: str) -> str:
        """Where a file of a snapshot lies, for messages."""
        ...

    def fence(self, version: int) -> int | None:
        """The fencing number that the writer of a snapshot had, which its manifest names; None where none is needed."""
        ...

    def read(self, version: int, name: str) -> bytes:
        """A file of a snapshot.

        Raises:
            OSError: it is not there, or cannot be read.
            StoreUnavailable: nobody can say whether it is there.
        """
        ...

    def read_active(self) -> bytes | None:
        """What is noted of the pinned version, None where nothing is.

        Raises:
            SnapshotError: it cannot be read, so there may be one.
        """
        ...

    # Writing

    def lock(self) -> AbstractContextManager[None]:
        """Makes this process the only writer, and clears away what a crash left unfinished.

        Raises:
            StoreLocked: another process holds the lock; the message says which.
            SnapshotError: the place cannot be written to.
        """
        ...

    def next_version(self) -> tuple[int, int]:
        """The number for the next snapshot, and the fencing number for its manifest."""
        ...

    def publish(self, version: int, contents: Mapping[str, bytes]) -> None:
        """Writes the files of a snapshot, the manifest last; whoever reads sees all of them or nothing.

        Raises:
            OSError, StoreUnavailable: the place refused; the snapshot is not there.
            StoreLocked: another writer has taken over; the snapshot is not there, and never will be.
        """
        ...

    def remove(self, versions: Sequence[int]) -> None:
        """Removes snapshots; one that is half removed does not exist."""
        ...

    def write_active(self, data: bytes | None) -> None:
        """Notes what the pinned version is, or with None that none is; atomically."""
        ...

    def probe(self) -> None:
        """Writes something and removes it again.

        Raises:
            SnapshotError: the place cannot be written to.
        """
        ...
