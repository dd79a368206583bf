"""FastAPI as ours is measured beside it: python -m tests.benchmarks.serve.rivals echo|forward PORT.

Each answers POST /predict with a body like ours, read by the pydantic model that a user of FastAPI would write.
"""

import itertools
import sys

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, create_model

from tests.benchmarks.serve.net import FEATURES, HIDDEN

Instance = create_model("Instance", **dict.fromkeys(FEATURES, (float, ...)))  # type: ignore[call-overload]


class Request(BaseModel):
    instances: list[Instance]  # type: ignore[valid-type]
    balance: float = 0.5
    interval: float | None = None


class Answer(BaseModel):
    predictions: list[float]


def rows(request: Request) -> torch.Tensor:
    return torch.tensor([[getattr(instance, name) for name in FEATURES] for instance in request.instances])


def make_net() -> torch.nn.Module:
    widths = (len(FEATURES), *HIDDEN)
    layers: list[torch.nn.Module] = []
    for width_in, width_out in itertools.pairwise(widths):
        layers += [torch.nn.Linear(width_in, width_out), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(HIDDEN[-1], 1)).eval().requires_grad_(False)


def echo() -> FastAPI:
    """Parses, and answers a constant."""
    app = FastAPI()

    @app.post("/predict")
    async def predict(request: Request) -> Answer:
        return Answer(predictions=[0.5] * len(request.instances))

    return app


def forward() -> FastAPI:
    """The forward pass in the handler."""
    app = FastAPI()
    net = make_net()

    @app.post("/predict")
    async def predict(request: Request) -> Answer:
        with torch.inference_mode():
            return Answer(predictions=net(rows(request))[:, 0].tolist())

    return app


def main() -> None:
    name, port = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    app = {"echo": echo, "forward": forward}[name]()
    uvicorn.run(
        app, host="127.0.0.1", port=port, loop="uvloop", http="httptools", access_log=False, log_level="warning"
    )


if __name__ == "__main__":
    main()
