"""Several services of one store behind a real proxy: restarted one after the other under load, nobody notices."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import tomlkit

from service.broker import free_port
from service.watcher import Watcher
from tests.s3 import S3Server
from tests.service.store import fitted, instance, make_settings, manifest
from trainer.config import Settings, StoreSettings
from trainer.snapshot import SnapshotStore, open_store

ROOT = Path(__file__).parents[2]
PROXY = ROOT / "docker" / "haproxy" / "haproxy.cfg"
PATIENCE_S = 100.0
CLIENTS = 4

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="there is no haproxy: Debian's package has it"),
]


def until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.TransportError:
        return False


class Replica:
    """A service in a process of its own."""

    def __init__(self, config: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "service", "serve", "--config", str(config)]
        self._environment = {**os.environ, "TAILSTREAM_SERVICE__PORT": str(port)}
        self._log = config.with_name(f"{port}.log")
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )

    def signal(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        self.signal()
        return self._process.wait(PATIENCE_S)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def version(self) -> int | None:
        """The version that answers here; None while it is not ready."""
        assert self._process.poll() is None, self._log.read_text()[-2000:]
        try:
            answer = httpx.get(f"{self.url}/readyz", timeout=10)
        except httpx.TransportError:
            return None
        return answer.json()["model_version"] if answer.status_code == 200 else None


class Load:
    """Clients that ask without a pause, and note what they get."""

    def __init__(self, url: str) -> None:
        self.answers: Counter[int] = Counter()  # by version
        self.failures: list[str] = []
        self._url = url
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=30) as client:
            while not self._done.is_set():
                try:
                    answer = client.post("/predict", json=instance(0))
                    if answer.status_code == 200:
                        self.answers[answer.json()["model_version"]] += 1
                    else:
                        self.failures.append(f"{answer.status_code} {answer.text[:200]}")
                except httpx.TransportError as error:
                    self.failures.append(repr(error))
                time.sleep(0.01)

    def more(self) -> None:
        """Waits for some more answers."""
        before = self.answers.total()
        until(lambda: self.answers.total() > before + 20, f"more answers; failures: {self.failures[:3]}")


class Trainer:
    """Writes a version whenever it is asked to, as the only writer of its store."""

    def __init__(self, settings: Settings) -> None:
        self.store: SnapshotStore = open_store(settings.store)
        self._settings = settings
        model, grid = fitted(settings, seed=0)
        self._tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
        self._tensors |= {f"grid.{name}": tensor.contiguous() for name, tensor in grid.items()}
        from trainer.calibration import LevelCalibration

        self._tensors |= {f"calibration.{name}": t for name, t in LevelCalibration().state_dict().items()}

    def write(self) -> int:
        return self.store.write(manifest(self._settings), self._tensors, {}).version


@pytest.fixture
def drain_s() -> float:
    """Longer than two checks of the proxy, on a machine that is busy too."""
    return 8.0


@pytest.fixture
def settings(tmp_path: Path, request: pytest.FixtureRequest, drain_s: float) -> Settings:
    """With a store in S3 where there is a server, else on a disk."""
    settings = make_settings(tmp_path / "store", drain_s=drain_s)
    if "TAILSTREAM_TEST_S3_SERVER" not in os.environ:
        return settings
    server: S3Server = request.getfixturevalue("s3_server")
    store: StoreSettings = server.settings(cache=str(tmp_path / "cache"), lease_s=10.0)
    return settings.model_copy(update={"store": store})


@pytest.fixture
def replicas(settings: Settings, tmp_path: Path) -> Iterator[list[Replica]]:
    config = tmp_path / "tailstream.toml"
    told = settings.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)
    config.write_text(tomlkit.dumps(told))
    with ExitStack() as stack:
        found = []
        for _ in range(2):
            found.append(Replica(config, free_port()))
            stack.callback(found[-1].kill)
        yield found


@pytest.fixture
def proxy(replicas: list[Replica], tmp_path: Path) -> Iterator[str]:
    """The proxy of the compose file, its servers these."""
    servers = tmp_path / "servers.cfg"
    lines = [f"    server s{number} {replica.url.removeprefix('http://')}" for number, replica in enumerate(replicas)]
    servers.write_text("\n".join(["backend services", *lines, ""]))
    port = free_port()
    with (tmp_path / "proxy.log").open("wb") as log:
        process = subprocess.Popen(
            ["haproxy", "-db", "-f", str(PROXY), "-f", str(servers)],
            env={**os.environ, "PROXY_BIND": f"127.0.0.1:{port}"},
            stdout=log,
            stderr=log,
        )
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


def test_a_rolling_restart_under_load_fails_no_request_and_every_replica_follows(
    settings: Settings, replicas: list[Replica], proxy: str
) -> None:
    trainer = Trainer(settings)
    with trainer.store.lock():
        trainer.write()
        for replica in replicas:
            until(lambda replica=replica: replica.version() == 1, "ready")  # type: ignore[misc]
        until(lambda: answers(f"{proxy}/readyz"), "the proxy finds them")
        with Load(proxy) as load:
            for replica in replicas:
                load.more()
                assert replica.stop() == 0
                newest = trainer.write()
                load.more()  # the other one answers alone
                replica.start()
                for each in replicas:
                    until(lambda each=each, newest=newest: each.version() == newest, f"{each.url} at {newest}")  # type: ignore[misc]
            load.more()
    assert load.failures == []
    assert set(load.answers) == {1, 2, 3}, "each answer names its version"


def test_every_replica_has_the_newest_version_by_the_first_poll_that_begins_after_it(settings: Settings) -> None:
    # One that was under way may have looked before, so it is the second one at the latest.
    trainer = Trainer(settings)
    watchers = [Watcher(open_store(settings.store), settings) for _ in range(2)]
    with trainer.store.lock():
        for _ in range(3):
            newest = trainer.write()
            for watcher in watchers:
                watcher.poll()
                assert watcher.predictor is not None
                assert watcher.predictor.version == newest


@pytest.mark.parametrize("drain_s", [300.0])
def test_a_service_that_is_told_to_stop_says_so_first_and_answers_on(
    settings: Settings, replicas: list[Replica]
) -> None:
    trainer = Trainer(settings)
    with trainer.store.lock():
        trainer.write()
    first, _ = replicas
    until(lambda: first.version() == 1, "ready")
    first.signal()
    until(lambda: first.version() is None, "not ready any more")
    assert httpx.get(f"{first.url}/livez").status_code == 200
    assert httpx.post(f"{first.url}/predict", json=instance(0)).status_code == 200
    assert first.stop() == 0  # who tells it twice does not want to wait
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{first.url}/livez")
