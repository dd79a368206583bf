"""The loop: records come in batches; each is learned from, then its offsets and the new state are saved together."""

import threading
import time

from trainer.batching import Batcher, batches
from trainer.checkpoint import Checkpoint, Parts

POLL_RECORDS = 2048


def train(parts: Parts, checkpoint: Checkpoint, batcher: Batcher, max_wait_s: float, stop: threading.Event) -> None:
    """Learns from the source until told to stop, or until the source has no more.

    Rejected records go to the dead letters, and their offsets count as consumed. What has been learned is saved when
    the checkpoint finds it due, and once more at the end.
    """
    try:
        parts.source.open(checkpoint.progress)
        for batch in batches(parts.source.poll, batcher, POLL_RECORDS, max_wait_s):
            if batch is not None:
                began = time.perf_counter()
                parts.dead_letters.write(batch.rejected)
                parts.learner.step(batch)
                checkpoint.advance(batch)
                parts.metrics.trained(batch, time.perf_counter() - began)
            checkpoint.tick()
            if stop.is_set() or (parts.source.exhausted and batch is None and not batcher.pending):
                break
        checkpoint.save()
    finally:
        checkpoint.close()
