"""How long requests take while a trainer is busy on the same cores, beside the time when it stands still."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from service.broker import EmbeddedBroker, free_port
from tests.benchmarks.serve.net import body, rows, service_command, write_config
from tests.benchmarks.serve.offered import offer
from tests.benchmarks.serve.processes import CORES, START_S, cpu_s, on_cores, python, wrk
from trainer.config import load
from trainer.publish import publish
from trainer.schema import FeatureSchema

RECORDS = 250_000  # more than are learned in the meantime
SPELL_S = 4
CLIENTS = 16
RATE = 500.0  # requests a second, of those that are offered; the others send as soon as they are answered
BUSY = 0.5  # of a core, at least; it competes for two with the service and with the load


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """p99 by turns with the trainer running and stopped: at a rate, and as many requests as can be answered."""
    port, cores = free_port(), set(CORES[:2])
    with ExitStack() as running:
        broker = EmbeddedBroker(folder / "broker.log")
        running.callback(broker.stop)
        config = write_config(folder, port, broker=broker.bootstrap_server)
        settings = load(config)
        publish(settings, FeatureSchema.of(settings), _records(), partitions=1)
        command = python("-m", "trainer", "--config", str(config))
        trainer = psutil.Process(running.enter_context(on_cores(command, folder / "trainer.log", cores=cores)))
        deadline = time.monotonic() + START_S
        while not any(settings.store.path.glob("*/manifest.json")):
            if time.monotonic() > deadline:
                raise SystemExit(f"the trainer wrote nothing; see {folder / 'trainer.log'}")
            time.sleep(0.1)
        _send(trainer, signal.SIGSTOP)
        running.enter_context(on_cores(service_command(config), folder / "service.log", port, cores))
        wrk(port, body(1), CLIENTS, 2)
        p99_ms: dict[str, list[float]] = {}
        learned: list[float] = []
        for _ in range(rounds):
            for state, number in (("busy", signal.SIGCONT), ("still", signal.SIGSTOP)):
                _send(trainer, number)
                before_s, begun_s = cpu_s(trainer.pid), time.monotonic()
                times = offer(port, body(1), rate=RATE, seconds=SPELL_S, clients=CLIENTS).times_s
                if set(times) != {200}:
                    raise SystemExit(f"requests failed: { {status: len(of) for status, of in times.items()} }")
                p99_ms.setdefault(f"offered_{state}", []).append(float(np.quantile(times[200], 0.99)) * 1e3)
                p99_ms.setdefault(f"most_{state}", []).append(wrk(port, body(1), CLIENTS, SPELL_S).p99_ms)
                if state == "busy":
                    learned.append((cpu_s(trainer.pid) - before_s) / (time.monotonic() - begun_s))
        _send(trainer, signal.SIGCONT)
    if min(learned) < BUSY:
        raise SystemExit(f"the trainer took {min(learned):.2f} of a core: it was not busy all the time")
    medians = {f"{name}_p99_ms": float(np.median(of)) for name, of in p99_ms.items()}
    return {
        "trainer_cores": float(np.median(learned)),
        **medians,
        "p99_ratio": medians["offered_busy_p99_ms"] / medians["offered_still_p99_ms"],
        "most_p99_ratio": medians["most_busy_p99_ms"] / medians["most_still_p99_ms"],
    }


def _send(trainer: psutil.Process, number: signal.Signals) -> None:
    """To the trainer and the process that it reads the topic by."""
    for process in (trainer, *trainer.children(recursive=True)):
        process.send_signal(number)


def _records() -> Iterator[bytes]:
    generator = np.random.default_rng(0)
    for number, record in enumerate(rows(RECORDS // 10)):
        for copy in range(10):
            label = 10 * record["x00"] + 20 * float(np.exp(generator.normal()))
            yield json.dumps({**record, "x01": (number + copy) % 17, "y": label}).encode()
