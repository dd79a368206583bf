"""Which names the service may be called by: a page elsewhere must not reach it by making its own name mean this host.

A browser lets a page of evil.example talk to evil.example alone; but whoever owns that name can have it resolve to
127.0.0.1 a moment later ("DNS rebinding"), and then the page reads what only programs on this host should. What such
a request cannot hide is the name that it was made to, in its Host header.
"""

import ipaddress
import re
from collections.abc import Iterable, Sequence
from typing import Final, Self

from starlette.types import ASGIApp, Receive, Scope, Send

from service.problems import MISDIRECTED, Problem
from trainer.config import ServiceSettings

HOST: Final = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]*))(?::\d*)?")  # with its port
LONGEST_NAME: Final = 253  # characters, of a host's
MOST_KEPT: Final = 256  # headers seen to be fine, which need not be looked into again


class Hosts:
    """Knows the names.

    Args:
        patterns: names, in lower case; `*.example.org` stands for all below example.org. What can only mean this host
            (localhost, addresses of loopback) is always fine.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._names = frozenset(pattern for pattern in patterns if not pattern.startswith("*."))
        self._endings = (".localhost", *(pattern[1:] for pattern in patterns if pattern.startswith("*.")))
        self._fine: set[bytes] = set()

    @classmethod
    def of(cls, settings: ServiceSettings) -> Self | None:
        """What a configuration allows; None where any name will do.

        An API key, which a page elsewhere does not have, makes names harmless. So does a host that others may reach
        anyway; and nobody but its user knows what it is called.
        """
        patterns = [pattern.lower() for pattern in settings.allowed_hosts]
        if "*" in patterns or (not patterns and (settings.api_keys_file or settings.allow_unauthenticated)):
            return None
        return cls([*patterns, settings.host.lower()])

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Whether a request was made to a name of ours, or to none: browsers always say one.

        Raises:
            Problem: it was made to another.
        """
        for name, value in headers:
            if name == b"host" and value not in self._fine:
                said = value.decode("latin-1")
                found = HOST.fullmatch(said)
                if found is None or not self._is_ours((found[1] or found[2]).lower().rstrip(".")):
                    what = f"{said[:LONGEST_NAME]!r} is no name of this service; if it should be, "
                    raise Problem(MISDIRECTED, f"{what}add it to service.allowed_hosts.")
                if len(self._fine) < MOST_KEPT:
                    self._fine.add(value)

    def _is_ours(self, host: str) -> bool:
        if host == "localhost" or host in self._names or host.endswith(self._endings):
            return True
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False


class HostCheck:
    """Middleware that refuses requests made to other names."""

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 421, or lets the request pass."""
        if scope["type"] == "http":
            try:
                self._hosts.check(scope["headers"])
            except Problem as problem:
                await problem.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)
