"""Whether a store is what it says it is: every file against its digest, and the counters against each other."""

from collections.abc import Iterator
from math import isqrt
from typing import NamedTuple

from trainer.batching import CHECKSUM_MODULUS, PartitionProgress
from trainer.errors import SnapshotCorrupt
from trainer.manifest import Manifest
from trainer.snapshot import SnapshotStore


class Verdict(NamedTuple):
    """What was found of one version."""

    version: int
    manifest: Manifest | None  # None where it cannot be read
    faults: tuple[str, ...]  # empty: all is well


def verify(store: SnapshotStore) -> Iterator[Verdict]:
    """Reads all of every version, the oldest first; one at a time is in memory."""
    before: dict[int, Manifest] = {}  # newest sound manifest of each generation
    sound: dict[int, Manifest] = {}
    for version in store.versions():
        try:
            manifest = store.load(version, training=True).manifest
        except SnapshotCorrupt as fault:
            if store.key(version) is not None:  # else the trainer has pruned it meanwhile
                yield Verdict(version, None, (str(fault),))
            continue
        faults = [*impossible(manifest)]
        if manifest.copy_of in sound:
            faults += _not_a_copy(sound[manifest.copy_of], manifest)
        elif manifest.generation in before:
            faults += went_back(before[manifest.generation], manifest)
        before[manifest.generation] = sound[version] = manifest
        yield Verdict(version, manifest, tuple(faults))


def impossible(manifest: Manifest) -> Iterator[str]:
    """What the counters of one version say that cannot be."""
    for partition, part in manifest.partitions.items():
        for fault in _impossible(part):
            yield f"partition {partition}: {fault}"
    trained = sum(part.trained for part in manifest.partitions.values())
    if trained != manifest.samples:
        yield f"the model has learned from {manifest.samples} rows, the partitions count {trained}"


def _impossible(part: PartitionProgress) -> Iterator[str]:
    n, end = part.trained, part.next_offset
    if min(n, part.rejected, part.skipped, end) < 0:
        yield "a counter is negative"
        return
    consumed = n + part.rejected + part.skipped
    if consumed > end:
        yield f"{consumed} records consumed below offset {end}"
        return
    # n different offsets below `end`: their sums lie between those of the n lowest and of the n highest.
    lowest, highest = _sum_below(n), _sum_below(end) - _sum_below(end - n)
    if not _between(lowest, part.offset_sum, highest):
        yield f"{n} different offsets below {end} cannot sum to {part.offset_sum}"
    lowest, highest = _squares_below(n), _squares_below(end) - _squares_below(end - n)
    if not _between(lowest, part.offset_square_sum, highest):
        yield f"the squares of {n} different offsets below {end} cannot sum to {part.offset_square_sum}"
    elif highest < CHECKSUM_MODULUS and part.offset_sum > isqrt(n * part.offset_square_sum):  # Cauchy and Schwarz
        yield "the sum of the trained offsets does not fit the sum of their squares"


def went_back(earlier: Manifest, later: Manifest) -> Iterator[str]:
    """What a later version has less of than an earlier one of its generation."""
    for name in ("samples", "step"):
        if getattr(later, name) < getattr(earlier, name):
            yield f"{name} went back from {getattr(earlier, name)} in version {earlier.version}"
    for name in ("cluster_id", "topic", "topic_id"):
        old, new = getattr(earlier, name), getattr(later, name)
        if old is not None and new is not None and old != new:
            yield f"{name} was {old!r} in version {earlier.version}, and is {new!r}"
    for partition, before in earlier.partitions.items():
        after = later.partitions.get(partition)
        if after is None:
            yield f"partition {partition} was in version {earlier.version}, and is not here"
            continue
        for name in ("next_offset", "trained", "rejected", "skipped"):
            if getattr(after, name) < getattr(before, name):
                yield f"partition {partition}: {name} went back from {getattr(before, name)} in {earlier.version}"
        if after.next_offset >= before.next_offset:
            yield from (f"partition {partition}, since version {earlier.version}: {f}" for f in _grew(before, after))


def _grew(before: PartitionProgress, after: PartitionProgress) -> Iterator[str]:
    """What was consumed between two versions lies between their offsets."""
    n = after.trained - before.trained
    consumed = n + after.rejected - before.rejected + after.skipped - before.skipped
    if consumed > after.next_offset - before.next_offset:
        yield f"{consumed} records consumed of {after.next_offset - before.next_offset} offsets"
    elif n >= 0:
        lowest = n * before.next_offset + _sum_below(n)
        highest = _sum_below(after.next_offset) - _sum_below(after.next_offset - n)
        if not _between(lowest, (after.offset_sum - before.offset_sum) % CHECKSUM_MODULUS, highest):
            yield f"{n} offsets from {before.next_offset} to {after.next_offset} cannot have the sum they have"


def _not_a_copy(original: Manifest, copy: Manifest) -> Iterator[str]:
    same = {"version", "created_s", "generation", "copy_of", "fence", "sha256"}
    if original.model_dump(exclude=same) != copy.model_dump(exclude=same):
        yield f"it is not the copy of version {original.version} that it says it is"


def _between(lowest: int, value: int, highest: int) -> bool:
    """Whether a value known mod 2^64 can be in a range."""
    return highest - lowest >= CHECKSUM_MODULUS or (value - lowest) % CHECKSUM_MODULUS <= highest - lowest


def _sum_below(n: int) -> int:
    """0 + 1 + ... + (n - 1)."""
    return n * (n - 1) // 2


def _squares_below(n: int) -> int:
    """0² + 1² + ... + (n - 1)²."""
    return (n - 1) * n * (2 * n - 1) // 6
