"""The network of classes: running feature scaling, a body, a linear head that grows, and the decayed class counts.

As with `trainer.model`, everything here is what inference needs, and all of it is in `model.safetensors`.
"""

import json
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from trainer.class_predictive import ClassPriors
from trainer.config import ModelSettings
from trainer.losses import ClassCounts
from trainer.model import FeatureScaler, build_body, prefixed, unprefixed
from trainer.schema import FeatureSchema

FIRST_LENGTH: Final = 1.5  # of a new class's weights: with none the body learns nothing at first, long ones stay random
COUNTS_DECAY: Final = 1 - 1 / 65536  # a row, of the class counts: the window of the label density


class Logits(NamedTuple):
    """What a classifier says of B rows."""

    values: Tensor  # (B, C)
    features: Tensor  # (B, H), what the head saw


class ClassHead(nn.Module):
    """One linear layer with an output for each class."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(0, in_features))
        self.bias = nn.Parameter(torch.zeros(0))

    def grow(self, classes: int) -> None:
        """Adds outputs up to a number; the parameters are new objects, what they held is kept.

        What a class begins with depends on its number alone, so that a learner that resumed adds the same.
        """
        random, width = torch.Generator(), self.weight.shape[1]
        weights, more = [self.weight.detach()], classes - len(self.bias)
        for number in range(len(self.bias), classes):
            random.manual_seed(number)
            fresh = torch.randn(1, width, generator=random) * (FIRST_LENGTH / width**0.5)
            weights.append(fresh.to(self.weight.device, non_blocking=True))
        self.weight = nn.Parameter(torch.cat(weights))
        self.bias = nn.Parameter(torch.cat([self.bias.detach(), self.bias.new_zeros(more)]))

    def forward(self, features: Tensor) -> Logits:
        """Features (B, H) -> logits (B, C)."""
        return Logits(nn.functional.linear(features, self.weight, self.bias), features)


class ClassModel(nn.Module):
    """Feature scaling, body, head and class counts in one."""

    def __init__(self, body: nn.Module, head: ClassHead, columns: int) -> None:
        super().__init__()
        self.features = FeatureScaler(columns)
        self.body = body
        self.head = head
        self.labels = ClassCounts(0, decay=COUNTS_DECAY)

    def grow(self, classes: int) -> None:
        """Makes room for classes up to a number."""
        self.head.grow(classes)
        self.labels.grow(classes)

    def forward(self, numeric: Tensor, categorical: Tensor) -> Logits:
        """Raw columns (B, F), NaN where missing, and buckets (B, C) -> logits of the classes."""
        return self.classify(self.features(numeric), categorical)

    def classify(self, columns: Tensor, categorical: Tensor) -> Logits:
        """Standardised columns (B, 2F), as `features` gives them, and buckets (B, C) -> logits of the classes."""
        logits: Logits = self.head(self.body(columns, categorical))
        return logits


def build_class_model(schema: FeatureSchema, model: ModelSettings) -> ClassModel:
    """A fresh model without classes, its weights drawn from torch's global generator.

    Raises:
        ConfigError: a body of the user's own cannot be imported, or has no `out_features`.
    """
    body, out_features = build_body(schema, model)
    return ClassModel(body, ClassHead(out_features), len(schema.numeric_columns))


def classifier_state(model: ClassModel, names: Sequence[str], priors: ClassPriors) -> dict[str, Tensor]:
    """What predicting needs, by the names it has in `model.safetensors`."""
    return {
        **prefixed("model", model.state_dict()),
        **prefixed("priors", priors.to_tensors()),
        "classes.names": names_to_tensor(names),
    }


def load_classifier(state: dict[str, Tensor], model: ClassModel) -> tuple[list[str], ClassPriors]:
    """Loads what `classifier_state` gave into a fresh model; returns the classes and their priors.

    Raises:
        RuntimeError, KeyError: it is of another model.
    """
    names = names_from_tensor(state["classes.names"])
    model.grow(len(names))
    model.load_state_dict(unprefixed("model", state))
    return names, ClassPriors.from_tensors(unprefixed("priors", state))


def names_to_tensor(names: Sequence[str]) -> Tensor:
    """Names as bytes, for a safetensors file."""
    return torch.frombuffer(bytearray(json.dumps(list(names)).encode()), dtype=torch.uint8)


def names_from_tensor(tensor: Tensor) -> list[str]:
    """What `names_to_tensor` was given."""
    names: list[str] = json.loads(tensor.numpy().tobytes())
    return names
