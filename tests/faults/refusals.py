"""Who is let in: SASL and TLS listeners of a real broker with certificates of its own, right and wrong credentials."""

import json
import subprocess
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any, Final

import kafka
import kafka.admin

from service.broker import free_port
from tests.faults.case import Ground, case
from tests.rig import Kafka, Trainer, each_once, rows, send, wait_until_consumed
from trainer.config import load

USER, PASSWORD = "trainer", "correct horse"
ADMITTED: Final = "100 records, each once"
REFUSED: Final = "exit 4: did not let us in"
LISTENERS: Final = ("PLAINTEXT", "PASSWORD", "TLS", "OTHERNAME", "BOTH", "MUTUAL")


class SecureKafka:
    """A broker with a listener for each way of getting in."""

    def __init__(self, script: str, folder: Path) -> None:
        folder.mkdir()
        self.ca = folder / "ca.pem"
        self.other_ca = folder / "other-ca.pem"
        for authority in (self.ca, self.other_ca):
            _openssl(
                f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={authority.stem} "
                f"-keyout {authority.with_suffix('.key')} -out {authority}"
            )
        self.certificate = self._certify(folder / "localhost.pem", "DNS:localhost,IP:127.0.0.1")
        other_name = self._certify(folder / "other.pem", "DNS:elsewhere.example")
        self.client = self._certify(folder / "client.pem", "DNS:client.example")
        self.ports = {name: free_port() for name in LISTENERS}
        controller = free_port()
        kinds = {
            "PLAINTEXT": "PLAINTEXT",
            "PASSWORD": "SASL_PLAINTEXT",
            "TLS": "SSL",
            "OTHERNAME": "SSL",
            "BOTH": "SASL_SSL",
            "MUTUAL": "SSL",
            "CONTROLLER": "PLAINTEXT",
        }
        at = ",".join(f"{name}://127.0.0.1:{port}" for name, port in self.ports.items())
        modules = "org.apache.kafka.common.security"
        sets = [
            f"controller.quorum.voters=1@127.0.0.1:{controller}",
            f"listeners={at},CONTROLLER://127.0.0.1:{controller}",
            f"advertised.listeners={at}",
            f"listener.security.protocol.map={','.join(f'{name}:{kind}' for name, kind in kinds.items())}",
        ]
        for name in ("TLS", "OTHERNAME", "BOTH", "MUTUAL"):
            store = other_name if name == "OTHERNAME" else self.certificate
            prefix = f"listener.name.{name.lower()}.ssl"
            sets += [f"{prefix}.keystore.type=PEM", f"{prefix}.keystore.location={store}"]
            sets += [f"{prefix}.truststore.type=PEM", f"{prefix}.truststore.location={self.ca}"]
            sets += [f"{prefix}.client.auth={'required' if name == 'MUTUAL' else 'none'}"]
        for name in ("PASSWORD", "BOTH"):
            prefix = f"listener.name.{name.lower()}"
            plain = f'{modules}.plain.PlainLoginModule required user_{USER}="{PASSWORD}";'
            sets += [f"{prefix}.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512"]
            sets += [f"{prefix}.plain.sasl.jaas.config={plain}"]
            for hash_ in ("256", "512"):
                sets += [f"{prefix}.scram-sha-{hash_}.sasl.jaas.config={modules}.scram.ScramLoginModule required;"]
        self.kafka = Kafka(script, folder / "kafka", sets, port=self.ports["PLAINTEXT"])
        self.kafka.start()
        with closing(kafka.KafkaAdminClient(bootstrap_servers=[self.kafka.server])) as admin:
            for mechanism in (
                kafka.admin.ScramMechanism.SCRAM_SHA_256,
                kafka.admin.ScramMechanism.SCRAM_SHA_512,
            ):
                admin.alter_user_scram_credentials(
                    [kafka.admin.UserScramCredentialUpsertion(USER, mechanism, PASSWORD.encode())]
                )

    def _certify(self, path: Path, names: str) -> Path:
        """A key and a certificate of the first authority, in one file."""
        key, request, certificate = (path.with_suffix(suffix) for suffix in (".key", ".csr", ".crt"))
        _openssl(f"req -newkey rsa:2048 -nodes -subj /CN={path.stem} -keyout {key} -out {request}")
        extension = path.with_suffix(".ext")
        extension.write_text(f"subjectAltName={names}\n")
        authority = f"-CA {self.ca} -CAkey {self.ca.with_suffix('.key')} -CAcreateserial"
        _openssl(f"x509 -req -days 2 -in {request} {authority} -extfile {extension} -out {certificate}")
        path.write_text(key.read_text() + certificate.read_text())
        return path


def _openssl(arguments: str) -> None:
    subprocess.run(["openssl", *arguments.split()], check=True, capture_output=True)


@cache
def secure(ground: Ground) -> SecureKafka:
    found = SecureKafka(ground.script, ground.folder / "secure")
    ground.on_close(found.kafka.kill)
    return found


def attempt(ground: Ground, listener: str, options: dict[str, Any]) -> str:
    """What comes of a trainer with these options at a listener of the broker."""
    broker = secure(ground)
    config = ground.config(broker.kafka.server)
    send(load(config), rows(100))
    table = "".join(f"{name} = {json.dumps(str(value))}\n" for name, value in options.items())
    text = config.read_text().replace(broker.kafka.server, f"127.0.0.1:{broker.ports[listener]}")
    config.write_text(text + f"[kafka.options]\n{table}")
    trainer = Trainer(config)
    if "wrong" in options.values() or trainer.poll() is not None:
        return _ended(trainer)
    try:
        snapshot = wait_until_consumed(load(config), 100, trainer)
    except AssertionError:
        return _ended(trainer)
    assert trainer.stop() == 0
    once = "each once" if each_once(snapshot.manifest.partitions[0]) else "NOT each once"
    return f"{snapshot.manifest.samples} records, {once}"


def _ended(trainer: Trainer) -> str:
    code, log = trainer.wait(), trainer.log.read_text()
    return f"exit {code}: " + ("did not let us in" if "did not let us in" in log else log[-300:])


def sasl(mechanism: str, password: str = PASSWORD, **more: Any) -> dict[str, Any]:
    base = {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": mechanism}
    return {**base, "sasl_plain_username": USER, "sasl_plain_password": password, **more}


def tls(ca: Path, **more: Any) -> dict[str, Any]:
    return {"security_protocol": "SSL", "ssl_cafile": ca, **more}


def ways(broker: SecureKafka) -> dict[str, tuple[str, dict[str, Any]]]:
    both = {"security_protocol": "SASL_SSL", "ssl_cafile": broker.ca}
    own = {"ssl_certfile": broker.client, "ssl_keyfile": broker.client}
    return {
        "SASL PLAIN": ("PASSWORD", sasl("PLAIN")),
        "SASL SCRAM-SHA-256": ("PASSWORD", sasl("SCRAM-SHA-256")),
        "SASL SCRAM-SHA-512 over TLS": ("BOTH", sasl("SCRAM-SHA-512", **both)),
        "TLS": ("TLS", tls(broker.ca)),
        "TLS with a certificate of the client": ("MUTUAL", tls(broker.ca, **own)),
        "wrong password, PLAIN": ("PASSWORD", sasl("PLAIN", "wrong")),
        "wrong password, SCRAM-SHA-512 over TLS": ("BOTH", sasl("SCRAM-SHA-512", "wrong", **both)),
        "TLS, certificate of another authority": ("TLS", tls(broker.other_ca)),
        "TLS, certificate of another host": ("OTHERNAME", tls(broker.ca)),
        "TLS, no certificate of the client": ("MUTUAL", tls(broker.ca)),
    }


def _attempt(name: str) -> Callable[[Ground], str]:
    return lambda ground: attempt(ground, *ways(secure(ground))[name])


for _name, _expected in {
    "SASL PLAIN": ADMITTED,
    "SASL SCRAM-SHA-256": ADMITTED,
    "SASL SCRAM-SHA-512 over TLS": ADMITTED,
    "TLS": ADMITTED,
    "TLS with a certificate of the client": ADMITTED,
    "wrong password, PLAIN": REFUSED,
    "wrong password, SCRAM-SHA-512 over TLS": REFUSED,
    "TLS, certificate of another authority": REFUSED,
    "TLS, certificate of another host": REFUSED,
    "TLS, no certificate of the client": REFUSED,
}.items():
    case(_name, _expected)(_attempt(_name))
