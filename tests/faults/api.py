"""Requests made from the API's own description, right and wrong ones, until the time is up.

`python -m tests.faults.api --seconds 600 --json FILE`: schemathesis asks a service of numbers that wants keys, then one
of classes, each by `tailstream serve` in a process of its own.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import tomlkit

from service.broker import free_port
from service.children import Child
from tests.service.conftest import until
from tests.service.store import make_settings, write_snapshot
from trainer.config import Settings

KEY = "a-long-key-1"
STOP_S = 20.0
PATIENCE_S = 90.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600, help="for all services together")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "keys").write_text(f"fuzz:{KEY}\n")
        numbers = make_settings(folder / "numbers", api_keys_file=str(folder / "keys"), metrics_need_key=True)
        classes = make_settings(folder / "classes", task="classification")
        write_snapshot(numbers)
        write_snapshot(classes)
        services = {"numbers": numbers, "classes": classes}
        found = {task: fuzz(folder, task, of, arguments.seconds // len(services)) for task, of in services.items()}
    report: dict[str, Any] = {
        name: sum(of[name] for of in found.values()) for name in ("requests", "server_errors", "violations")
    }
    report["services"] = found
    print(
        f"{report['requests']} requests in {arguments.seconds} s: {report['server_errors']} server errors, "
        f"{report['violations']} violations of the description"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(bool(report["server_errors"] or report["violations"]))


def fuzz(folder: Path, task: str, settings: Settings, seconds: int) -> dict[str, Any]:
    """Asks a service for so long; server errors by its own count, violations by schemathesis's."""
    port = free_port()
    config, log, said = (folder / f"{task}.{kind}" for kind in ("toml", "log", "json"))
    service = settings.service.model_copy(update={"port": port})
    told = settings.model_copy(update={"service": service}).model_dump(mode="json", by_alias=True, exclude_none=True)
    config.write_text(tomlkit.dumps(told))
    process = Child("service", [sys.executable, "-m", "service", "serve", "--config", str(config)], log, {})
    # Not by X-API-Key: an Authorization of another scheme beside that is a proxy's, and no wrong key of ours.
    headers = {"Authorization": f"Bearer {KEY}"} if settings.service.api_keys_file else {}
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, headers=headers) as client:
            until(lambda: is_ready(process, client), PATIENCE_S)
            command = [sys.executable, "-m", "schemathesis.cli", "run", f"{client.base_url}/openapi.json"]
            # Keys of its own making would have nearly every request refused.
            command += ["--generation-with-security-parameters=false"]
            command += [f"--max-time={seconds}", "--continue-on-failure", "--no-color", f"--report-json-path={said}"]
            command += [f"--header={name}: {value}" for name, value in headers.items()]
            subprocess.run(command, cwd=folder, check=False)
            text = client.get("/metrics").text
        process.check()
    finally:
        process.stop(STOP_S)
    answered: Counter[str] = Counter()
    for status, count in re.findall(r'http_requests_total\{.*status="(\d+)"\} (\S+)', text):
        answered[status] += round(float(count))
    report = json.loads(said.read_text())
    return {
        "requests": answered.total(),
        "answers": dict(sorted(answered.items())),
        "server_errors": answered["500"] + log.read_text().count("Traceback"),
        "violations": sum(failure["count"] for failure in report["failures"]) + len(report["errors"]),
        "failures": report["failures"] + report["errors"],
    }


def is_ready(process: Child, client: httpx.Client) -> bool:
    process.check()
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()
