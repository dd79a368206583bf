"""The checkpoint: it owns progress and state, and makes both durable in one order.

train -> dead letters acknowledged -> snapshot durable -> offsets committed
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, NamedTuple

import safetensors.torch
import structlog
from pydantic import BaseModel
from torch import Tensor

from trainer.batching import Batch, PartitionProgress, Progress, advance
from trainer.config import Settings
from trainer.dead_letter import DeadLetters
from trainer.errors import (
    PublishError,
    SnapshotCorrupt,
    SnapshotError,
    SnapshotMismatch,
    StoreUnavailable,
    TopicChanged,
)
from trainer.kafka_client import TopicDescription
from trainer.learner import Learner, joint_state
from trainer.manifest import Manifest, Sample, check_fits
from trainer.metrics import TrainerMetrics
from trainer.prefetch import BatchSource
from trainer.ranks import ALONE, Ranks
from trainer.snapshot import Snapshot, SnapshotStore

LARGEST_SHARE: Final = 0.05  # of the time, spent on saving
BORROWED_S: Final = 0.5  # of that, at most, before its time has come: so one save that took long is not waited for
RETRY_S: Final = 5.0  # after a save that failed
LAST_RETRY_S: Final = 0.2  # the same when the trainer is about to stop

log = structlog.get_logger()


class Parts(NamedTuple):
    """What a checkpoint keeps in step."""

    source: BatchSource
    learner: Learner
    store: SnapshotStore
    dead_letters: DeadLetters
    metrics: TrainerMetrics
    ranks: Ranks = ALONE


class _Save(NamedTuple):
    """A snapshot on its way to the disk."""

    future: Future["_Written"]
    progress: Progress
    steps: int
    began_s: float
    copied_s: float  # how long training stood still for the copy


class _Written(NamedTuple):
    """A snapshot on the disk."""

    manifest: Manifest
    processor_s: float  # taken from whoever else wants the processor, training too; waiting for the disk is not


class _Outcome(BaseModel):
    """What one rank says to the others of a snapshot."""

    manifest: Manifest | None = None
    failure: str = ""

    def encode(self) -> bytes:
        """As it is sent."""
        return self.model_dump_json().encode()


class Checkpoint:
    """Progress by partition, and the snapshots that make it durable together with the learner's state.

    Snapshots are written on a thread of their own from a copied state, one at a time, at least `store.interval_s`
    apart and so far apart that saving takes at most a twentieth of the training's time, over some ten seconds.

    Attributes:
        progress: what the learner's state covers.
        durable: what the last durable snapshot covers.
    """

    def __init__(self, settings: Settings, parts: Parts) -> None:
        self._settings = settings
        self._parts = parts
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshot")
        self._save: _Save | None = None
        self._durable_steps = 0
        self._next_s = self._spent_until_s = 0.0
        self._spent_s = 0.0  # on saving, beyond its share of the time until then
        self._next_reading_s = 0.0
        self._failing = ""
        self._drift_alarms = 0  # that have been said
        self._generation = 0
        self.progress: dict[int, PartitionProgress] = {}
        self.durable: Progress = {}

    def restore(self) -> Manifest | None:
        """Loads the newest valid snapshot, if there is one.

        Raises:
            SnapshotCorrupt: there are some, and none is valid; beginning anew would forget all they hold.
            SnapshotMismatch: it is of another model than the configuration describes.
        """
        snapshot = self._newest()
        if snapshot is None:
            return None
        check_fits(snapshot.manifest, self._settings)
        try:
            self._parts.learner.load_state_dict(snapshot.training)
        except (KeyError, RuntimeError) as error:
            raise SnapshotMismatch(
                f"snapshot {snapshot.manifest.version} is of another model than the configuration describes: {error}; "
                "put the setting back, or give the new model its own store.url"
            ) from error
        self._generation = snapshot.manifest.generation
        self._drift_alarms = snapshot.manifest.drift_alarms
        self._parts.metrics.resumed(snapshot.manifest)
        self.progress = dict(snapshot.manifest.partitions)
        self._note_durable(self.progress, self._parts.learner.steps)
        log.info("resumed", version=snapshot.manifest.version, samples=snapshot.manifest.samples)
        return snapshot.manifest

    def _newest(self) -> Snapshot | None:
        """The newest valid snapshot that rank 0 finds: the others may be on machines that have no store."""
        ranks, snapshot = self._parts.ranks, None
        if ranks.number == 0:
            snapshot, faults = self._parts.store.newest(training=True)
            for fault in faults:
                log.warning("a snapshot is passed over", reason=str(fault))
            if snapshot is None and faults:
                raise SnapshotCorrupt(
                    f"none of the {len(faults)} snapshots in {self._parts.store.where} can be resumed from, the newest "
                    f"because: {faults[0]}; bring one back, or give a new store.url to begin anew"
                )
        if ranks.alone:
            return snapshot
        manifest = ranks.told(b"" if snapshot is None else snapshot.manifest.model_dump_json().encode())
        training = ranks.told(b"" if snapshot is None else safetensors.torch.save(snapshot.training))
        if not manifest:
            return None
        return Snapshot(Manifest.model_validate_json(manifest), {}, safetensors.torch.load(training))

    def begin(self, offsets: Mapping[int, int]) -> None:
        """Notes where partitions without progress begin, so that a later start misses nothing of them.

        A first start at the end of a topic, or at a time, is saved at once, before anything is learned.

        Args:
            offsets: what the source's `open` returned.
        """
        fresh = {p: PartitionProgress(next_offset=offset) for p, offset in offsets.items()}
        first_start = not self.progress
        self.progress = fresh | self.progress
        if first_start and self._settings.kafka.start == "earliest":
            self._note_durable(
                self.progress, self._parts.learner.steps
            )  # a next start would begin there by itself, so there is nothing to save

    def advance(self, batch: Batch) -> None:
        """Notes that the learner's state now covers a batch."""
        self.progress = advance(self.progress, batch.progress)

    def wishes(self) -> tuple[bool, bool, bool]:
        """Whether this rank wants a snapshot, has something that the last one lacks, and has one under way."""
        return self._is_due(time.monotonic()), self._is_behind, self._save is not None

    def tick(self, wishes: Sequence[bool] | None = None) -> None:
        """Sees to what is due: readings for the metrics, the end of a save, the start of the next.

        Args:
            wishes: of each of `wishes`, whether any rank has it, where they were exchanged already.
        """
        if self._save is not None and self._save.future.done():
            self._finish(self._save)
        if time.monotonic() >= self._next_reading_s:
            self._read()
        due, behind, saving = self._parts.ranks.any(*self.wishes()) if wishes is None else wishes
        if due and behind and not saving:
            self._start()

    @property
    def _is_behind(self) -> bool:
        """Whether the last durable snapshot lacks anything; replay changes the model without any progress."""
        return self.progress != self.durable or self._parts.learner.steps != self._durable_steps

    def _note_durable(self, progress: Progress, steps: int) -> None:
        self.durable, self._durable_steps = progress, steps

    def _is_due(self, now: float) -> bool:
        """Whether this rank wants a snapshot; when it is time is for rank 0 to say, which writes it."""
        on_time = now >= self._next_s and self._parts.ranks.number == 0
        return on_time or (self._parts.dead_letters.full and not self._failing)

    def save(self) -> None:
        """Makes everything learned durable, before the trainer stops; tries again for half of `trainer.stop_grace_s`.

        Raises:
            SnapshotError: it could not be; the last durable snapshot is what a next start goes on from.
        """
        until, ranks = time.monotonic() + self._settings.trainer.stop_grace_s / 2, self._parts.ranks
        while any(ranks.any(self._save is not None, self._is_behind)):
            if not any(ranks.any(self._save is not None)):
                self._start()
            if self._save is not None:
                self._finish(self._save)
            if self._failing:
                (late,) = ranks.any(time.monotonic() >= until)
                if late:
                    raise SnapshotError(
                        f"what was learned since the last snapshot is lost, and will be repeated: {self._failing}"
                    )
                time.sleep(LAST_RETRY_S)

    def close(self) -> None:
        """Waits for a save that is under way: until then the store must not be let go of."""
        self._writer.shutdown()

    def _read(self) -> None:
        self._next_reading_s = time.monotonic() + self._settings.trainer.metrics_interval_s
        learner, standing = self._parts.learner, self._parts.source.standing()
        readings = learner.read()
        self._parts.metrics.read(readings, learner.steps, standing.lag(self.progress), standing.lost_records)
        if readings.drift_alarms > self._drift_alarms:
            self._drift_alarms = readings.drift_alarms
            log.warning(
                "drift: the prequential error has risen",
                samples=learner.samples,
                alarms=readings.drift_alarms,
                action=self._settings.learner.drift_action,
            )

    def _start(self) -> _Save:
        began = time.monotonic()
        learner, first = self._parts.learner, self._parts.ranks.number == 0  # which writes what is the same on all
        state, model = (learner.common_state(), learner.inference_state()) if first else ({}, {})
        own, manifest = learner.own_state(), self._manifest()
        copied_s = time.monotonic() - began
        future = self._writer.submit(self._write, manifest, model, state, own)
        self._save = _Save(future, self.progress, manifest.step, began, copied_s)
        return self._save

    def _write(
        self, manifest: Manifest, model: dict[str, Tensor], state: dict[str, Tensor], own: dict[str, Tensor]
    ) -> _Written:
        """Writes a snapshot once its dead letters are safe, and prunes old ones; on the writer's thread.

        Several ranks do it together: rank 0 has what the others bring, and they learn what became of it.
        """
        began = time.thread_time()
        ranks = self._parts.ranks.saving
        manifest, owns = self._brought_together(manifest, own)
        if ranks.number == 0:
            try:
                written = self._parts.store.write(manifest, model, joint_state(state, owns))
            except OSError as error:
                ranks.told(_Outcome(failure=str(error)).encode())
                raise
            ranks.told(_Outcome(manifest=written).encode())
            try:
                self._parts.store.prune(time.time())
            except (OSError, SnapshotError) as error:
                log.warning("old snapshots are still there", reason=str(error))
        else:
            outcome = _Outcome.model_validate_json(ranks.told(b""))
            if outcome.manifest is None:
                raise OSError(f"rank 0: {outcome.failure}")
            written = outcome.manifest
        return _Written(written, time.thread_time() - began)

    def _brought_together(
        self, manifest: Manifest, own: dict[str, Tensor]
    ) -> tuple[Manifest, Sequence[dict[str, Tensor]]]:
        """What each rank has of a snapshot, once the dead letters of all are safe.

        Raises:
            PublishError: those of one are not; raised on all.
        """
        ranks = self._parts.ranks.saving
        if ranks.alone:
            self._parts.dead_letters.flush()  # with those of batches after the copy, which does no harm
            return manifest, [own]
        share = manifest.model_copy(
            update={"partitions": {p: part for p, part in manifest.partitions.items() if ranks.owns(p)}}
        )
        try:
            self._parts.dead_letters.flush()
            said = _Outcome(manifest=share)
        except PublishError as error:
            said = _Outcome(failure=str(error))
        shares = [_Outcome.model_validate_json(text) for text in ranks.texts(said.encode())]
        parts = [of.manifest for of in shares if of.manifest is not None]
        if len(parts) < ranks.count:
            raise PublishError("; ".join(f"rank {rank}: {of.failure}" for rank, of in enumerate(shares) if of.failure))
        states = ranks.texts(safetensors.torch.save(own))
        lags = [part.lag_records for part in parts if part.lag_records is not None]
        together = {
            "partitions": dict(sorted(item for part in parts for item in part.partitions.items())),
            "lag_records": sum(lags) if lags else None,
            "newest_append_s": max(part.newest_append_s for part in parts),
            "samples_per_second": sum(part.samples_per_second for part in parts),
        }
        owns = [safetensors.torch.load(state) for state in states] if ranks.number == 0 else []
        return manifest.model_copy(update=together), owns

    def _finish(self, save: _Save) -> None:
        self._save = None
        try:
            manifest, processor_s = save.future.result()
        except PublishError as error:
            self._failed(str(error))
            return
        except (OSError, StoreUnavailable) as error:
            self._failed(f"the snapshot could not be written to {self._parts.store.where}: {error}")
            return
        self._spent_s = max(0.0, self._spent_s - LARGEST_SHARE * (save.began_s - self._spent_until_s))
        self._spent_s += save.copied_s + processor_s
        self._spent_until_s = save.began_s
        pause_s = (self._spent_s - BORROWED_S) / LARGEST_SHARE
        self._next_s = save.began_s + max(self._settings.store.interval_s, pause_s)
        self._note_durable(save.progress, save.steps)
        self._parts.source.commit(save.progress)
        self._parts.metrics.saved(
            manifest.version, sum(f.bytes for f in manifest.files.values()), time.monotonic() - save.began_s
        )
        if self._failing:
            self._failing = ""
            log.info("snapshots are written again", version=manifest.version)

    def _failed(self, reason: str) -> None:
        """Training goes on; the next save tries again. Counted; said once, and again when it works."""
        self._parts.metrics.save_failed()
        self._next_s = time.monotonic() + RETRY_S
        if not self._failing:
            log.error("no snapshot: training goes on, and would be repeated from the last one", reason=reason)
        self._failing = reason

    def _manifest(self) -> Manifest:
        settings, learner, identity = self._settings, self._parts.learner, self._parts.source.identity
        readings = learner.read()
        noise = readings.noise
        lag = self._parts.source.standing().lag(self.progress)
        return Manifest(
            version=0,
            created_s=0.0,
            step=learner.steps,
            samples=learner.samples,
            cluster_id=identity.cluster_id,
            topic=identity.topic,
            topic_id=identity.topic_id,
            partitions=self.progress,
            lag_records=sum(lag.values()) if lag else None,
            newest_append_s=self._parts.metrics.newest_append_s,
            task=settings.task,
            record_schema=settings.record_schema.model_dump(mode="json"),
            model=settings.model.model_dump(mode="json"),
            learner=settings.learner.model_dump(mode="json"),
            healthy=readings.healthy,
            train_loss=readings.train_loss,
            noise_sigma=None if noise is None else noise.sigma,
            noise_sigma_label_units=None if noise is None else noise.label_units,
            samples_per_second=self._parts.metrics.samples_per_second,
            nonfinite_steps=readings.nonfinite_steps,
            drift_alarms=readings.drift_alarms,
            metrics=readings.metrics,
            newest=[Sample(time_s=t, label=y, prediction=p) for t, y, p in readings.newest],
            generation=self._generation,
        )


def check_same_topic(manifest: Manifest, identity: TopicDescription) -> None:
    """Whether a snapshot's offsets belong to this topic.

    Raises:
        TopicChanged: it is on another cluster, or was deleted and made again.
    """
    for name in ("cluster_id", "topic", "topic_id"):
        stored, found = getattr(manifest, name), getattr(identity, name)
        if stored is not None and found is not None and stored != found:
            raise TopicChanged(
                f"snapshot {manifest.version} has learned from {name} {stored!r}, but this is {found!r}: its offsets "
                "mean nothing here; point kafka.bootstrap_servers and kafka.topic back, or give a new store.url"
            )
