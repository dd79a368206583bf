"""A real Prometheus, with the configuration and the alerts that ship, that scrapes what a test started."""

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from service.broker import free_port

DOCKER = Path(__file__).parents[2] / "docker"
EXECUTABLE = shutil.which("prometheus")
SCRAPE_S = 1
WAIT_S = 120.0


class Prometheus:
    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def get(self, path: str, **parameters: Any) -> Any:
        answer = self._client.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", f"{parameters}: {answer}"
        return answer["data"]

    def series(self, query: str, seconds: float = 60) -> int:
        """How many series with a number in them a panel would draw of the last seconds."""
        now = time.time()
        found = self.get("query_range", query=query, start=now - seconds, end=now, step=SCRAPE_S)["result"]
        return sum(any(value != "NaN" for _, value in series["values"]) for series in found)

    def until_scraped(self, times: int) -> None:
        """Waits until every target has been scraped so often."""
        deadline = time.monotonic() + WAIT_S
        while True:
            counts = self.get("query", query=f"count_over_time(up[{int(WAIT_S)}s])")["result"]
            down = [
                target["lastError"] for target in self.get("targets")["activeTargets"] if target["health"] == "down"
            ]
            if not down and counts and min(int(found["value"][1]) for found in counts) >= times:
                return
            assert time.monotonic() < deadline, down or counts
            time.sleep(0.2)


@contextmanager
def prometheus(folder: Path, targets: Mapping[str, Sequence[str]]) -> Iterator[Prometheus]:
    """One that scrapes `targets` of each job, and works out the alerts."""
    assert EXECUTABLE is not None
    configuration = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    configuration["global"] |= {"scrape_interval": f"{SCRAPE_S}s", "scrape_timeout": f"{SCRAPE_S}s"}
    configuration["rule_files"] = [str(DOCKER / name) for name in configuration["rule_files"]]
    jobs = {job["job_name"]: job for job in configuration["scrape_configs"]}
    for name, addresses in targets.items():
        jobs[name]["static_configs"] = [{"targets": list(addresses)}]
    configuration["scrape_configs"] = [jobs[name] for name in targets]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(configuration))
    address = f"127.0.0.1:{free_port()}"
    command = [EXECUTABLE, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.txt").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=WAIT_S) as client:
            deadline = time.monotonic() + WAIT_S
            while not _is_ready(client):
                assert process.poll() is None, (folder / "prometheus.txt").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield Prometheus(client)
    finally:
        process.terminate()
        process.wait(WAIT_S)


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False
