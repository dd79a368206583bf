"""GET /metrics: the service's own counters, and what the manifest of the model in use says of the trainer."""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.predictor import Predictor
from service.workers import SHARED_COUNTERS
from trainer.class_metrics import RECALLS
from trainer.class_metrics import SHOWN as CLASS_METRICS
from trainer.manifest import Manifest
from trainer.prequential import SHOTS

PREFIX: Final = "tailstream_"
BALANCES: Final = ("0", "1")
LATENCY_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT"})


class ServiceMetrics:
    """All metrics of one service, in a registry of their own.

    Attributes:
        registry: what is rendered.
        predictions: instances answered.
    """

    def __init__(
        self,
        predictor: Callable[[], Predictor | None],
        queue_length: Callable[[], int],
        pinned: Callable[[], int | None],
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, that nobody reads
        self.registry = CollectorRegistry()
        counted = self.registry
        if os.environ.get(SHARED_COUNTERS):  # counts go to files, and what is rendered is the sum over all workers
            counted = CollectorRegistry()
            MultiProcessCollector(self.registry)  # type: ignore[no-untyped-call]
        self.predictions = Counter(f"{PREFIX}predictions", "Instances answered.", registry=counted)
        self._queue_length = queue_length
        self._queue = Gauge(
            f"{PREFIX}predict_queue_length",
            "Requests that wait for a forward pass.",
            registry=counted,
            multiprocess_mode="livesum",
        )
        self._requests = Counter(
            f"{PREFIX}http_requests",
            "HTTP requests answered, by route, method and status.",
            ["handler", "method", "status"],
            registry=counted,
        )
        self._durations = Histogram(
            f"{PREFIX}http_request_duration_seconds",
            "Time from a request's first byte to its answer's last, by route and method.",
            ["handler", "method"],
            buckets=LATENCY_BUCKETS_S,
            registry=counted,
        )
        self._keys = Counter(
            f"{PREFIX}api_key_requests", "Requests let in, by the name of their API key.", ["key"], registry=counted
        )
        self._counted: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self.registry.register(ModelCollector(predictor, pinned))

    def refresh(self) -> None:
        """Notes how many requests wait, for the worker that is asked for the metrics of all."""
        self._queue.set(self._queue_length())

    def render(self) -> bytes:
        """All metrics as Prometheus reads them."""
        self.refresh()
        return generate_latest(self.registry)

    def observe(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Counts one answered request."""
        key = handler, method, status
        children = self._counted.get(key)
        if children is None:
            children = self._counted[key] = (
                self._requests.labels(handler, method, str(status)),
                self._durations.labels(handler, method),
            )
        children[0].inc()
        children[1].observe(seconds)

    def count_key(self, name: str) -> None:
        """Counts one request that an API key let in."""
        self._keys.labels(name).inc()


class CountRequests:
    """Middleware that counts and times requests."""

    def __init__(self, app: ASGIApp, metrics: ServiceMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, and counts it at its end."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # what the outermost handler answers where the application fails
        start = time.perf_counter()

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noting_status)
        finally:
            # Labels from a client's hands must not make series without end.
            handler = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.observe(handler, method, status, time.perf_counter() - start)


class ModelCollector(Collector):
    """Reads the manifest of the model in use at the moment of the scrape."""

    def __init__(self, predictor: Callable[[], Predictor | None], pinned: Callable[[], int | None]) -> None:
        self._predictor = predictor
        self._pinned = pinned

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Metrics of the model; their names without values while there is none."""
        yield GaugeMetricFamily(
            f"{PREFIX}model_pinned",
            "1 if the service stays with a pinned version, else 0.",
            value=float(self._pinned() is not None),
        )
        predictor = self._predictor()
        manifest = None if predictor is None else predictor.manifest
        for name, help_text, read in _MODEL_GAUGES:
            family = GaugeMetricFamily(f"{PREFIX}model_{name}", help_text)
            value = None if manifest is None else read(manifest)
            if value is not None:
                family.add_metric([], value)
            yield family
        yield from _prequential({} if manifest is None else manifest.metrics)


_MODEL_GAUGES: Final[tuple[tuple[str, str, Callable[[Manifest], float | None]], ...]] = (
    ("version", "Version of the snapshot in use.", lambda manifest: manifest.version),
    ("age_seconds", "Time since the snapshot in use was written.", lambda manifest: age_s(manifest)),
    (
        "healthy",
        "1 if the model in use beats a constant answer (the running median, the majority), else 0.",
        lambda manifest: manifest.healthy,
    ),
    ("loss", "Training loss at the snapshot.", lambda manifest: manifest.train_loss),
    ("noise_sigma", "Noise of the head, in label standard deviations.", lambda manifest: manifest.noise_sigma),
    (
        "noise_sigma_label_units",
        "Noise of the head, in label units.",
        lambda manifest: manifest.noise_sigma_label_units,
    ),
    ("samples", "Samples that the model was trained on.", lambda manifest: manifest.samples),
    ("samples_per_second", "Training throughput at the snapshot.", lambda manifest: manifest.samples_per_second),
    ("lag_records", "Records in the topic not yet trained on, at the snapshot.", lambda manifest: manifest.lag_records),
)


def age_s(manifest: Manifest) -> float:
    """Seconds since a snapshot was written; never negative, as clocks of two hosts may differ."""
    return max(0.0, time.time() - manifest.created_s)


def _prequential(metrics: Mapping[str, Any]) -> Iterable[GaugeMetricFamily]:
    window = metrics.get("fading") or {}
    mae = GaugeMetricFamily(
        f"{PREFIX}model_prequential_mae",
        "Recent mean absolute error of test-then-train, label units, by how common the labels are.",
        labels=["shots", "balance"],
    )
    balanced = GaugeMetricFamily(
        f"{PREFIX}model_prequential_balanced_mae",
        "Recent mean over label regions of the mean absolute error, label units.",
        labels=["balance"],
    )
    for balance in BALANCES:
        answer = window.get(balance) or {}
        for shots, name in SHOTS.items():
            if answer.get(name) is not None:
                mae.add_metric([shots, balance], answer[name])
        if answer.get("balanced_mae") is not None:
            balanced.add_metric([balance], answer["balanced_mae"])
    yield mae
    yield balanced
    yield from _of_classes(window)


def _of_classes(window: Mapping[str, Any]) -> Iterable[GaugeMetricFamily]:
    for metric, text in CLASS_METRICS.items():
        family = GaugeMetricFamily(
            f"{PREFIX}model_prequential_{metric}", f"{text}, recent test-then-train.", labels=["balance"]
        )
        for balance in BALANCES:
            value = (window.get(balance) or {}).get(metric)
            if value is not None:
                family.add_metric([balance], value)
        yield family
    recall = GaugeMetricFamily(
        f"{PREFIX}model_prequential_recall",
        "Recent mean recall of classes of test-then-train, by how common they are.",
        labels=["shots", "balance"],
    )
    for balance in BALANCES:
        for shots, name in RECALLS.items():
            value = (window.get(balance) or {}).get(name)
            if value is not None:
                recall.add_metric([shots, balance], value)
    yield recall
