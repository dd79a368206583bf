"""A small skewed stream, the settings to learn it with, and the parts that do."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.batching import Batch, Batcher, Record
from trainer.config import Settings
from trainer.learner import Learner
from trainer.schema import FeatureSchema

FEATURES = {"size": "numeric", "age": "numeric", "kind": "categorical"}
CPU = torch.device("cpu")


def make_settings(store: Path | str = "./snapshots", **tables: Any) -> Settings:
    """Small enough for a test to train in milliseconds; a table given is laid over its own."""
    base: dict[str, Any] = {
        "device": "cpu",
        "kafka": {"bootstrap_servers": ["127.0.0.1:1"], "topic": "prices"},
        "schema": {"label": "price", "id": "id", "features": FEATURES},
        "batch": {"size": 32},
        "learner": {"step_rows": 16, "replay_steps": 2, "replay_rows": 128, "label_memory": 24},
        "model": {"hidden": [12], "embedding": 3, "category_buckets": 16},
        "store": {"url": str(store), "interval_s": 0.0},
    }
    for name, table in tables.items():
        base[name] = {**base.get(name, {}), **table} if isinstance(table, dict) else table
    return Settings(**base)


def make_schema(settings: Settings) -> FeatureSchema:
    return FeatureSchema(settings.record_schema, settings.model.category_buckets)


def make_learner(settings: Settings, device: torch.device = CPU) -> Learner:
    return Learner(settings, make_schema(settings), device)


def values(rows: int, seed: int = 0) -> list[bytes]:
    """Records: most prices are low, one in thirty is far above, and the features say which."""
    random = np.random.default_rng(seed)
    records = []
    for number in range(rows):
        rare = bool(random.random() < 1 / 30)
        size = float(random.exponential()) + 3 * rare
        price = 10 * size + (100 + 40 * size if rare else 0) + float(random.normal())
        age = None if random.random() < 0.1 else float(random.integers(0, 50))
        kind = "gold" if rare else str(random.choice(["tin", "iron"]))
        records.append({"id": number, "size": size, "age": age, "kind": kind, "price": price})
    return [json.dumps(record).encode() for record in records]


def as_records(given: Sequence[bytes | None], partition: int = 0, first: int = 0) -> list[Record]:
    return [Record(partition, first + n, 1000.0 + n, None, value) for n, value in enumerate(given)]


def make_batches(settings: Settings, rows: int, seed: int = 0) -> list[Batch]:
    """The stream in batches, the last one perhaps smaller."""
    batcher = Batcher(make_schema(settings), settings.batch.size)
    found = list(batcher.add(as_records(values(rows, seed))))
    return [*found, batcher.flush()] if batcher.pending else found
