"""`verify` finds what no crash of ours can make: damaged files, and counters that contradict each other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.service.store import make_settings, manifest
from trainer.audit import impossible, verify, went_back
from trainer.batching import CHECKSUM_MODULUS, PartitionProgress
from trainer.errors import SnapshotCorrupt
from trainer.manifest import Manifest
from trainer.snapshot import MODEL_FILE, TRAINING_FILE, SnapshotStore
from trainer.storage import MANIFEST_FILE


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(tmp_path)


def counted(offsets: list[int], next_offset: int, rejected: int = 0) -> PartitionProgress:
    return PartitionProgress(
        next_offset=next_offset,
        trained=len(offsets),
        rejected=rejected,
        offset_sum=sum(offsets) % CHECKSUM_MODULUS,
        offset_square_sum=sum(o * o for o in offsets) % CHECKSUM_MODULUS,
    )


def described(store: SnapshotStore, part: PartitionProgress, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {"partitions": {0: part}, "samples": part.trained, "step": part.trained}
    return manifest(make_settings(store.storage.path), **{**fields, **changes})


def write(store: SnapshotStore, part: PartitionProgress, **changes: Any) -> Manifest:
    tensors = {"weight": torch.full((2, 2), float(part.trained))}
    return store.write(described(store, part, **changes), tensors, tensors)


def faults(store: SnapshotStore) -> dict[int, str]:
    return {verdict.version: "; ".join(verdict.faults) for verdict in verify(store) if verdict.faults}


@given(st.data(), st.integers(0, 60), st.integers(0, 2**62))
def test_no_stream_of_different_offsets_is_found_at_fault(data: st.DataObject, count: int, base: int) -> None:
    offsets = data.draw(st.lists(st.integers(base, base + 200), min_size=count, max_size=count, unique=True))
    offsets.sort()
    half = len(offsets) // 2
    end = base + 201
    first = counted(offsets[:half], offsets[half - 1] + 1 if half else base)
    last = counted(offsets, end)
    known = {"samples": half, "partitions": {0: first}}
    earlier = manifest(make_settings(Path("unused")), **known)
    later = earlier.model_copy(update={"samples": len(offsets), "partitions": {0: last}})
    assert list(impossible(earlier)) == []
    assert list(impossible(later)) == []
    assert list(went_back(earlier, later)) == []


@pytest.mark.parametrize(
    ("part", "samples", "fault"),
    [
        (counted([0, 1, 2], 3, rejected=1), 3, "4 records consumed below offset 3"),
        (counted([0, 1, 6], 4), 3, "cannot sum to 7"),
        (counted([0, 1, 1], 4), 3, "cannot sum to 2"),
        (PartitionProgress(next_offset=9, trained=2, offset_sum=7, offset_square_sum=200), 2, "squares"),
        (PartitionProgress(next_offset=9, trained=2, offset_sum=15, offset_square_sum=100), 2, "does not fit"),
        (PartitionProgress(next_offset=9, trained=0, skipped=-1), 0, "negative"),
        (counted([0, 1, 2], 3), 4, "learned from 4 rows, the partitions count 3"),
    ],
)
def test_counters_that_no_stream_can_have(
    store: SnapshotStore, part: PartitionProgress, samples: int, fault: str
) -> None:
    write(store, part, samples=samples)
    assert fault in faults(store)[1]


@pytest.mark.parametrize(
    ("later", "fault"),
    [
        (counted([0, 1], 2), "went back"),
        (counted([0, 1, 2, 3, 9], 9), "cannot have the sum"),
        (counted([0, 1, 2, 3, 3], 9), "cannot have the sum"),  # offset 3 twice
        (counted([0, 1, 2, 3, 4, 5, 6], 9, rejected=2).model_copy(update={"next_offset": 6}), "consumed"),
    ],
)
def test_a_later_version_that_contradicts_an_earlier_one(
    store: SnapshotStore, later: PartitionProgress, fault: str
) -> None:
    write(store, counted([0, 1, 2, 3], 4))
    write(store, later)
    assert list(faults(store)) == [2]
    assert fault in faults(store)[2]


def test_a_partition_or_a_topic_that_is_another(store: SnapshotStore) -> None:
    part = counted([0, 1], 2)
    write(store, part, topic_id="one")
    write(store, part, topic_id="two")
    write(store, part, topic_id="two", partitions={1: part})
    assert set(faults(store)) == {2, 3}
    assert "topic_id was 'one'" in faults(store)[2]
    assert "partition 0 was in version 2" in faults(store)[3]


def test_after_a_rollback_progress_may_begin_again_from_there(store: SnapshotStore) -> None:
    write(store, counted([0, 1], 2))
    write(store, counted([0, 1, 2, 3], 4))
    with store.lock():
        copy = store.rollback(1)
    assert (copy.version, copy.generation, copy.copy_of) == (3, 1, 1)
    write(store, counted([0, 1, 2], 3), generation=1)
    assert faults(store) == {}
    for name in ("weight",):
        assert torch.equal(store.load(3, training=True).training[name], store.load(1, training=True).training[name])
    write(store, counted([0, 1], 2), generation=1)
    assert "went back" in faults(store)[5]


def test_a_copy_that_is_none_is_found(store: SnapshotStore) -> None:
    write(store, counted([0, 1], 2))
    write(store, counted([0, 1, 2], 3), generation=1, copy_of=1)
    assert "not the copy" in faults(store)[2]


def test_only_a_whole_version_can_be_rolled_back_to_or_pinned(store: SnapshotStore) -> None:
    write(store, counted([0, 1], 2))
    write(store, counted([0, 1, 2], 3))
    (store.storage.folder(1) / MODEL_FILE).write_bytes(b"torn")
    for act in (store.rollback, store.pin):
        with pytest.raises(SnapshotCorrupt):
            act(1)
        with pytest.raises(SnapshotCorrupt):
            act(7)
    assert store.versions() == [1, 2]
    assert store.active() is None
    store.pin(2)
    assert store.active() == 2
    store.pin(None)
    assert store.active() is None
    assert sorted(path.name for path in store.storage.path.iterdir()) == ["00000001", "00000002"]


@pytest.mark.parametrize("name", [MODEL_FILE, TRAINING_FILE, MANIFEST_FILE])
def test_a_flipped_bit_anywhere_in_any_file_is_found(store: SnapshotStore, name: str) -> None:
    write(store, counted([0, 1], 2))
    path = store.storage.folder(1) / name
    sound = path.read_bytes()
    for bit in range(0, 8 * len(sound), 7):  # every byte, and each bit of a byte somewhere
        data = bytearray(sound)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(SnapshotCorrupt):
            store.load(1, training=True)
    path.write_bytes(sound)
    assert faults(store) == {}
