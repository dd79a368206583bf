"""Reading a request's body: refused by its headers where they say enough, and never more of it than is allowed."""

import asyncio
from typing import Final

from starlette.types import Receive

from service.problems import NOT_JSON_TYPE, OVERLOADED, SLOW_BODY, TOO_LARGE, Problem
from trainer.config import ServiceSettings

MOST_BODIES: Final = 16  # of the largest size, that may be in memory while they are read and decoded


class Bodies:
    """Reads the bodies of one service, which together take no more memory than a few of the largest.

    Args:
        settings: the largest size, and how long one may take.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self._most_bytes = settings.max_body_bytes
        self._timeout_s = settings.request_timeout_s
        self._held_bytes = 0

    def check(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Refuses what need not be read.

        Raises:
            Problem: the headers say that it is too large, or not JSON.
        """
        for name, value in headers:
            if name == b"content-type" and not _is_json(value):
                raise Problem(NOT_JSON_TYPE, f"The Content-Type is {value.decode('latin-1')!r}.")
            if name == b"content-encoding" and value.lower() != b"identity":
                raise Problem(NOT_JSON_TYPE, f"The Content-Encoding is {value.decode('latin-1')!r}; send it as it is.")
            if name == b"content-length" and int(value) > self._most_bytes:
                raise self._too_large()

    def check_size(self, body: bytes) -> None:
        """Refuses a body that came in one piece.

        Raises:
            Problem: it is too large.
        """
        if len(body) > self._most_bytes:
            raise self._too_large()

    async def read(self, receive: Receive) -> bytes | None:
        """The body, None if the client left before its end; stops at the limit, whatever a header said.

        Raises:
            Problem: it is too large or too slow, or too many large ones are being read.
        """
        parts = bytearray()
        try:
            async with asyncio.timeout(self._timeout_s):
                message = await receive()
                body: bytes = message.get("body", b"")
                if not message.get("more_body"):
                    self.check_size(body)
                    return None if message["type"] == "http.disconnect" else body
                while True:
                    part: bytes = message.get("body", b"")
                    parts += part
                    self._held_bytes += len(part)
                    if len(parts) > self._most_bytes:
                        raise self._too_large()
                    if self._held_bytes > MOST_BODIES * self._most_bytes:
                        raise Problem(OVERLOADED, "Too many large bodies are being read; try again later.")
                    if not message.get("more_body"):
                        return None if message["type"] == "http.disconnect" else bytes(parts)
                    message = await receive()
        except TimeoutError:
            raise Problem(SLOW_BODY, f"The body did not arrive within {self._timeout_s:g} s.") from None
        finally:
            self._held_bytes -= len(parts)

    def _too_large(self) -> Problem:
        return Problem(TOO_LARGE, f"A body may have {self._most_bytes} bytes; send fewer instances at a time.")


def _is_json(content_type: bytes) -> bool:
    if content_type == b"application/json":
        return True
    media_type = content_type.partition(b";")[0].strip().lower()
    return media_type == b"application/json" or media_type.endswith(b"+json")
