"""Snapshots in an object store: one object, the head, is at once the list of snapshots, the lock and the fence.

<url>/head.json                  who writes, with which fencing number, and which snapshots there are
      00000042.0003/manifest.json ...   version 42, by the writer with fencing number 3
      active.json

The head is replaced by compare-and-swap only (`If-Match`). A snapshot is there from the moment that the head names it;
its objects have been written before, the manifest last. Whoever takes the lock replaces the head, so that a writer who
was thought to be dead and wakes up cannot replace it any more: nothing that it writes is ever named. Clocks are not
compared: a lock has expired for whoever has watched its head for `lease_s` and saw no change.
"""

import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.errors import SnapshotCorrupt, SnapshotError, StoreLocked, StoreUnavailable
from trainer.manifest import opened
from trainer.objects import Objects, Tag
from trainer.storage import ACTIVE_FILE, MANIFEST_FILE, SnapshotKey

HEAD: Final = "head.json"
BEATS: Final = 3  # in a lease: how often an idle writer says that it lives
FOLDER: Final = re.compile(r"(\d{8,})\.(\d{4,})(?=/)")  # the first part of a snapshot's keys
WATCH_S: Final = 0.2  # between two looks at somebody else's lock

log = structlog.get_logger()


class Owner(BaseModel):
    """Who holds the lock."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str  # for people
    token: str  # drawn anew for each holding
    process: str | None  # tells processes of one machine apart, None where that cannot be told
    lease_s: float


class Entry(BaseModel):
    """A snapshot that is there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    fence: int
    written_ns: int
    files: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The first part of its objects' keys; no two writers ever write to the same."""
        return f"{self.version:08d}.{self.fence:04d}"

    @property
    def objects(self) -> list[str]:
        """Keys of its objects; in this order they are removed."""
        return [f"{self.folder}/{name}" for name in reversed(self.files)]

    @property
    def key(self) -> SnapshotKey:
        """As the store knows it."""
        return SnapshotKey(self.version, self.written_ns)


class Head(BaseModel):
    """What the store is at a moment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    fence: int = 0  # grows each time that the lock is taken
    beat: int = 0  # grows each time that the head is written, so that no two are alike
    owner: Owner | None = None
    last_version: int = 0
    snapshots: tuple[Entry, ...] = ()  # ascending

    def entry(self, version: int) -> Entry | None:
        """What is said of a version."""
        return next((entry for entry in self.snapshots if entry.version == version), None)


class ObjectStorage:
    """A prefix of a bucket.

    Args:
        objects: the objects below it.
        lease_s: how long a writer may be silent before another takes over.
    """

    def __init__(self, objects: Objects, lease_s: float) -> None:
        self._objects = objects
        self._lease_s = lease_s
        self._seen: tuple[Tag | None, Head] = (None, Head())  # what a reader saw last, and its tag
        self._writing: _Writing | None = None

    @property
    def where(self) -> str:
        """The URL, for messages."""
        return self._objects.url

    def exists(self) -> bool:
        """Whether anybody has ever written here."""
        return self._look() is not None

    # Reading

    def snapshots(self) -> list[SnapshotKey]:
        """The snapshots that the head names, in ascending order.

        Raises:
            SnapshotError: the head cannot be read.
        """
        return [entry.key for entry in (self._look() or Head()).snapshots]

    def locate(self, version: int, name: str) -> str:
        """The URL of a file, for messages."""
        entry = self._entry(version)
        return self._objects.at(f"{entry.folder if entry else f'{version:08d}'}/{name}")

    def fence(self, version: int) -> int | None:
        """The fencing number that the head says a version was written with."""
        entry = self._entry(version)
        return None if entry is None else entry.fence

    def read(self, version: int, name: str) -> bytes:
        """A file of a version.

        Raises:
            FileNotFoundError: the head names no such version, or its object is gone.
            StoreUnavailable: nobody can say.
        """
        entry = self._entry(version)
        found = self._objects.get(f"{entry.folder}/{name}") if entry is not None else None
        if found is None:
            raise FileNotFoundError("no such object")
        return found.data

    def read_active(self) -> bytes | None:
        """What is noted of the pinned version, None where nothing is."""
        found = self._objects.get(ACTIVE_FILE)
        return None if found is None else found.data

    def _look(self) -> Head | None:
        """The head as it is now, or None; one that has not changed is not sent again."""
        tag, head = self._seen
        if tag is not None:
            try:
                found = self._objects.get_if_changed(HEAD, tag)
            except FileNotFoundError:
                self._seen = (None, Head())
                return None
            if found is None:
                return head
        else:
            found = self._objects.get(HEAD)
            if found is None:
                return None
        head = self._parsed(found.data)
        self._seen = (found.tag, head)
        return head

    def _parsed(self, data: bytes) -> Head:
        try:
            return Head.model_validate_json(data)
        except ValidationError as error:
            raise SnapshotError(
                f"{self._objects.at(HEAD)} is not as it was written: {error}; with no trainer running remove it, and "
                "the next one makes it anew from the manifests"
            ) from error

    def _entry(self, version: int) -> Entry | None:
        """What the head says of a version: the writer's own head, or the one seen last, or the newest."""
        writing = self._writing
        if writing is not None:
            return writing.head.entry(version)
        return self._seen[1].entry(version) or (self._look() or Head()).entry(version)

    # Writing

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the head, renews that while nothing is written, and clears away what a crash left unfinished.

        Waits for at most a lease, to see whether a holder still lives.

        Raises:
            StoreLocked: another process holds the lock and lives; the message says which.
            StoreUnavailable: the store cannot be reached or written to.
        """
        writing = self._taken()
        self._writing = writing
        stop = threading.Event()
        beats = threading.Thread(target=writing.renew_until, args=(stop,), name="lease", daemon=True)
        try:
            self._clear(writing.head)
            beats.start()
            yield
        finally:
            stop.set()
            if beats.ident is not None:
                beats.join()
            self._writing = None
            writing.release()

    def next_version(self) -> tuple[int, int]:
        """One more than the highest that was ever named or tried, and the writer's fencing number."""
        writing = self._held()
        return writing.tried + 1, writing.head.fence

    def publish(self, version: int, contents: Mapping[str, bytes]) -> None:
        """Writes the objects of a version, and names it in the head.

        Raises:
            StoreUnavailable: the store is away; nobody sees the snapshot, unless it was the answer that got lost.
            StoreLocked: another writer has taken over.
        """
        writing = self._held()
        writing.tried = version  # its objects are written to once: where only the answer got lost, they are being read
        entry = Entry(version=version, fence=writing.head.fence, written_ns=time.time_ns(), files=tuple(contents))
        for name, data in contents.items():
            self._objects.put(f"{entry.folder}/{name}", data)
        writing.swap(
            lambda head: head.model_copy(update={"snapshots": (*head.snapshots, entry), "last_version": version})
        )

    def remove(self, versions: Sequence[int]) -> None:
        """Takes versions out of the head, then removes their objects."""
        if not versions:
            return
        gone = set(versions)
        before = self._held().head
        self._held().swap(
            lambda head: head.model_copy(
                update={"snapshots": tuple(entry for entry in head.snapshots if entry.version not in gone)}
            )
        )
        self._objects.delete([key for entry in before.snapshots if entry.version in gone for key in entry.objects])

    def write_active(self, data: bytes | None) -> None:
        """Replaces what is noted of the pinned version."""
        if data is None:
            self._objects.delete([ACTIVE_FILE])
        else:
            self._objects.put(ACTIVE_FILE, data)

    def probe(self) -> None:
        """Writes an object and removes it again."""
        key = f".probe-{uuid.uuid4().hex}"
        self._objects.put(key, b"probe")
        self._objects.delete([key])

    def _held(self) -> "_Writing":
        if self._writing is None:
            raise SnapshotError(f"{self.where} is written to without its lock")
        return self._writing

    def _taken(self) -> "_Writing":
        """Takes the lock, as soon as nobody holds it."""
        owner = Owner(
            name=f"pid {os.getpid()} on {socket.gethostname()}",
            token=uuid.uuid4().hex,
            process=_process(os.getpid()),
            lease_s=self._lease_s,
        )
        watched: Tag | None = None
        expires_s = 0.0
        while True:
            found = self._objects.get(HEAD)
            head = self._rebuilt() if found is None else self._parsed(found.data)
            tag = None if found is None else found.tag
            holder = head.owner
            if (
                holder is None
                or _has_ended(holder.process)
                or (watched is not None and tag == watched and time.monotonic() >= expires_s)
            ):
                if holder is not None:
                    log.warning("the lock of a trainer that has ended is taken over", owner=holder.name)
                mine = head.model_copy(update={"owner": owner, "fence": head.fence + 1, "beat": head.beat + 1})
                new = self._objects.replace(HEAD, _as_bytes(mine), tag)
                if new is not None:
                    return _Writing(self._objects, mine, new, self._parsed)
            elif watched is None:
                watched, expires_s = tag, time.monotonic() + holder.lease_s
                log.info(
                    "the store is locked: looking whether its owner lives", owner=holder.name, wait_s=holder.lease_s
                )
            elif tag != watched:
                raise StoreLocked(
                    f"another trainer writes to {self.where} ({holder.name}): stop it, or give this one its own "
                    "store.url"
                )
            time.sleep(WATCH_S)

    def _rebuilt(self) -> Head:
        """A head from the manifests that are there, where it was lost; empty in a new store."""
        newest: dict[int, Entry] = {}
        fences = [0]
        for key in sorted(self._objects.list()):
            folder = FOLDER.match(key)
            if folder is None or not key.endswith(f"/{MANIFEST_FILE}"):
                continue
            number, fence = folder[1], folder[2]
            fences.append(int(fence))
            found = self._objects.get(key)
            try:
                manifest = opened(found.data if found is not None else b"", int(number), self._objects.at(key))
            except SnapshotCorrupt as error:
                log.warning("a snapshot is passed over", reason=str(error))
                continue
            entry = Entry(
                version=int(number),
                fence=int(fence),
                written_ns=int(manifest.created_s * 1e9),
                files=(*manifest.files, MANIFEST_FILE),
            )
            newest[entry.version] = entry
        if newest:
            log.warning("the head of the store was lost and is made anew from its manifests", versions=sorted(newest))
        entries = tuple(newest[version] for version in sorted(newest))
        return Head(fence=max(fences), last_version=max(newest, default=0), snapshots=entries)

    def _clear(self, head: Head) -> None:
        """Removes objects of snapshots that were never named, or are not any more."""
        named = {entry.folder for entry in head.snapshots}
        left = [key for key in self._objects.list() if (found := FOLDER.match(key)) and found[0] not in named]
        self._objects.delete(sorted(left, key=lambda key: not key.endswith(MANIFEST_FILE)))  # manifests first


class _Writing:
    """The head while this process holds it.

    Attributes:
        head: as it was written last.
        tried: the highest version that was ever named, or that was to be.
    """

    def __init__(self, objects: Objects, head: Head, tag: Tag, parsed: Callable[[bytes], Head]) -> None:
        self.head = head
        self.tried = head.last_version
        assert head.owner is not None
        self._owner = head.owner
        self._objects = objects
        self._tag = tag
        self._parsed = parsed
        self._swapping = threading.Lock()
        self._written_s = time.monotonic()
        self._lost = ""

    def swap(self, change: Callable[[Head], Head]) -> None:
        """Replaces the head by a changed one; on its own it is only renewed.

        Raises:
            StoreUnavailable: the store is away.
            StoreLocked: somebody else has replaced it.
        """
        with self._swapping:
            while True:
                if self._lost:
                    raise StoreLocked(self._lost)
                changed = change(self.head)
                changed = changed.model_copy(update={"beat": self.head.beat + 1})
                tag = self._objects.replace(HEAD, _as_bytes(changed), self._tag)
                if tag is not None:
                    break
                found = self._objects.get(HEAD)
                head = None if found is None else self._parsed(found.data)
                if found is None or head is None or head.owner is None or head.owner.token != self._owner.token:
                    self._lost = self._why_lost(head)
                    continue
                # Ours: an earlier request had worked, and its answer was lost.
                tag = found.tag
                if head == changed:
                    break
                self.head, self._tag = head, tag
            self.head, self._tag = changed, tag
            self._written_s = time.monotonic()

    def renew_until(self, stop: threading.Event) -> None:
        """Renews the lease as often as nothing else has been written for a third of it."""
        every_s = self._owner.lease_s / BEATS
        away = ""
        while not stop.wait(max(0.0, self._written_s + every_s - time.monotonic()) if not away else every_s):
            if time.monotonic() < self._written_s + every_s:
                continue
            try:
                self.swap(lambda head: head)
            except StoreUnavailable as error:
                if not away:
                    log.error(
                        "the lock of the store cannot be renewed: another trainer may take over", reason=str(error)
                    )
                away = str(error)
            except SnapshotError as error:
                log.error("the lock of the store is lost", reason=str(error))
                return
            else:
                if away:
                    log.info("the lock of the store is renewed again")
                away = ""

    def release(self) -> None:
        """Lets go of the lock; where that fails it expires by itself."""
        if self._lost:
            return
        try:
            self.swap(lambda head: head.model_copy(update={"owner": None}))
        except SnapshotError as error:
            log.warning("the lock of the store could not be let go of", reason=str(error))

    def _why_lost(self, head: Head | None) -> str:
        where = self._objects.url
        if head is None or head.owner is None:
            return f"the lock of {where} is lost: its {HEAD} was removed or replaced; start the trainer again"
        return (
            f"the lock of {where} is lost: {head.owner.name} took over with fencing number {head.fence} while this "
            f"trainer, with {self.head.fence}, was not heard of for {self._owner.lease_s:g} s; nothing of this one is "
            "published any more"
        )


def _as_bytes(head: Head) -> bytes:
    return head.model_dump_json(indent=1).encode()


def _process(pid: int) -> str | None:
    """Tells a process from all others, living or dead, of all machines; None where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        started = None if state[0] in "ZX" else state[19]  # the dead are there until their parent looks
    except (OSError, IndexError):
        return None
    if started is None:
        return None
    return f"{boot} {namespace} {pid} {started}"


def _has_ended(process: str | None) -> bool:
    """Whether a process is known to have ended; of one that could run elsewhere nothing is known."""
    mine = _process(os.getpid())
    if process is None or mine is None:
        return False
    same_place = process.split()[:2] == mine.split()[:2]
    return same_place and _process(int(process.split()[2])) != process
