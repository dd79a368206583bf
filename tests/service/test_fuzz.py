"""Requests made from the API's own description, right and wrong ones: what it promises holds."""

import subprocess
import sys
from pathlib import Path

import httpx


def test_the_api_keeps_what_its_description_promises(client: httpx.Client, tmp_path: Path) -> None:
    """No server error, no undocumented status or type, no valid request refused, no invalid one answered."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{client.base_url}/openapi.json"]
    options = ["--max-examples=10", "--generation-deterministic", "--no-color"]
    run = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Tested: 10" in run.stdout
