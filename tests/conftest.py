"""Brokers and stores that tests share: the embedded broker and disks always, Kafka and S3 where they are named."""

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from service.broker import EmbeddedBroker
from tests.s3 import S3Server
from trainer.config import Settings, load

CLIENT = "TAILSTREAM_KAFKA__CLIENT"
BASIC = """\
device = "cpu"
[kafka]
bootstrap_servers = ["{server}"]
topic = "{topic}"
[schema]
label = "price"
id = "id"
[schema.features]
size = "numeric"
age = "numeric"
kind = "categorical"
[batch]
size = 32
[learner]
step_rows = 16
replay_steps = 1
replay_rows = 512
label_memory = 64
[model]
hidden = [16]
category_buckets = 32
[store]
url = "{store}"
interval_s = 0.05
[trainer]
metrics_port = 0
[service]
port = 0
"""


@pytest.fixture(scope="session")
def embedded_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    broker = EmbeddedBroker(tmp_path_factory.mktemp("broker") / "broker.log")
    yield broker.bootstrap_server
    broker.stop()


CLIENTS = ["python", "confluent"]


@pytest.fixture(params=["embedded", *(pytest.param(client, marks=pytest.mark.kafka) for client in CLIENTS)])
def broker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A running broker, `host:port`: every test that takes it runs against each kind there is, by each client."""
    if request.param == "embedded":
        return str(request.getfixturevalue("embedded_broker"))
    monkeypatch.setenv(CLIENT, request.param)
    return real_kafka()


@pytest.fixture(name="real_kafka", params=CLIENTS)
def real_kafka_fixture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(CLIENT, request.param)
    return real_kafka()


def real_kafka() -> str:
    server = os.environ.get("TAILSTREAM_TEST_KAFKA")
    if not server:
        pytest.skip("no real Apache Kafka: start one and set TAILSTREAM_TEST_KAFKA=host:port")
    return server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server of the tests' own; whoever stops it starts it again."""
    script = os.environ.get("TAILSTREAM_TEST_S3_SERVER")
    if not script:
        pytest.skip("no S3 server: set TAILSTREAM_TEST_S3_SERVER to a script that starts one")
    server = S3Server(script, tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small configuration for a broker; the topic is new each time, the store is in the test's folder."""

    def write(
        server: str,
        *,
        topic: str | None = None,
        store: str = "snapshots",
        more: str = "",
        task: str = "regression",
    ) -> Path:
        text = BASIC.format(server=server, topic=topic or f"test-{uuid.uuid4().hex[:12]}", store=tmp_path / store)
        if task == "classification":
            text = text.replace('label = "price"', 'label = "kind"').replace(
                'kind = "categorical"', 'price = "numeric"'
            )
            text = set_in(text, "", "task", f'"{task}"')
        for line in more.splitlines():
            key, _, value = line.partition("=")
            table, _, name = key.strip().rpartition(".")
            text = set_in(text, table, name, value.strip())
        path = tmp_path / f"{store}.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def settings_for(write_config: Callable[..., Path]) -> Callable[..., Settings]:
    def make(server: str, **options: str) -> Settings:
        return load(write_config(server, **options))

    return make


def set_in(text: str, table: str, name: str, value: str) -> str:
    """The TOML text with `name = value` in a table, in place of what was there."""
    lines = text.splitlines()
    start = lines.index(f"[{table}]") + 1 if table else 0
    end = next((i for i in range(start, len(lines)) if lines[i].startswith("[")), len(lines))
    kept = [line for line in lines[start:end] if line.partition("=")[0].strip() != name]
    return "\n".join([*lines[:start], f"{name} = {value}", *kept, *lines[end:]]) + "\n"


@pytest.fixture
def logging_is_put_back() -> Iterator[None]:
    """For tests that configure logging."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    own = {name: logging.getLogger(name).level for name in ("trainer", "service")}
    yield
    structlog.reset_defaults()
    root.handlers[:], root.level = handlers, level
    for name, before in own.items():
        logging.getLogger(name).setLevel(before)
