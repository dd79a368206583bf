"""A thousand versions taken one after another while requests come: none fails, none waits for long, none is mixed."""

import json
import threading
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from service.broker import free_port
from service.predictor import Predictor
from service.schemas import question_decoder
from tests.benchmarks.serve.net import body, model_tensors, service_command, write_config, write_version
from tests.benchmarks.serve.offered import offer
from tests.benchmarks.serve.processes import on_cores
from trainer.config import load
from trainer.schema import FeatureSchema
from trainer.snapshot import SnapshotStore

MODELS = 8  # that differ, and take turns
ROWS = 3
ASKED = {"balance": 0.3, "interval": 0.9}
RATE = 1000.0  # requests a second
CLIENTS = 16
POLL_S = 0.1  # half of the default: swaps come faster than any trainer makes them
PAUSE_S = 0.03  # beyond a poll, so that no version is passed over
STILL_S = 15.0  # without a swap, before and after


def measure(folder: Path, swaps: int) -> dict[str, Any]:
    """What requests are answered during so many swaps, and how fast beside a time without any."""
    port = free_port()
    config = write_config(folder, port, service=f"poll_interval_s = {POLL_S}")
    settings = load(config)
    store = SnapshotStore(settings.store.path)
    models = [model_tensors(settings, seed) for seed in range(MODELS)]
    question = question_decoder(FeatureSchema.of(settings), settings.service)(body(ROWS, **ASKED))
    own: list[dict[str, list[float]]] = []  # what each model answers, alone and in this process
    for tensors in models:
        snapshot = store.load(write_version(settings, tensors), training=False)
        (answer,) = Predictor.from_snapshot(snapshot, settings).answer([question])
        own.append(
            {
                "predictions": list(answer.predictions),
                "lower": list(answer.lower or ()),
                "upper": list(answer.upper or ()),
            }
        )
    done = threading.Event()

    def swap() -> None:
        begun_s = time.monotonic()
        for number in count(MODELS):
            due_s = begun_s + (number - MODELS) * (POLL_S + PAUSE_S)
            if done.wait(max(0.0, due_s - time.monotonic())):
                return
            write_version(settings, models[number % MODELS])
            if not number % 50:
                store.prune(time.time())

    with on_cores(service_command(config), folder / "service.log", port):
        sent = body(ROWS, **ASKED)
        offer(port, sent, rate=RATE, seconds=2, clients=CLIENTS)
        still = [offer(port, sent, rate=RATE, seconds=STILL_S, clients=CLIENTS)]
        writer = threading.Thread(target=swap)
        writer.start()
        try:
            seconds = swaps * (POLL_S + PAUSE_S) * 1.1  # a poll may pass over one that came late
            swapping = offer(port, sent, rate=RATE, seconds=seconds, clients=CLIENTS)
        finally:
            done.set()
            writer.join()
        still.append(offer(port, sent, rate=RATE, seconds=STILL_S, clients=CLIENTS))
    versions: Counter[int] = Counter()
    mixed = 0
    for text, times in swapping.answers.items():
        answer = json.loads(text)
        version = answer.get("model_version")
        if version is None:
            continue  # a refusal, which is counted by its status
        versions[version] += times
        expected = own[(version - 1) % MODELS]
        mixed += times * any(answer[name] != values for name, values in expected.items())
    still_ms = _p99_ms([of.times_s.get(200, []) for of in still])
    swapping_ms = _p99_ms([swapping.times_s.get(200, [])])
    return {
        "swaps": len(versions) - 1,
        "answers": versions.total(),
        "failed": sum(len(times) for status, times in swapping.times_s.items() if status != 200),
        "mixed": mixed,
        "still_p99_ms": still_ms,
        "p99_ms": swapping_ms,
        "p99_ratio": swapping_ms / still_ms,
    }


def _p99_ms(times_s: list[list[float]]) -> float:
    return float(np.quantile(np.concatenate(times_s), 0.99) * 1e3)
