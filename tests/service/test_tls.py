"""HTTPS by a certificate of the configuration's, and clients by theirs."""

import ssl
from pathlib import Path

import httpx
import pytest
import trustme

from service.serve import serve
from tests.service.store import instance, make_settings, write_snapshot
from tests.service.test_serve import events, started
from trainer.config import ServiceSettings, Settings
from trainer.errors import ConfigError


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Certificate, key, and the authority's own certificate."""
    folder = tmp_path_factory.mktemp("tls")
    certificate = authority.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    authority.cert_pem.write_to_path(folder / "authority.pem")
    return {name: str(folder / f"{name}.pem") for name in ("certificate", "key", "authority")}


def with_certificate(folder: Path, files: dict[str, str], **service: object) -> Settings:
    settings = make_settings(folder, ssl_certfile=files["certificate"], ssl_keyfile=files["key"], **service)
    write_snapshot(settings)
    return settings


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def test_https_is_answered_and_http_is_not(tmp_path: Path, authority: trustme.CA, files: dict[str, str]) -> None:
    with started(with_certificate(tmp_path / "store", files)) as process:
        url = str(next(events(process))["url"])
        assert url.startswith("https://127.0.0.1:")
        with httpx.Client(base_url=url, verify=trusting(authority), timeout=20) as client:
            assert client.post("/predict", json=instance(0)).json()["model_version"] == 1
            assert client.get("/readyz").status_code == 200
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/livez", timeout=20)  # by an authority that nobody else knows
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{url}/livez".replace("https", "http"), timeout=20)


def test_clients_without_a_certificate_are_kept_out(
    tmp_path: Path, authority: trustme.CA, files: dict[str, str]
) -> None:
    settings = with_certificate(tmp_path / "store", files, ssl_ca_certs=files["authority"], workers=2)
    with started(settings) as process:
        url = str(next(events(process))["url"])
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/livez", verify=trusting(authority), timeout=20)
        context = trusting(authority)
        authority.issue_cert("client@example.org").configure_cert(context)
        with httpx.Client(base_url=url, verify=context, timeout=20) as client:
            assert client.post("/predict", json=instance(0)).json()["model_version"] == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ssl_certfile": "absent.pem"}, "absent.pem"),
        ({"ssl_keyfile": "absent.pem"}, "absent.pem"),
        ({"ssl_keyfile": ""}, "ssl_keyfile"),  # the certificate's file has no key
        ({"ssl_ca_certs": "absent.pem"}, "ssl_ca_certs"),
    ],
    ids=str,
)
def test_files_that_cannot_be_used_are_said(
    tmp_path: Path, files: dict[str, str], changes: dict[str, str], says: str
) -> None:
    settings = make_settings(tmp_path, **{"ssl_certfile": files["certificate"], "ssl_keyfile": files["key"], **changes})
    with pytest.raises(ConfigError, match=says):
        serve(settings)


def test_a_key_of_another_certificate_and_one_with_a_password_are_said(
    tmp_path: Path, authority: trustme.CA, files: dict[str, str]
) -> None:
    from cryptography.hazmat.primitives import serialization

    key = authority.issue_cert("127.0.0.1").private_key_pem.bytes()
    loaded = serialization.load_pem_private_key(key, None)
    locked = loaded.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    for name, content in (("other.pem", key), ("locked.pem", locked)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=name):
            serve(make_settings(tmp_path, ssl_certfile=files["certificate"], ssl_keyfile=str(tmp_path / name)))


@pytest.mark.parametrize("name", ["ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"])
def test_what_needs_a_certificate_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is set and ssl_certfile is not"):
        ServiceSettings(**{name: "something"})
