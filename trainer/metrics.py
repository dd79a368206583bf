"""The trainer's own Prometheus metrics, on a port of their own."""

import time
from collections.abc import Callable
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from trainer.batching import Batch
from trainer.class_metrics import RECALLS, SHOWN
from trainer.errors import ConfigError
from trainer.learner import Readings
from trainer.manifest import Manifest
from trainer.prequential import SHOTS

PREFIX: Final = "tailstream_"
RATE_WEIGHT: Final = 0.3  # of the newest interval in the fading rate
STEP_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class TrainerMetrics:
    """Counts as batches pass; gauges are set whenever somebody has read the learner.

    Attributes:
        samples_per_second: fading rate of rows learned from.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self._clock = clock
        self._window_began, self._window_rows = clock(), 0
        self.samples_per_second = 0.0
        self.newest_append_s = 0.0
        self._counted: dict[Counter, int] = {}

        def gauge(name: str, help: str, *labels: str) -> Gauge:
            return Gauge(PREFIX + name, help, labels, registry=self.registry)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, help, labels, registry=self.registry)

        self._loss = gauge("train_loss", "Fading mean of the training loss, squared label standard deviations or nats.")
        self._sigma = gauge("noise_sigma", "Noise that the model assumes, label standard deviations.")
        self._sigma_units = gauge("noise_sigma_label_units", "Noise that the model assumes, label units.")
        self._samples = counter("train_samples", "Rows learned from.")
        self._rate = gauge("train_samples_per_second", "Fading rate of rows learned from.")
        self._batches = counter("train_batches", "Batches learned from.")
        self._steps = counter("train_steps", "Optimiser steps taken.")
        self._step_s = Histogram(
            f"{PREFIX}train_step_seconds",
            "Time to predict, learn and replay one batch.",
            registry=self.registry,
            buckets=STEP_BUCKETS_S,
        )
        self._rejected = counter("records_rejected", "Records sent to the dead-letter topic.", "reason")
        self._skipped = counter("records_skipped", "Tombstones passed over.")
        self._lost = counter("records_lost", "Records that expired before they were read.")
        self._lag = gauge("consumer_lag_records", "Records in a partition not yet learned from.", "partition")
        self._broker_up = gauge("broker_up", "1 if the broker answers, 0 while it is away.")
        self._freshness = gauge("freshness_seconds", "Now less the append time of the newest record learned from.")
        self._freshness.set_function(self._age)
        self._mae = gauge("prequential_mae", "Fading prequential mean absolute error, label units.", "shots", "balance")
        self._balanced = gauge("prequential_balanced_mae", "Fading prequential balanced MAE, label units.", "balance")
        self._coverage = gauge("prequential_coverage", "Share of labels in their 90% interval at balance 0, fading.")
        self._drifts = counter("drift_alarms", "Times that the prequential error rose above what it had been.")
        self._drift = gauge("drift_statistic", "How near the prequential error is to a drift alarm, which comes at 1.")
        self._of_classes = {
            name: gauge(f"prequential_{name}", f"{text}, fading.", "balance") for name, text in SHOWN.items()
        }
        self._recall = gauge("prequential_recall", "Mean recall of classes, fading.", "shots", "balance")
        self._nonfinite = counter("nonfinite_steps", "Steps left out because a loss or gradient was not finite.")
        self._snapshot_s = gauge("snapshot_seconds", "Time that the last snapshot took, copy and write.")
        self._snapshot_bytes = gauge("snapshot_bytes", "Size of the last snapshot.")
        self._snapshot_version = gauge("snapshot_version", "Version of the last snapshot.")
        self._snapshot_failures = counter("snapshot_failures", "Snapshots that could not be written.")

    def serve(self, host: str, port: int) -> int:
        """Answers `/metrics` on a thread of its own; returns the port.

        Raises:
            ConfigError: the address cannot be bound.
        """
        try:
            server, _ = start_http_server(port, host, self.registry)
        except OSError as error:
            raise ConfigError(
                f"trainer.metrics_host and metrics_port: {host}:{port} cannot be bound: {error.strerror or error}"
            ) from error
        return int(server.server_port)

    def resumed(self, manifest: Manifest) -> None:
        """Begins where a snapshot ended: counters count what this process does, as Prometheus expects."""
        self._counted = {
            self._steps: manifest.step,
            self._nonfinite: manifest.nonfinite_steps,
            self._drifts: manifest.drift_alarms,
        }
        self.newest_append_s = manifest.newest_append_s

    def trained(self, batch: Batch, seconds: float) -> None:
        """Counts a batch and how long it took."""
        rows = len(batch)
        if rows:
            self._samples.inc(rows)
            self._batches.inc()
            self._step_s.observe(seconds)
            self._window_rows += rows
            # A producer whose clock is ahead would make all after it look fresh.
            self.newest_append_s = max(self.newest_append_s, min(batch.newest_append_s, time.time()))
        for rejection in batch.rejected:
            self._rejected.labels(rejection.error.reason).inc()
        self._skipped.inc(sum(part.skipped for part in batch.progress.values()))

    def read(self, readings: Readings, steps: int, lag: dict[int, int], lost_records: int) -> None:
        """Shows what was just read off the device, and the lag by partition."""
        elapsed = self._clock() - self._window_began
        if elapsed > 0:
            rate = self._window_rows / elapsed
            first = self.samples_per_second == 0
            self.samples_per_second += (1 if first else RATE_WEIGHT) * (rate - self.samples_per_second)
            self._window_began, self._window_rows = self._clock(), 0
        self._rate.set(self.samples_per_second)
        self._count(self._steps, steps)
        if readings.train_loss is not None:
            self._loss.set(readings.train_loss)
        if readings.noise is not None:
            self._sigma.set(readings.noise.sigma)
            self._sigma_units.set(readings.noise.label_units)
        self._count(self._nonfinite, readings.nonfinite_steps)
        self._count(self._drifts, readings.drift_alarms)
        self._drift.set(readings.drift_statistic)
        self._count(self._lost, lost_records)
        for partition, records in lag.items():
            self._lag.labels(str(partition)).set(records)
        self._errors(readings.metrics["fading"])

    def watch_broker(self, is_up: Callable[[], bool]) -> None:
        """Shows whether the broker answers, asked whenever somebody looks: while a start waits for it too."""
        self._broker_up.set_function(is_up)

    def _count(self, counter: Counter, total: int) -> None:
        """Brings a counter up to a total that is kept elsewhere."""
        counter.inc(total - self._counted.get(counter, 0))
        self._counted[counter] = total

    def _errors(self, fading: dict[str, Any]) -> None:
        for answer in ("0", "1"):
            errors = fading.get(answer, {})
            for name, shown in self._of_classes.items():
                if errors.get(name) is not None:
                    shown.labels(answer).set(errors[name])
            for shots, name in RECALLS.items():
                if errors.get(name) is not None:
                    self._recall.labels(shots, answer).set(errors[name])
            for shots, name in SHOTS.items():
                if errors.get(name) is not None:
                    self._mae.labels(shots, answer).set(errors[name])
            if errors.get("balanced_mae") is not None:
                self._balanced.labels(answer).set(errors["balanced_mae"])
        if fading.get("coverage") is not None:
            self._coverage.set(fading["coverage"])

    def saved(self, version: int, size_bytes: int, seconds: float) -> None:
        """Counts a snapshot."""
        self._snapshot_version.set(version)
        self._snapshot_bytes.set(size_bytes)
        self._snapshot_s.set(seconds)

    def save_failed(self) -> None:
        """Counts a snapshot that could not be written."""
        self._snapshot_failures.inc()

    def _age(self) -> float:
        return time.time() - self.newest_append_s if self.newest_append_s else float("nan")
