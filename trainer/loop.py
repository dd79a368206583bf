"""The loop: records come in batches; each is learned from, then its offsets and the new state are saved together."""

import time
from contextlib import closing, suppress

from trainer.checkpoint import Checkpoint, Parts
from trainer.errors import SnapshotError, SourceError
from trainer.turns import Turns


def train(parts: Parts, checkpoint: Checkpoint, turns: Turns) -> None:
    """Learns from the source until told to stop, or until the source has no more; all ranks of a job in step.

    Rejected records go to the dead letters, and their offsets count as consumed; training waits while too many of them
    wait for the broker. What has been learned is saved when the checkpoint finds it due, and once more at the end, also
    where the source can give no more: its records may have expired by the next start.
    """
    with closing(checkpoint):
        checkpoint.begin(parts.source.open(checkpoint.progress))
        checkpoint.tick()  # where a first start began is on its way to the disk before anything is learned
        try:
            with parts.source.batches(turns.patience_s) as batches:
                for batch, rows, said in turns.of(batches, lambda: (len(parts.learner.replay), *checkpoint.wishes())):
                    held, *wishes = zip(*said, strict=True)
                    if batch is not None:
                        began = time.perf_counter()
                        parts.dead_letters.write(batch.rejected)
                        parts.learner.step(batch, list(zip(rows, held, strict=True)))
                        checkpoint.advance(batch)
                        parts.metrics.trained(batch, time.perf_counter() - began)
                    else:
                        parts.learner.replay_when_idle(held)
                    # Alone it is looked again; with others what was said as the turn began spares an exchange.
                    due, behind, saving = map(any, wishes)
                    checkpoint.tick(None if parts.ranks.alone else (due, behind or batch is not None, saving))
                checkpoint.save()
        except SourceError:
            with suppress(SnapshotError):  # it has been said, and why it ends is the source
                checkpoint.save()
            raise
