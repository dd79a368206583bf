"""What GET /model says: the manifest of the snapshot in use, without what only a resuming trainer needs."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from service.metrics import age_s
from trainer.manifest import Manifest


class PartitionState(BaseModel):
    """How far one partition of the topic has been learned."""

    next_offset: int
    trained: int
    rejected: int
    skipped: int


class NewestSample(BaseModel):
    """A newest label beside what the model said before it learned it."""

    time_s: float = Field(description="Event time, seconds since the epoch.")
    label: float | str
    prediction: float | str


class ModelResponse(BaseModel):
    """The model in use."""

    model_config = ConfigDict(protected_namespaces=(), populate_by_name=True)

    version: int
    created_s: float = Field(description="When the snapshot was written, seconds since the epoch.")
    age_s: float = Field(description="Seconds since then.")
    healthy: bool = Field(description="Whether its recent error is better than a constant answer's.")
    trouble: str | None = Field(description="Why the newest snapshot is not in use, or should not be.")
    pinned: int | None = Field(description="The version that the service stays with, null where it follows the newest.")
    step: int = Field(description="Optimiser steps taken.")
    samples: int = Field(description="Rows trained on.")
    samples_per_second: float
    topic: str
    partitions: dict[int, PartitionState]
    lag_records: int | None = Field(description="Records not yet trained on, at the snapshot.")
    newest_append_s: float = Field(description="Timestamp of the youngest trained record, seconds since the epoch.")
    record_schema: dict[str, Any] = Field(alias="schema")
    task: str
    model: dict[str, Any] = Field(description="The model's configuration.")
    learner: dict[str, Any] = Field(description="The learner's configuration.")
    train_loss: float | None
    noise_sigma: float | None = Field(description="Label standard deviations.")
    noise_sigma_label_units: float | None
    nonfinite_steps: int = Field(description="Steps left out because their loss or gradient was not finite.")
    metrics: dict[str, Any] = Field(description="Prequential metrics: by window, then by balance.")
    newest: list[NewestSample]


def model_response(manifest: Manifest, trouble: str | None, pinned: int | None) -> ModelResponse:
    """What is said of a model now."""
    known = manifest.model_dump(include=set(ModelResponse.model_fields))
    return ModelResponse.model_validate({**known, "age_s": age_s(manifest), "trouble": trouble, "pinned": pinned})
