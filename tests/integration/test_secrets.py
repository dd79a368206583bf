"""What should stay secret is in no line that the programs write."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.conftest import running
from tests.service.store import make_settings, write_snapshot
from trainer.log import configure_logging

PASSWORD = "hunter2-of-the-broker"
CONFIG = f"""
[kafka]
bootstrap_servers = ["127.0.0.1:1"]
topic = "orders"

[kafka.options]
security_protocol = "SASL_PLAINTEXT"
sasl_mechanism = "PLAIN"
sasl_plain_username = "trainer"
sasl_plain_password = "{PASSWORD}"

[schema]
label = "minutes"

[schema.features]
items = "numeric"

[store]
url = "STORE"

[trainer]
metrics_port = 0
"""


def test_a_trainer_that_cannot_reach_its_broker_keeps_the_password(tmp_path: Path) -> None:
    config = tmp_path / "tailstream.toml"
    config.write_text(CONFIG.replace("STORE", str(tmp_path / "store")))
    command = [sys.executable, "-m", "trainer", "--config", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if json.loads(line)["event"].startswith("waiting for") or "no Kafka broker" in line:
            break
    process.send_signal(signal.SIGTERM)
    out, rest = process.communicate(timeout=60)
    assert process.returncode == 0
    events = [json.loads(line) for line in [*lines, *rest.splitlines()]]
    assert events[0]["event"] == "trainer started"
    assert "stopping" in [event["event"] for event in events]
    assert PASSWORD not in out + rest + "".join(lines)


def test_a_misspelt_option_is_named_without_its_value(tmp_path: Path) -> None:
    config = tmp_path / "tailstream.toml"
    text = CONFIG.replace("sasl_plain_password", "sasl_plain_pasword").replace("STORE", str(tmp_path / "store"))
    config.write_text(text)
    command = [sys.executable, "-m", "service", "check", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode != 0
    assert "sasl_plain_pasword" in done.stdout + done.stderr
    assert PASSWORD not in done.stdout + done.stderr


@pytest.mark.usefixtures("logging_is_put_back")
def test_no_api_key_is_logged_not_even_where_answering_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "a-long-key-of-alice"
    (tmp_path / "keys").write_text(f"alice:{key}\n")
    settings = make_settings(tmp_path / "store", api_keys_file=str(tmp_path / "keys"))
    write_snapshot(settings)
    configure_logging("json")
    monkeypatch.setattr("service.batcher.Batcher.ask", _fail)
    with running(settings) as client:
        for headers in ({"Authorization": f"Bearer {key}"}, {"X-API-Key": key}):
            assert client.post("/predict", json={"dep_delay": 1}, headers=headers).status_code == 500
        assert client.post("/predict", json={"dep_delay": 1}, headers={"X-API-Key": f"{key}?"}).status_code == 401
    said = capsys.readouterr().err
    assert "on purpose" in said, "the failure is logged"
    assert key not in said


def _fail(*_: object, **__: object) -> None:
    raise RuntimeError("on purpose")
