"""docker/kubernetes: every object is what Kubernetes takes, fits the others, and has no right that it does not need."""

import os
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from trainer.config import load

FOLDER = Path(__file__).parents[2] / "docker" / "kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
SUPPORTED = ("1.30", "1.37")  # the oldest and the newest release that the manifests are checked against
# What github.com/prometheus-operator/prometheus-operator, Documentation/api-reference/api.md, says of the fields
# that are used here.
SERVICE_MONITOR: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "kind": {"const": "ServiceMonitor"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["selector", "endpoints"],
            "properties": {
                "selector": {"type": "object"},
                "endpoints": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["port"],
                        "properties": {
                            "port": {"type": "string"},
                            "path": {"type": "string", "pattern": "^/"},
                            "interval": {"type": "string", "pattern": r"^\d+s$"},
                        },
                    },
                },
            },
        },
    },
}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


OBJECTS = [found for name in KUSTOMIZATION["resources"] for found in documents(name)]
SECRETS = documents("secrets.example.yaml")


def of(kind: str, name: str) -> dict[str, Any]:
    (found,) = [each for each in OBJECTS if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def pod(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = of("Deployment", name)["spec"]["template"]["spec"]
    return spec


def named(each: dict[str, Any]) -> str:
    return f"{each['kind']}-{each['metadata']['name']}"


@pytest.mark.parametrize("version", SUPPORTED)
@pytest.mark.parametrize("found", [each for each in OBJECTS if each["kind"] != "ServiceMonitor"] + SECRETS, ids=named)
def test_kubernetes_takes_it(found: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(found, version, strict=True)  # strict: no field that it does not know


@pytest.mark.parametrize("found", [each for each in OBJECTS if each["kind"] == "ServiceMonitor"], ids=named)
def test_prometheus_takes_it_and_finds_a_port(found: dict[str, Any]) -> None:
    import jsonschema

    jsonschema.validate(found, SERVICE_MONITOR)
    target = of("Service", found["metadata"]["name"])
    assert found["spec"]["selector"]["matchLabels"].items() <= target["metadata"]["labels"].items()
    assert {each["port"] for each in found["spec"]["endpoints"]} <= {each["name"] for each in target["spec"]["ports"]}


def test_a_typing_mistake_would_be_found() -> None:
    broken = yaml.safe_load(yaml.safe_dump(of("Deployment", "service")).replace("readinessProbe", "readynessProbe"))
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, SUPPORTED[1], strict=True)


def test_every_file_belongs_to_it() -> None:
    used = {*KUSTOMIZATION["resources"], "tailstream.toml", "kustomization.yaml", "secrets.example.yaml"}
    assert {path.name for path in FOLDER.iterdir()} == used
    assert KUSTOMIZATION["configMapGenerator"] == [{"name": "tailstream", "files": ["tailstream.toml"]}]
    version = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())["project"]["version"]
    assert KUSTOMIZATION["images"][0]["newTag"] == version


def test_one_trainer_at_a_time() -> None:
    spec = of("Deployment", "trainer")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def test_services_are_never_all_away() -> None:
    spec = of("Deployment", "service")["spec"]
    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert "replicas" not in spec, "it would undo the autoscaler at every apply"
    scaler, budget = of("HorizontalPodAutoscaler", "service")["spec"], of("PodDisruptionBudget", "service")["spec"]
    assert scaler["scaleTargetRef"]["name"] == "service"
    assert scaler["minReplicas"] > budget["minAvailable"] >= 1
    assert budget["selector"] == spec["selector"]
    constraints = pod("service")["topologySpreadConstraints"]
    assert {each["topologyKey"] for each in constraints} == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}
    assert all(each["labelSelector"] == spec["selector"] for each in constraints)


@pytest.mark.parametrize("name", ["trainer", "service"])
def test_pods_have_no_right_that_they_do_not_need(name: str) -> None:
    spec = pod(name)
    assert spec["automountServiceAccountToken"] is False
    assert of("ServiceAccount", spec["serviceAccountName"])["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    user = spec["securityContext"]["runAsUser"]
    assert f"USER {user}:{user}" in (FOLDER.parent / "Dockerfile").read_text()
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= set(container["resources"]["requests"])
    assert "memory" in container["resources"]["limits"]
    assert not any("hostPath" in volume for volume in spec["volumes"])


@pytest.mark.parametrize("name", ["trainer", "service"])
def test_selectors_ports_and_volumes_go_together(name: str) -> None:
    labels = of("Deployment", name)["spec"]["template"]["metadata"]["labels"]
    assert of("Deployment", name)["spec"]["selector"]["matchLabels"] == labels
    assert of("Service", name)["spec"]["selector"] == labels
    (container,) = pod(name)["containers"]
    ports = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in of("Service", name)["spec"]["ports"]} <= ports
    probes = [found for key, found in container.items() if key.endswith("Probe")]
    assert {probe["httpGet"]["port"] for probe in probes} <= ports
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod(name)["volumes"]}


def test_secrets_are_those_of_the_example() -> None:
    wanted = {source["secretRef"]["name"] for name in ("trainer", "service") for source in envs(name)}
    wanted |= {volume["secret"]["secretName"] for volume in pod("service")["volumes"] if "secret" in volume}
    assert wanted == {secret["metadata"]["name"] for secret in SECRETS}


def envs(name: str) -> list[dict[str, Any]]:
    (container,) = pod(name)["containers"]
    found: list[dict[str, Any]] = container["envFrom"]
    return found


def test_the_configuration_can_be_loaded_and_fits_the_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith("TAILSTREAM_"):
            monkeypatch.delenv(variable)
    settings = load(FOLDER / "tailstream.toml")
    assert not settings.store.is_folder
    (trainer,), (service,) = pod("trainer")["containers"], pod("service")["containers"]
    assert trainer["ports"][0]["containerPort"] == settings.trainer.metrics_port
    assert service["ports"][0]["containerPort"] == settings.service.port
    assert pod("trainer")["terminationGracePeriodSeconds"] > settings.trainer.stop_grace_s
    assert pod("service")["terminationGracePeriodSeconds"] > settings.service.drain_s + 10
    assert not settings.service.allow_unauthenticated
    (keys,) = [mount for mount in service["volumeMounts"] if mount["name"] == "keys"]
    (secret,) = [each for each in SECRETS if each["metadata"]["name"] == "tailstream-api-keys"]
    assert settings.service.api_keys_file in {f"{keys['mountPath']}/{name}" for name in secret["stringData"]}
    readiness = service["readinessProbe"]
    assert readiness["httpGet"]["path"] == "/readyz"
    seen_s = readiness["periodSeconds"] * readiness["failureThreshold"]
    assert settings.service.drain_s > seen_s, "it would be gone before it is known that it goes"


def test_what_is_not_named_is_not_reached() -> None:
    nothing = of("NetworkPolicy", "nothing")["spec"]
    assert nothing == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    kafka = [each for each in OBJECTS if each["kind"] == "NetworkPolicy" and "9092" in str(each)]
    assert [named(each) for each in kafka] == ["NetworkPolicy-trainer"], "the service never speaks to the broker"
