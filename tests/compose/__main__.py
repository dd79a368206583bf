"""`python -m tests.compose [--json FILE] [--rows N]`; exit code 0 when all of it was seen."""

import argparse
import json
import math
import os
import signal
import sys
import time
import urllib.parse
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

from tests.compose.stack import ROOT, Stack, StepFailed, image_bytes, until

IMAGE: Final = "tailstream:0.1.0"
MAX_UP_TO_PREDICTION_S: Final = 60
MAX_IMAGE_BYTES: Final = 1_500_000_000
RATE: Final = 2000  # records a second: slow enough to kill the trainer while they come
# The first of the flights, without its label.
FLIGHT: Final[dict[str, Any]] = {
    "flight_id": "20130101-UA1545-EWR", "time_hour": "2013-01-01T10:00:00Z", "dep_delay": 2, "distance": 1400,
    "sched_minute": 315, "block_minutes": 184, "temp": 39.02, "dewp": 28.04, "humid": 64.43, "wind_speed": 12.658579,
    "precip": 0, "pressure": 1011.9, "visib": 10, "built": 1999, "seats": 149, "month": 1, "yearday": 1, "hour": 5,
    "carrier": "UA", "origin": "EWR", "dest": "IAH",
}  # fmt: skip
MEASURED: Final = (
    "tailstream_train_loss",
    "tailstream_noise_sigma",
    "tailstream_train_samples_total",
    "tailstream_train_samples_per_second",
    "sum(tailstream_consumer_lag_records)",
    "tailstream_freshness_seconds",
    'tailstream_prequential_mae{shots="all", balance="0"}',
    'tailstream_prequential_balanced_mae{balance="1"}',
    "tailstream_snapshot_seconds",
    "tailstream_model_version",
    "tailstream_model_loss",
    "tailstream_model_noise_sigma",
    "tailstream_model_samples_per_second",
    "tailstream_predictions_total",
    'tailstream_http_requests_total{handler="/predict", status="200"}',
)


def main() -> int:
    """Runs the scenario; takes everything down, whatever came of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.compose", description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--rows", type=int, default=20_000, help="flights to publish")
    parser.add_argument(
        "--pull",
        default=os.environ.get("TAILSTREAM_COMPOSE_PULL") or None,
        help="as `docker compose up --pull` takes it; default: TAILSTREAM_COMPOSE_PULL, or what Compose does",
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    project = f"tailstream-test-{os.getpid()}"
    stack = Stack(project, arguments.pull, {"ROWS": str(arguments.rows), "RATE": str(RATE)})
    try:
        figures = scenario(stack, arguments.rows)
    except StepFailed as failure:
        say(f"FAILED: {failure}")
        for service in failure.services:
            say(f"--- the last lines of {service}:\n{stack.logs(service).rstrip()}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    finally:
        _take_down(stack, project)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    say(json.dumps(figures))
    return 0


def _take_down(stack: Stack, project: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # impatience would leave containers behind
    say(f"taking {project} down")
    try:
        stack.down()
    except StepFailed as failure:
        say(f"something of {project} may be left: {failure}")


def scenario(stack: Stack, rows: int) -> dict[str, Any]:
    """The whole of it, step by step; returns the figures."""
    say("building the images")
    stack.build("trainer")
    stack.build("service", "publish")  # afterwards, as the classic builder shares no work between images made at once
    size = image_bytes(IMAGE)
    _expect(size < MAX_IMAGE_BYTES, f"{IMAGE} has {size} bytes, over {MAX_IMAGE_BYTES}")

    say("starting kafka, trainer, service, prometheus")
    began = time.monotonic()
    stack.up("kafka", "trainer", "service", "prometheus", wait=True)
    healthy_s = time.monotonic() - began
    say(f"all healthy after {healthy_s:.1f} s; publishing {rows} flights")
    stack.up("publish", wait=False)
    answer = until("a prediction", lambda: stack.post("SERVICE_PORT", "/predict", FLIGHT), 120, "trainer", "service")
    prediction_s = time.monotonic() - began
    say(f"first prediction after {prediction_s:.1f} s: {answer}")
    _expect(
        prediction_s < MAX_UP_TO_PREDICTION_S,
        f"the first prediction took {prediction_s:.1f} s, over {MAX_UP_TO_PREDICTION_S}",
        "trainer",
    )

    killed_at = until(f"{rows // 4} samples", partial(_samples, stack, rows // 4), 60, "trainer", "service")
    say("killing the trainer")
    recovery_s = kill_and_wait(stack, killed_at)
    say(f"it learns again {recovery_s:.1f} s after it was killed at {killed_at} samples")
    _expect(killed_at < rows, "all was learned before the trainer was killed: publish more rows", "trainer")

    until("the end of publishing", lambda: _ended(stack, "publish"), 60 + rows / RATE, "publish")
    learned = until("all that was published", lambda: _learned(stack, rows), 120, "trainer")
    say(f"published {rows}, {learned}")
    _expect(learned == {"trained": rows, "rejected": 0}, f"of {rows} published: {learned}", "trainer")

    say("asking Prometheus")
    for query in MEASURED:
        until(f"a value of {query} in Prometheus", partial(_value, stack, query), 30, "prometheus")
    _dashboard_queries(stack)
    firing = [alert["labels"]["alertname"] for alert in _prometheus(stack, "/api/v1/alerts")["alerts"]]
    say(f"{len(MEASURED)} metrics have values; alerts pending or firing: {firing or 'none'}")

    say("stopping trainer and service")
    stack.stop("trainer", "service")
    for service in ("trainer", "service"):
        code = stack.state(service)["State"]["ExitCode"]
        _expect(code == 0, f"{service} was told to stop and ended with {code}", service)
    return {
        "up_to_prediction_s": round(prediction_s, 1),
        "up_to_healthy_s": round(healthy_s, 1),
        "image_bytes": size,
        "published": rows,
        **learned,
        "recovery_s": round(recovery_s, 1),
    }


def kill_and_wait(stack: Stack, samples: int) -> float:
    """SIGKILL to the trainer, from inside as a crash would; returns how long it took until it learned on.

    `docker kill` would not do: the engine takes it for the user's wish, and does not start the container again.
    """
    began = time.monotonic()
    # Every process but the first, which then ends too, and the shell itself.
    stack.execute("trainer", "sh", "-c", "kill -KILL -1; true")

    def back() -> bool | None:
        state = stack.state("trainer")
        return True if state["RestartCount"] >= 1 and state["State"]["Running"] else None

    until("the restart of the killed trainer", back, 60, "trainer")
    until("more samples than it was killed at", partial(_samples, stack, samples + 1), 60, "trainer", "service")
    return time.monotonic() - began


def _model(stack: Stack) -> dict[str, Any]:
    model: dict[str, Any] = stack.get("SERVICE_PORT", "/model")
    return model


def _samples(stack: Stack, at_least: int) -> int | None:
    """How many samples the model in use was trained on, once they are so many."""
    samples: int = _model(stack)["samples"]
    return samples if samples >= at_least else None


def _learned(stack: Stack, rows: int) -> dict[str, int] | None:
    """How many records were trained on and how many rejected, once they are as many as were published."""
    partitions = _model(stack)["partitions"].values()
    counts = {name: sum(partition[name] for partition in partitions) for name in ("trained", "rejected")}
    return counts if sum(counts.values()) >= rows else None


def _ended(stack: Stack, service: str) -> bool | None:
    state = stack.state(service)["State"]
    if state["Running"]:
        return None
    _expect(state["ExitCode"] == 0, f"{service} ended with {state['ExitCode']}", service)
    return True


def _prometheus(stack: Stack, path: str) -> Any:
    return stack.get("PROMETHEUS_PORT", path)["data"]


def _value(stack: Stack, query: str) -> float | None:
    """The value that Prometheus has for a query, None where it has none or one that is not finite."""
    result = _prometheus(stack, f"/api/v1/query?query={urllib.parse.quote(query)}")["result"]
    values = [float(series["value"][1]) for series in result]
    return values[0] if values and all(map(math.isfinite, values)) else None


def _dashboard_queries(stack: Stack) -> None:
    """Has Prometheus run each query of the dashboard: an error is a typing mistake, no value is not."""
    dashboard = json.loads((ROOT / "docker/grafana/dashboards/tailstream.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$__rate_interval", "1m").replace("$__range", "15m")
            until(
                f"an answer to {query!r} of the panel {panel['title']!r}",
                partial(_prometheus, stack, f"/api/v1/query?query={urllib.parse.quote(query)}"),
                5,
                "prometheus",
            )


def _expect(holds: bool, otherwise: str, *services: str) -> None:
    if not holds:
        raise StepFailed(otherwise, *services)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def say(text: str) -> None:
    """Says what happens, at once."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - what a command says is its output


if __name__ == "__main__":
    sys.exit(main())
