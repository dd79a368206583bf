"""A model that has learned something, and snapshots of it."""

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from service.answers import Asked
from service.predictor import Predictor, Question
from trainer.batching import Batcher, PartitionProgress, Record
from trainer.calibration import LevelCalibration
from trainer.config import Settings
from trainer.label_density import LabelDensity, LabelGrid
from trainer.learner import Learner
from trainer.manifest import Manifest, Sample
from trainer.model import Model, build_model
from trainer.schema import Columns, FeatureSchema
from trainer.snapshot import Snapshot, SnapshotStore

CLASS_ROWS = 32  # of a batch, and of a step, where classes are learned
TASKS = ("regression", "classification")
METRICS = {
    window: {
        "rows": 320.0,
        **{
            answer: {
                "mae": mae,
                "rmse": mae + 1,
                "balanced_mae": mae + 2,
                "mae_many": mae + 3,
                "mae_medium": mae + 4,
                "mae_few": None,
            }
            for answer, mae in (("0", 10.0), ("1", 20.0), ("median", 30.0))
        },
    }
    for window in ("whole", "fading")
}


def make_settings(
    store: Path,
    *,
    task: str = "regression",
    hidden: tuple[int, ...] = (16, 16),
    head: str = "mixture",
    **service: Any,
) -> Settings:
    of_classes = task == "classification"
    return Settings(
        task=task,
        kafka={"bootstrap_servers": ["127.0.0.1:1"], "topic": "flights"},
        schema={
            "label": "outcome" if of_classes else "arr_delay",
            "id": "flight",
            "time": "time_hour",
            "features": {
                "dep_delay": "numeric",
                "weather.wind": "numeric",
                "carrier": "categorical",
                "cancelled": "boolean",
                "time_hour": "timestamp",
                "sensors": {"kind": "vector", "size": 3},
            },
        },
        batch={"size": CLASS_ROWS} if of_classes else {},
        learner={"step_rows": CLASS_ROWS, "replay_rows": 512, "replay_steps": 2} if of_classes else {},
        model={
            "hidden": list(hidden),
            "embedding": 4,
            "category_buckets": 64,
            "head": "linear" if of_classes else head,
        },
        store={"url": str(store)},
        service={"port": 0, "poll_interval_s": 0.02, **service},
    )


def instance(i: int) -> dict[str, Any]:
    """Record number i; some miss a feature."""
    record: dict[str, Any] = {
        "dep_delay": 7.25 * (i % 13) - 20,
        "weather": {"wind": 1.5 * (i % 7)},
        "carrier": ("UA", "AA", "DL", "never seen")[i % 4],
        "cancelled": i % 3 == 0,
        "time_hour": f"2013-{1 + i % 12:02}-{1 + i % 28:02}T{i % 24:02}:00:00Z",
        "sensors": [0.1 * i, -1.0, 3.5],
    }
    if i % 5 == 4:
        record.pop(("dep_delay", "weather", "carrier", "cancelled", "sensors")[i // 5 % 5])
    return record


def outcome(record: dict[str, Any]) -> str | int:
    """The class of a record: one of four, which its features say."""
    delay = record.get("dep_delay") or 0
    return "early" if delay < 0 else 7 if record.get("carrier") == "DL" else "late" if delay > 55 else "on time"


def learned(settings: Settings, rows: int, seed: int = 0, without: str | int | None = None) -> Learner:
    """A learner of the outcomes of so many records, those `without` left out."""
    schema = FeatureSchema.of(settings)
    learner = Learner(settings.model_copy(update={"seed": seed}), schema, torch.device("cpu"))
    batcher = Batcher(schema, settings.batch.size)
    records = [{**instance(i), "outcome": outcome(instance(i))} for i in range(rows)]
    values = [_json(record) for record in records if record["outcome"] != without]
    for batch in batcher.add(Record(0, i, 0.0, None, value) for i, value in enumerate(values)):
        learner.step(batch)
    return learner


def fitted(settings: Settings, seed: int) -> tuple[Model, dict[str, Tensor]]:
    """A model after a few steps, and the tensors of its label grid."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        schema = FeatureSchema.of(settings)
        model = build_model(schema, settings.model, settings.learner)
        records = [schema.decode_instance(_json({**instance(i), "arr_delay": 0})) for i in range(320)]
        numeric = torch.from_numpy(schema.numeric(records))
        categorical = torch.from_numpy(schema.categorical(records))
        label = 2 * numeric[:, 0].nan_to_num(5.0) + 10 * torch.randn(320) + seed
        return model, fit(model, numeric, categorical, label).to_tensors()


def fit(model: Model, numeric: Tensor, categorical: Tensor, label: Tensor) -> LabelGrid:
    """A few steps on rows (B, F), (B, C) and labels (B,); returns the density of the labels."""
    model.observe(numeric, label)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(20):
        optimiser.zero_grad()
        density = model.components(model(numeric, categorical))
        offsets = (model.labels.standardise(label)[:, None] - density.means) / density.scales
        (-(density.log_weights - density.scales.log() - offsets.square() / 2).logsumexp(1).mean()).backward()
        optimiser.step()
    labels = LabelDensity()
    labels.observe(label)
    return labels.grid()


def write_snapshot(
    settings: Settings, seed: int = 0, calibration: LevelCalibration | None = None, **changes: Any
) -> Manifest:
    """Writes a fitted model as the next version; `changes` go into its manifest."""
    if settings.task == "classification":
        return write_learned(settings, learned(settings, 320, seed), **changes)
    model, grid = fitted(settings, seed)
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors |= {f"grid.{name}": tensor.contiguous() for name, tensor in grid.items()}
    tensors |= {
        f"calibration.{name}": tensor for name, tensor in (calibration or LevelCalibration()).state_dict().items()
    }
    return _write(settings, manifest(settings, **changes), tensors)


def write_learned(settings: Settings, learner: Learner, **changes: Any) -> Manifest:
    """Writes a classifier as the next version; `changes` go into its manifest."""
    known = {"noise_sigma": None, "noise_sigma_label_units": None, "newest": [], "metrics": learner.read().metrics}
    return _write(settings, manifest(settings, **{**known, **changes}), learner.inference_state())


def _write(settings: Settings, told: Manifest, tensors: dict[str, Tensor]) -> Manifest:
    settings.store.path.mkdir(parents=True, exist_ok=True)
    return SnapshotStore(settings.store.path).write(told, tensors, {})


def manifest(settings: Settings, **changes: Any) -> Manifest:
    known: dict[str, Any] = {
        "version": 0,
        "created_s": 0.0,
        "step": 20,
        "samples": 320,
        "cluster_id": "cluster",
        "topic": settings.kafka.topic,
        "topic_id": None,
        "partitions": {0: PartitionProgress(next_offset=330, trained=320, rejected=8, skipped=2)},
        "lag_records": 42,
        "newest_append_s": 1.7e9,
        "task": settings.task,
        "record_schema": settings.record_schema.model_dump(mode="json"),
        "model": settings.model.model_dump(mode="json"),
        "learner": settings.learner.model_dump(mode="json"),
        "healthy": True,
        "train_loss": 0.5,
        "noise_sigma": 0.25,
        "noise_sigma_label_units": 10.0,
        "samples_per_second": 1234.5,
        "nonfinite_steps": 0,
        "metrics": METRICS,
        "newest": [Sample(time_s=1.7e9, label=3.0, prediction=4.0)],
    }
    return Manifest(**{**known, **changes})


def in_process(settings: Settings, version: int) -> Predictor:
    """The model of a version, as a program without HTTP would load it."""
    snapshot: Snapshot = SnapshotStore(settings.store.path).load(version, training=False)
    return Predictor.from_snapshot(snapshot, settings)


def columns_of(settings: Settings, rows: int) -> Columns:
    """The features of the first records."""
    schema = FeatureSchema.of(settings)
    decoded = [schema.decode_instance(_json(instance(i))) for i in range(rows)]
    return Columns(schema.numeric(decoded), schema.categorical(decoded))


def answer_of(predictor: Predictor, columns: Columns, asked: dict[str, Any]) -> dict[str, Any]:
    """What a request with these options is answered by a predictor in process."""
    question = Question(columns, Asked(**{"balance": 0.5, **asked}))
    answer: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(predictor.answer([question])[0]))
    return answer


def _json(record: dict[str, Any]) -> bytes:
    return msgspec.json.encode(record)
