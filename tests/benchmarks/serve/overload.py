"""Three times the clients and requests that there is room for: how long the accepted take, and what the others get."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from service.broker import free_port
from tests.benchmarks.serve.net import body, service_command, with_model, write_config
from tests.benchmarks.serve.offered import offer
from tests.benchmarks.serve.processes import on_cores, wrk

ROWS = 200  # so that refusing a request is cheap beside answering one, as it is not with a single row
CLIENTS = 64  # that the service has room for: its queue is as long
TIMES = 3
SAMPLE_S = 0.5


def measure(folder: Path, seconds: int) -> dict[str, Any]:
    """p99 of the accepted, and the memory, beside those of as many clients as there is room for."""
    port = free_port()
    config = with_model(write_config(folder, port, service=f"max_queue = {CLIENTS}"))
    with on_cores(service_command(config), folder / "overloaded.log", port) as pid:
        wrk(port, body(ROWS), CLIENTS, 2)
        full = wrk(port, body(ROWS), CLIENTS, max(5, seconds // 4))
        server = psutil.Process(pid)
        before_bytes = server.memory_info().rss
        sizes, done = [before_bytes], threading.Event()

        def watch() -> None:
            while not done.wait(SAMPLE_S):
                sizes.append(server.memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            times_s = offer(
                port, body(ROWS), rate=TIMES * full.requests_per_s, seconds=seconds, clients=TIMES * CLIENTS
            ).times_s
        finally:
            done.set()
            watcher.join()
    p99_ms = float(np.quantile(times_s.get(200, [float("nan")]), 0.99) * 1e3)
    return {
        "seconds": seconds,
        "capacity_requests_per_s": full.requests_per_s,
        "offered_requests": sum(map(len, times_s.values())),
        "accepted": len(times_s.get(200, [])),
        "refused_503": len(times_s.get(503, [])),
        "other": full.failed + sum(len(times) for status, times in times_s.items() if status not in (200, 503)),
        "full_p99_ms": full.p99_ms,
        "p99_ms": p99_ms,
        "p99_ratio": p99_ms / full.p99_ms,
        "rss_mib": before_bytes / 2**20,
        "rss_ratio": max(sizes) / before_bytes,
    }
