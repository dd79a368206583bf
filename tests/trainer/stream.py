"""A small skewed stream, the settings to learn it with, and the parts that do."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.batching import Batch, Batcher, PartitionProgress, Record
from trainer.config import Settings
from trainer.learner import Learner
from trainer.manifest import Manifest, Sample
from trainer.schema import FeatureSchema

FEATURES = {"size": "numeric", "age": "numeric", "kind": "categorical"}
CPU = torch.device("cpu")
CLASSES: dict[str, Any] = {"task": "classification", "schema": {"label": "grade"}}
TASKS: dict[str, dict[str, Any]] = {"regression": {}, "classification": CLASSES}


def make_settings(store: Path | str = "./snapshots", *, interval_s: float = 0.0, **tables: Any) -> Settings:
    """Small enough for a test to train in milliseconds; a table given is laid over its own."""
    base: dict[str, Any] = {
        "device": "cpu",
        "kafka": {"bootstrap_servers": ["127.0.0.1:1"], "topic": "prices"},
        "schema": {"label": "price", "id": "id", "features": FEATURES},
        "batch": {"size": 32},
        "learner": {
            "step_rows": 16,
            "replay_steps": 2,
            "replay_warm_up_rows": 0,
            "replay_rows": 128,
            "label_memory": 24,
        },
        "model": {"hidden": [12], "embedding": 3, "category_buckets": 16},
        "store": {"url": str(store), "interval_s": interval_s},
    }
    for name, table in tables.items():
        base[name] = {**base.get(name, {}), **table} if isinstance(table, dict) else table
    return Settings(**base)


def make_schema(settings: Settings) -> FeatureSchema:
    return FeatureSchema.of(settings)


def make_learner(settings: Settings, device: torch.device = CPU) -> Learner:
    return Learner(settings, make_schema(settings), device)


def values(rows: int, seed: int = 0) -> list[bytes]:
    """Records: most prices are low, one in thirty is far above, and the features say which; a grade goes with each."""
    random = np.random.default_rng(seed)
    records = []
    for number in range(rows):
        rare = bool(random.random() < 1 / 30)
        size = float(random.exponential()) + 3 * rare
        price = 10 * size + (100 + 40 * size if rare else 0) + float(random.normal())
        age = None if random.random() < 0.1 else float(random.integers(0, 50))
        kind = "gold" if rare else str(random.choice(["tin", "iron"]))
        grade = "rare" if rare else 7 if price < 3 else str(min(int(price / 10), 4))
        records.append({"id": number, "size": size, "age": age, "kind": kind, "price": price, "grade": grade})
    return [json.dumps(record).encode() for record in records]


def as_records(given: Sequence[bytes | None], partition: int = 0, first: int = 0) -> list[Record]:
    return [Record(partition, first + n, 1000.0 + n, None, value) for n, value in enumerate(given)]


def make_batches(settings: Settings, rows: int, seed: int = 0) -> list[Batch]:
    """The stream in batches, the last one perhaps smaller."""
    batcher = Batcher(make_schema(settings), settings.batch.size)
    found = list(batcher.add(as_records(values(rows, seed))))
    return [*found, batcher.flush()] if batcher.pending else found


def make_manifest(settings: Settings, **changes: Any) -> Manifest:
    """A manifest of no particular training."""
    fields: dict[str, Any] = {
        "version": 0,
        "created_s": 0.0,
        "step": 3,
        "samples": 96,
        "cluster_id": "cluster",
        "topic": settings.kafka.topic,
        "topic_id": None,
        "partitions": {0: PartitionProgress(next_offset=96, trained=96)},
        "lag_records": None,
        "newest_append_s": 0.0,
        "task": settings.task,
        "record_schema": settings.record_schema.model_dump(mode="json"),
        "model": settings.model.model_dump(mode="json"),
        "learner": settings.learner.model_dump(mode="json"),
        "healthy": True,
        "train_loss": 0.5,
        "noise_sigma": 0.3,
        "noise_sigma_label_units": 3.0,
        "samples_per_second": 100.0,
        "nonfinite_steps": 0,
        "metrics": {"whole": {"rows": 64.0}, "fading": {"rows": 64.0}},
        "newest": [Sample(time_s=1.0, label=2.0, prediction=3.0)],
    }
    return Manifest(**{**fields, **changes})
