"""A body of the user's own: imported by the name that the configuration gives, and tried before anything is learned."""

import copy
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import cast

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.schema import FeatureSchema


def own_body(name: str, schema: FeatureSchema) -> nn.Module:
    """Calls `my_module:make_body` with the schema, and tries what it made on two rows.

    Raises:
        ConfigError: it cannot be imported, raises, or gives what a head cannot take; the message says which, and where.
    """
    make = _imported(name)
    try:
        body = make(schema)
    except Exception as error:  # it is the user's code: whatever it raises
        raise ConfigError(f"model.body: {name!r} raised {_told(error)}") from error
    if not isinstance(body, nn.Module):
        raise ConfigError(f"model.body: {name!r} returned {type(body).__name__}, not a torch.nn.Module")
    out_features = getattr(body, "out_features", None)
    if not isinstance(out_features, int):
        raise ConfigError(
            f"model.body: {name!r} made {type(body).__name__}, which has no integer out_features: the width that its "
            "forward returns"
        )
    for parameter, value in body.named_parameters():
        if value.dtype != torch.float32:
            raise ConfigError(f"model.body: {name!r}: the parameter {parameter!r} is {value.dtype}, not torch.float32")
    _try(body, name, schema, out_features)
    return body


def _imported(name: str) -> Callable[[FeatureSchema], object]:
    """The function that is named; its module may lie in the working directory."""
    module_name, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` does; a console script does not
    try:
        module: ModuleType = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(f"model.body: {module_name!r} cannot be imported: {_told(error)}") from error
        raise ConfigError(
            f"model.body: there is no module {error.name!r}, neither in {os.getcwd()} nor among what is installed"
        ) from error
    except Exception as error:
        raise ConfigError(f"model.body: {module_name!r} cannot be imported: {_told(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        where = getattr(module, "__file__", None) or module_name
        raise ConfigError(f"model.body: {where} has no function {function!r}")
    return cast("Callable[[FeatureSchema], object]", found)


def _try(body: nn.Module, name: str, schema: FeatureSchema, out_features: int) -> None:
    """Runs a copy of the body as it will be run: on one row in training, and on several when it predicts."""
    try:
        tried = copy.deepcopy(body)
    except Exception as error:
        raise ConfigError(
            f"model.body: what {name!r} made cannot be copied, as averaging needs: {_told(error)}"
        ) from error
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for rows, training in ((1, True), (2, False)):
            numeric = torch.zeros(rows, schema.numeric_width)
            largest = torch.tensor([buckets - 1 for buckets in schema.buckets], dtype=torch.int64)
            categorical = largest.expand(rows, -1).contiguous()
            tried.train(training)
            given = (
                f"{'in training' if training else 'at prediction'}, given numeric {_shape(numeric)} and categorical "
                f"{_shape(categorical)}"
            )
            try:
                out = tried(numeric, categorical)
            except Exception as error:
                raise ConfigError(f"model.body: the forward of {name!r} raised {_told(error)} {given}") from error
            if not isinstance(out, Tensor):
                raise ConfigError(f"model.body: the forward of {name!r} returned {type(out).__name__}, not a tensor")
            if out.shape != (rows, out_features) or out.dtype != torch.float32:
                raise ConfigError(
                    f"model.body: the forward of {name!r} returned {_shape(out)} {given}; as its out_features is "
                    f"{out_features}, {(rows, out_features)} torch.float32 is due"
                )


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _told(error: Exception) -> str:
    """An error with the line of the user's code at which it came up."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error}"
    others = (__file__, "<frozen", str(Path(importlib.__file__).parent), str(Path(torch.__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(others)]
    return f"{type(error).__name__}: {error}{f' ({frames[-1].filename}, line {frames[-1].lineno})' if frames else ''}"
