"""Requests a second and the 99th percentile of all servers side by side, in rounds that take turns.

Requests a second of CPU time are what a core of its own would give; they also hold where others use the machine.
"""

import importlib.util
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from service.broker import free_port
from tests.benchmarks.serve.net import body, service_command, with_model, write_config
from tests.benchmarks.serve.processes import Load, cpu_s, on_cores, python, wrk

OURS = {"tailstream": "mixture", "tailstream-gaussian": "gaussian"}  # and their heads
CLIENTS = (16, 64)
MANY = 1000


class Measured(NamedTuple):
    """One server under one sort of load."""

    server: str
    clients: int
    instances: int


def measure(folder: Path, rounds: int, seconds: int) -> list[dict[str, Any]]:
    """A run for each server and load, the median of the rounds."""
    single, many = body(1), body(MANY)
    ports = {name: free_port() for name in (*OURS, "echo", "forward", "litserve")}
    configs = {name: write_config(folder / name, ports[name], head=head) for name, head in OURS.items()}
    commands = {
        **{name: service_command(with_model(config)) for name, config in configs.items()},
        **{name: python("-m", "tests.benchmarks.serve.rivals", name, str(ports[name])) for name in ("echo", "forward")},
    }
    if importlib.util.find_spec("litserve") is None:
        print("litserve is left out, as it is not installed: pip install litserve")
    else:
        commands["litserve"] = python("-m", "tests.benchmarks.serve.lit", str(ports["litserve"]))
    # In batches ours is asked for an interval at any balance, the gaussian head at the balance that it is trained at.
    bodies = {
        "tailstream": {1: single, MANY: body(MANY, balance=0.3, interval=0.9)},
        "tailstream-gaussian": {MANY: body(MANY, balance=1.0)},
    }
    loads = [
        Measured(name, clients, instances)
        for instances in (1, MANY)
        for clients in CLIENTS
        for name in commands
        if instances in bodies.get(name, (1, MANY))
    ]
    found: dict[Measured, list[Load]] = {load: [] for load in loads}
    busy_s: dict[Measured, float] = dict.fromkeys(loads, 0.0)
    with ExitStack() as running:
        pids = {
            name: running.enter_context(on_cores(command, folder / f"{name}.log", ports[name]))
            for name, command in commands.items()
        }
        for turn in range(rounds + 1):
            for load in loads:
                sent = bodies.get(load.server, {1: single, MANY: many})[load.instances]
                before_s = cpu_s(pids[load.server])
                # The first round warms up and is not counted.
                result = wrk(ports[load.server], sent, load.clients, seconds if turn else 1)
                if result.failed:
                    raise SystemExit(f"{load} failed {result.failed} times; see {folder / load.server}.log")
                if turn:
                    found[load].append(result)
                    busy_s[load] += cpu_s(pids[load.server]) - before_s
    return [
        {
            **load._asdict(),
            "requests_per_s": statistics.median(result.requests_per_s for result in results),
            "p99_ms": statistics.median(result.p99_ms for result in results),
            "requests_per_cpu_s": sum(result.requests for result in results) / busy_s[load],
        }
        for load, results in found.items()
    ]


def ratios(runs: list[dict[str, Any]], of: str, ours: str, theirs: str, instances: int) -> list[float]:
    """How many times the figure of another server, for each number of clients."""
    found = {(run["server"], run["clients"]): run[of] for run in runs if run["instances"] == instances}
    return [float(found[ours, clients] / found[theirs, clients]) for clients in CLIENTS]
