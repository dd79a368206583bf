"""API keys: who may ask, and when the service may be reached from outside without them."""

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from service.problems import UNAUTHORIZED, Problem
from trainer.config import ServiceSettings
from trainer.errors import ConfigError

# What probes, scrapers and a browser without a key need. Everything else is closed, so a new path is closed at first.
OPEN_PATHS: Final = frozenset({"/", "/livez", "/readyz", "/healthz", "/metrics", "/openapi.json", "/docs"})
OPEN_PREFIXES: Final = ("/dashboard/", "/docs/")


def load_keys(path: Path) -> dict[str, bytes]:
    """Reads a file of `name:key` lines, `#` for comments.

    Returns:
        By name, the SHA-256 of each key: digests are of one length, so comparing them tells nothing about the keys'.

    Raises:
        ConfigError: the file cannot be read, a line is no `name:key`, a name comes twice, or there is no key at all.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"service.api_keys_file: {path} cannot be read: {error}") from error
    keys: dict[str, bytes] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, key = (part.strip() for part in line.partition(":"))
        if not (name and colon and key):
            raise ConfigError(f"service.api_keys_file: line {number} of {path} is not name:key")
        if name in keys:
            raise ConfigError(f"service.api_keys_file: line {number} of {path} has the name {name!r} a second time")
        keys[name] = _digest(key.encode())
    if not keys:
        raise ConfigError(f"service.api_keys_file: {path} has no key; write lines of name:key")
    return keys


def check_reach(settings: ServiceSettings) -> None:
    """Whether the service may be bound where the configuration says.

    Raises:
        ConfigError: without keys it would be reachable from other hosts, or the host is no address of any.
    """
    try:
        found = socket.getaddrinfo(settings.host or None, settings.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"service.host: {settings.host!r} is no address: {error}") from error
    addresses = [ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in found]
    if settings.host and all(address.is_loopback for address in addresses):
        return
    if not settings.api_keys_file and not settings.allow_unauthenticated:
        raise ConfigError(
            f"service.host: {settings.host!r} can be reached from other hosts, and no API key is asked for: name a "
            "file of keys in service.api_keys_file, bind 127.0.0.1, or set service.allow_unauthenticated = true"
        )


class Keys:
    """Knows the API keys, and where none is asked for.

    Args:
        digests: by name, as `load_keys` gives them.
        metrics_need_key: whether `/metrics` is closed too.
    """

    def __init__(self, digests: Mapping[str, bytes], *, metrics_need_key: bool) -> None:
        self._digests = tuple(digests.items())
        self._open = OPEN_PATHS - {"/metrics"} if metrics_need_key else OPEN_PATHS

    def is_open(self, path: str) -> bool:
        """Whether a path is answered without a key."""
        return path in self._open or path.startswith(OPEN_PREFIXES)

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """The name of the key that a request brings, as `Authorization: Bearer KEY` or `X-API-Key: KEY`.

        Raises:
            Problem: it brings none, or one that is not known, even beside one that is.
        """
        presented: list[bytes] = []
        for name, value in headers:
            if name == b"x-api-key":
                presented.append(value.strip())
            elif name == b"authorization" and value[:7].lower() == b"bearer ":  # another scheme is for a proxy
                presented.append(value[7:].strip())
        names = [self._name(key) for key in presented]
        if not names or names[0] is None or None in names:
            raise Problem(UNAUTHORIZED, "Send an API key, as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.")
        return names[0]

    def _name(self, key: bytes) -> str | None:
        digest = _digest(key)
        # Every key is compared: the time says neither which one fits nor how much of one.
        names = [name for name, known in self._digests if hmac.compare_digest(digest, known)]
        return names[0] if names else None


class KeyCheck:
    """Middleware that asks for an API key outside open paths, and counts by its name."""

    def __init__(self, app: ASGIApp, keys: Keys, count: Callable[[str], None]) -> None:
        self._app = app
        self._keys = keys
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401, or lets the request pass."""
        if scope["type"] == "http" and not self._keys.is_open(scope["path"]):
            try:
                self._count(self._keys.check(scope["headers"]))
            except Problem as problem:
                await problem.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
