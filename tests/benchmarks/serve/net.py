"""What all servers of the benchmark are asked: 20 numbers a row; and the models of ours, in a store."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
bootstrap_servers = ["{broker}"]
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


def write_config(
    folder: Path, port: int, *, head: str = "mixture", service: str = "", broker: str = "127.0.0.1:1"
) -> Path:
    """Writes a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tailstream.toml"
    path.write_text(
        CONFIG.format(
            broker=broker,
            features="\n".join(f'{name} = "numeric"' for name in FEATURES),
            head=head,
            hidden=list(HIDDEN),
            store=folder / "store",
            port=port,
            service=service,
        )
    )
    return path


def service_command(config: Path) -> list[str]:
    """What starts a service of a configuration."""
    return [sys.executable, "-m", "service", "serve", "--config", str(config)]


def with_model(config: Path) -> Path:
    """The configuration, whose store now has a model that fits it."""
    settings = load(config)
    write_version(settings, model_tensors(settings))
    return config


def model_tensors(settings: Settings, seed: int = 0) -> dict[str, Tensor]:
    """A model that has learned a little."""
    torch.manual_seed(seed)
    schema = FeatureSchema.of(settings)
    model = build_model(schema, settings.model, settings.learner)
    numeric = torch.randn(2048, len(FEATURES))
    label = 10 * numeric[:, 0] + 20 * torch.randn(2048).exp() + seed
    grid = fit(model, numeric, torch.zeros(2048, 0, dtype=torch.int64), label)
    return {name: tensor.contiguous() for name, tensor in inference_state(model, grid, LevelCalibration()).items()}


def write_version(settings: Settings, tensors: dict[str, Tensor]) -> int:
    """Writes a model as the next version, and gives its number."""
    settings.store.path.mkdir(parents=True, exist_ok=True)
    return SnapshotStore(settings.store.path).write(manifest(settings), tensors, {}).version


def rows(instances: int, seed: int = 0) -> list[dict[str, float]]:
    """So many records, without a label."""
    random_ = random.Random(seed)
    return [{name: round(random_.gauss(0, 1), 4) for name in FEATURES} for _ in range(instances)]


def body(instances: int, **asked: Any) -> bytes:
    """A request for so many rows."""
    return json.dumps({"instances": rows(instances), **asked}).encode()
