"""What all servers of the benchmark are asked: 20 numbers a row; and the model of ours, in a store."""

import json
import random
from pathlib import Path
from typing import Any

import torch

from tests.service.store import fit, manifest
from trainer.calibration import LevelCalibration
from trainer.config import Settings, load
from trainer.model import build_model, inference_state
from trainer.schema import FeatureSchema
from trainer.snapshot import SnapshotStore

FEATURES = [f"x{number:02}" for number in range(20)]
HIDDEN = (128, 128)
CONFIG = """
[kafka]
bootstrap_servers = ["127.0.0.1:1"]
topic = "benchmark"
[schema]
label = "y"
[schema.features]
{features}
[model]
head = "{head}"
hidden = {hidden}
[store]
url = "{store}"
[service]
port = {port}
{service}
"""


def write_config(folder: Path, port: int, head: str = "mixture", service: str = "") -> Path:
    """Writes a configuration, and a model that fits it into its store."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tailstream.toml"
    features = "\n".join(f'{name} = "numeric"' for name in FEATURES)
    path.write_text(
        CONFIG.format(
            features=features, head=head, hidden=list(HIDDEN), store=folder / "store", port=port, service=service
        )
    )
    write_model(load(path))
    return path


def write_model(settings: Settings, seed: int = 0) -> None:
    """Writes a model that has learned a little as the next version."""
    torch.manual_seed(seed)
    schema = FeatureSchema.of(settings)
    model = build_model(schema, settings.model, settings.learner)
    numeric = torch.randn(2048, len(FEATURES))
    label = 10 * numeric[:, 0] + 20 * torch.randn(2048).exp() + seed
    grid = fit(model, numeric, torch.zeros(2048, 0, dtype=torch.int64), label)
    settings.store.path.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in inference_state(model, grid, LevelCalibration()).items()}
    SnapshotStore(settings.store.path).write(manifest(settings), tensors, {})


def body(instances: int, **asked: Any) -> bytes:
    """A request for so many rows."""
    random_ = random.Random(0)
    rows = [{name: round(random_.gauss(0, 1), 4) for name in FEATURES} for _ in range(instances)]
    return json.dumps({"instances": rows, **asked}).encode()
