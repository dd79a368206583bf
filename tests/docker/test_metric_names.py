"""Alerts and dashboard name metrics that exist, alerts do what they say, Prometheus asks the right addresses."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from service.metrics import ServiceMetrics
from tests.service.store import in_process, make_settings, write_snapshot
from trainer.config import load
from trainer.metrics import TrainerMetrics

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
ALERTS = [rule for group in yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((DOCKER / "grafana" / "dashboards" / "tailstream.json").read_text())
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="there is no promtool (package prometheus)"
)


def test_names_that_others_rely_on_stay() -> None:
    """What people's own dashboards and alerts ask for; a name that is changed here breaks them."""
    trainer = """train_loss noise_sigma noise_sigma_label_units train_samples_total train_samples_per_second
        train_steps_total train_step_seconds_bucket records_rejected_total consumer_lag_records freshness_seconds
        prequential_mae prequential_balanced_mae prequential_coverage nonfinite_steps_total snapshot_seconds
        snapshot_bytes snapshot_failures_total"""
    service = """model_version model_age_seconds model_healthy model_loss model_noise_sigma
        model_noise_sigma_label_units model_samples model_samples_per_second model_prequential_mae predictions_total
        predict_queue_length http_requests_total http_request_duration_seconds_bucket"""
    known = set(_series(TrainerMetrics().registry))
    assert {f"tailstream_{name}" for name in trainer.split()} <= known
    known = set(_series(ServiceMetrics(lambda: None, lambda: 0, lambda: None).registry))
    assert {f"tailstream_{name}" for name in service.split()} <= known


def test_every_metric_that_is_asked_for_exists() -> None:
    known = {
        *_series(TrainerMetrics().registry),
        *_series(ServiceMetrics(lambda: None, lambda: 0, lambda: None).registry),
    }
    for query in [*(rule["expr"] for rule in ALERTS), *_dashboard_queries()]:
        asked = set(re.findall(r"\btailstream_\w+", query))
        assert asked <= known, f"{sorted(asked - known)} in {query}"


def test_all_that_is_known_of_errors_is_drawn_for_either_task() -> None:
    drawn = set(re.findall(r"\btailstream_\w+", " ".join(_dashboard_queries())))
    errors = {name for name in _series(TrainerMetrics().registry) if name.startswith("tailstream_prequential_")}
    assert errors
    assert errors <= drawn


def test_every_alert_says_what_happened_and_what_to_do() -> None:
    names = [rule["alert"] for rule in ALERTS]
    assert len(names) == len(set(names))
    for rule in ALERTS:
        assert set(rule["annotations"]) == {"summary", "runbook"}, rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]


def test_every_alert_is_tested() -> None:
    tests = (ROOT / "tests" / "docker" / "alerts.test.yml").read_text()
    assert [rule["alert"] for rule in ALERTS if rule["alert"] not in tests] == []


def test_the_dashboard_reads_from_the_data_source_that_is_provisioned() -> None:
    provisioned = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text())
    uids = {source["uid"] for source in provisioned["datasources"]}
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == uids
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all(panel["description"] and panel["fieldConfig"]["defaults"]["unit"] for panel in panels)


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_prometheus_asks_where_trainer_and_service_answer() -> None:
    configuration = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in configuration["scrape_configs"]}
    settings = load(DOCKER / "tailstream.toml")
    assert targets["trainer"] == [f"trainer:{settings.trainer.metrics_port}"]
    assert targets["service"] == [f"service:{settings.service.port}"]


@needs_promtool
@pytest.mark.parametrize(
    "arguments", [["check", "config", "docker/prometheus.yml"], ["test", "rules", "tests/docker/alerts.test.yml"]]
)
def test_promtool_accepts_configuration_and_alerts(arguments: list[str]) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_finds_no_fault_in_the_metrics(tmp_path: Path) -> None:
    """Of both programs, with values: names, units and help texts are as Prometheus wants them."""
    settings = make_settings(tmp_path / "store")
    write_snapshot(settings)
    predictor = in_process(settings, 1)
    service = ServiceMetrics(lambda: predictor, lambda: 0, lambda: 1)
    service.observe("/predict", "POST", 200, 0.001)
    for registry in (TrainerMetrics().registry, service.registry):
        text = generate_latest(registry)
        done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def _dashboard_queries() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def _series(registry: CollectorRegistry) -> Iterator[str]:
    """Names under which Prometheus finds what a registry has, with or without values."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    for family in registry.collect():
        for suffix in suffixes.get(family.type, ("",)):
            yield family.name + suffix
