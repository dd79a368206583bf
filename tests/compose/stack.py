"""One project of docker-compose.yml: its commands, its ports, its containers."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

ROOT: Final = Path(__file__).parents[2]
PORTS: Final = ("KAFKA_PORT", "SERVICE_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")
LOG_LINES: Final = 30
T = TypeVar("T")


class StepFailed(Exception):
    """What did not happen, and whose log may say why."""

    def __init__(self, message: str, *services: str) -> None:
        super().__init__(message)
        self.services = services


class Stack:
    """A project under a name and on ports of its own, so that it meets no other on this machine.

    Args:
        project: its name.
        pull: `never` where the images must be there already, as `docker compose up --pull` takes it.
        variables: for docker-compose.yml.
    """

    def __init__(self, project: str, pull: str | None, variables: Mapping[str, str]) -> None:
        self.ports = {name: _free_port() for name in PORTS}
        self._up = ["up", "--detach", "--quiet-pull", *([] if pull is None else ["--pull", pull])]
        self._command = ["docker", "compose", "--project-name", project, "--profile", "demo"]
        ports = {name: str(port) for name, port in self.ports.items()}
        self._environment = {**os.environ, **ports, **variables}

    def build(self, *services: str) -> None:
        """Builds images; says what is built, as that takes minutes the first time."""
        self._run("build", *services, timeout_s=1800, show=True)

    def up(self, *services: str, wait: bool) -> None:
        """Starts services, and what they depend on; waits until they are healthy where told to."""
        try:
            self._run(*self._up, *(["--wait"] if wait else []), *services, timeout_s=300)
        except StepFailed as failure:
            raise StepFailed(str(failure), *filter(self._is_sick, services)) from None

    def down(self) -> None:
        """Removes all that `up` made, volumes too."""
        self._run("down", "--volumes", "--remove-orphans", "--timeout", "30", timeout_s=300)

    def stop(self, *services: str) -> None:
        """Stops services as `docker compose stop` does: SIGTERM, and time to end."""
        self._run("stop", *services, timeout_s=120)

    def execute(self, service: str, *command: str) -> str:
        """Runs a command in a service's container."""
        return self._run("exec", "--no-TTY", service, *command, timeout_s=60)

    def logs(self, service: str) -> str:
        """The last lines that a service wrote."""
        try:
            return self._run("logs", "--no-color", "--no-log-prefix", "--tail", str(LOG_LINES), service, timeout_s=60)
        except StepFailed as failure:
            return f"(no log: {failure})"

    def state(self, service: str) -> dict[str, Any]:
        """What `docker inspect` says of a service's container, running or not."""
        container = self._run("ps", "--all", "--quiet", service, timeout_s=60).strip()
        if not container:
            raise StepFailed(f"there is no container of {service}", service)
        found: list[dict[str, Any]] = json.loads(_run(["docker", "inspect", container], timeout_s=60))
        return found[0]

    def get(self, port: str, path: str) -> Any:
        """The JSON that a published port answers to GET."""
        return self._ask(urllib.request.Request(self._url(port, path)))

    def post(self, port: str, path: str, body: object) -> Any:
        """The JSON that a published port answers to POST."""
        data = json.dumps(body).encode()
        return self._ask(
            urllib.request.Request(self._url(port, path), data, headers={"Content-Type": "application/json"})
        )

    def _is_sick(self, service: str) -> bool:
        try:
            state = self.state(service)["State"]
        except StepFailed:  # it was never made
            return False
        return not state["Running"] or state.get("Health", {}).get("Status") != "healthy"

    def _url(self, port: str, path: str) -> str:
        return f"http://127.0.0.1:{self.ports[port]}{path}"

    @staticmethod
    def _ask(request: urllib.request.Request) -> Any:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)

    def _run(self, *arguments: str, timeout_s: float, show: bool = False) -> str:
        progress = ["--progress", "auto" if show else "quiet"]
        command = [*self._command, *progress, *arguments]
        return _run(command, timeout_s=timeout_s, environment=self._environment, show=show)


def until(what: str, look: Callable[[], T | None], timeout_s: float, *services: str) -> T:
    """Asks again and again until the answer is something; a connection that fails is no answer.

    Raises:
        StepFailed: there was none in time; the message has the last reason.
    """
    end = time.monotonic() + timeout_s
    reason = "nothing was answered"
    while time.monotonic() < end:
        try:
            found = look()
            if found is not None:
                return found
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}: {error.read().decode(errors='replace')[:500]}"
        except (OSError, ValueError) as error:
            reason = str(error)
        time.sleep(0.1)
    raise StepFailed(f"{what}: not within {timeout_s:g} s; last: {reason}", *services)


def image_bytes(image: str) -> int:
    """Size of an image."""
    return int(_run(["docker", "image", "inspect", "--format", "{{.Size}}", image], timeout_s=60))


def _run(
    command: list[str], *, timeout_s: float, environment: Mapping[str, str] | None = None, show: bool = False
) -> str:
    stream = None if show else subprocess.PIPE
    try:
        # In a session of its own: Ctrl-C is for the test, which then takes everything down.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            text=True,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise StepFailed("there is no `docker` command: install Docker Engine with its compose plugin") from None
    said = " ".join(command)
    with process:
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except BaseException as error:
            # Compose runs as a child of docker, and would go on starting what is about to be taken down.
            os.killpg(process.pid, signal.SIGTERM)
            if isinstance(error, subprocess.TimeoutExpired):
                raise StepFailed(f"`{said}` took over {timeout_s:g} s") from None
            raise
    if process.returncode != 0:
        raise StepFailed(f"`{said}` ended with {process.returncode}" + ("" if show else f":\n{errors.strip()[-2000:]}"))
    return output or ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
