"""docker-compose.yml keeps its promises: nothing is reachable from outside, writable without need, or root."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.config import load
from trainer.datasets import FLIGHTS_FEATURES, FLIGHTS_LABEL

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONE_SHOT = {"publish"}
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+")


@pytest.fixture(params=sorted(SERVICES))
def service(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SERVICES[request.param]


def test_there_is_everything_that_the_readme_names() -> None:
    assert set(SERVICES) == {"kafka", "trainer", "trainer-gpu", "service", "proxy", "publish", "prometheus", "grafana"}
    assert {name: found["profiles"] for name, found in SERVICES.items() if "profiles" in found} == {
        "trainer-gpu": ["gpu"],
        "publish": ["demo"],
        "proxy": ["scale"],
    }


def test_ports_are_published_on_loopback_only(service: dict[str, Any]) -> None:
    for port in service.get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z]+_PORT:-\d+\}:\d+", port), port
    assert service.get("network_mode") is None


def test_trainer_metrics_are_not_published() -> None:
    assert "ports" not in SERVICES["trainer"]
    assert "ports" not in SERVICES["trainer-gpu"]


def test_root_is_read_only_and_nothing_is_privileged(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "pid", "ipc", "userns_mode"} & set(service)
    assert service.get("user", "10001") not in ("0", "root", "0:0")


def test_files_of_the_checkout_are_mounted_read_only(service: dict[str, Any]) -> None:
    for volume in service["volumes"]:
        source, *_, mode = volume.split(":")
        if source.startswith("."):
            assert mode == "ro", volume
            assert (ROOT / source).exists(), volume
        else:
            assert source in COMPOSE["volumes"], volume


@pytest.mark.parametrize("name", sorted(set(SERVICES) - ONE_SHOT))
def test_health_is_checked_and_what_crashes_comes_back(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"
    assert SERVICES[name]["restart"] == "unless-stopped"


def test_dependencies_have_conditions(service: dict[str, Any]) -> None:
    for name, dependency in service.get("depends_on", {}).items():
        assert name in SERVICES
        assert dependency["condition"] in ("service_healthy", "service_started")


def test_images_are_pinned(service: dict[str, Any]) -> None:
    assert PINNED.fullmatch(service["image"])


def test_our_images_carry_our_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    ours = {found["image"] for found in SERVICES.values() if "build" in found}
    assert ours == {f"{name}:{version}" for name in ("tailstream", "tailstream-gpu", "tailstream-demo")}


def test_the_base_image_is_pinned_and_the_user_has_a_number() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    assert re.search(r"^ARG PYTHON=3\.\d+-slim-\w+$", dockerfile, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) == {"python:${PYTHON}", "dependencies", "runtime"}
    assert re.search(r"^USER \d+:\d+$", dockerfile, re.MULTILINE)
    assert "RUN --mount" not in dockerfile, "the classic builder has no such mounts"


def test_the_gpu_trainer_takes_the_other_ones_place() -> None:
    gpu = SERVICES["trainer-gpu"]
    assert f"ARG TORCH={gpu['build']['args']['TORCH']}\n" not in (ROOT / "docker" / "Dockerfile").read_text()
    assert gpu["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert gpu["networks"]["default"]["aliases"] == ["trainer"], "Prometheus asks for it under the name of the other"
    assert gpu["volumes"] == SERVICES["trainer"]["volumes"]


@pytest.mark.parametrize("name", ["trainer", "trainer-gpu", "service"])
def test_settings_of_containers_can_be_loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith("TAILSTREAM_"):
            monkeypatch.delenv(variable)
    for variable, value in SERVICES[name]["environment"].items():
        monkeypatch.setenv(variable, value)
    settings = load(ROOT / "docker" / "tailstream.toml")
    assert settings.record_schema.label == FLIGHTS_LABEL
    assert {field: feature.kind for field, feature in settings.record_schema.features.items()} == FLIGHTS_FEATURES
    assert settings.kafka.bootstrap_servers == ["kafka:9092"]
    assert f"snapshots:{settings.store.path}" in SERVICES[name]["volumes"]
    if name == "service":
        assert (settings.service.host, settings.service.port) == ("0.0.0.0", 8000)
        assert SERVICES[name]["ports"][0].endswith(f":{settings.service.port}")
    else:
        assert (settings.trainer.metrics_host, settings.trainer.metrics_port) == ("0.0.0.0", 9101)
        assert settings.device == ("cuda" if name == "trainer-gpu" else "auto")


def test_the_trainer_has_time_to_stop() -> None:
    grace_s = load(ROOT / "docker" / "tailstream.toml").trainer.stop_grace_s
    assert int(SERVICES["trainer"]["stop_grace_period"].removesuffix("s")) > grace_s


def _has_compose() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _has_compose(), reason="there is no `docker compose` here")
def test_compose_accepts_the_file() -> None:
    command = [
        "docker",
        "compose",
        "--profile",
        "demo",
        "--profile",
        "gpu",
        "--profile",
        "scale",
        "config",
        "--format",
        "json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "warnings are errors"
    assert set(json.loads(done.stdout)["services"]) == set(SERVICES)
