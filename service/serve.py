"""How the service is started and stopped: the address first, then uvicorn."""

import os
import signal
import socket
import ssl
import threading
from types import FrameType
from typing import Any, Final

import structlog
import uvicorn
from fastapi import FastAPI

from service.auth import check_reach
from service.connection import Connection
from trainer.config import ServiceSettings, Settings
from trainer.errors import ConfigError, TailstreamError
from trainer.memory import freeze_heap

STOP_S: Final = 10  # longest wait for requests under way when the service is told to stop
BACKLOG: Final = 2048

log = structlog.stdlib.get_logger(__name__)


class Server(uvicorn.Server):
    """A server of `create_app` that says when it is about to stop, and does not wait for the pages that are open then.

    Args:
        config: what uvicorn is told.
        drain_s: how long it goes on answering, not ready any more, once it is told to stop; told again it ends at once.
    """

    def __init__(self, config: uvicorn.Config, drain_s: float = 0.0) -> None:
        super().__init__(config)
        self._drain_s = drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes a signal to stop."""
        stopping: threading.Event = self.config.app.state.stopping  # type: ignore[union-attr]
        if stopping.is_set() or not self._drain_s:
            super().handle_exit(sig, frame)
            return
        stopping.set()
        timer = threading.Timer(self._drain_s, super().handle_exit, (sig, None))
        timer.daemon = True
        timer.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the pages' streams, then waits for the requests under way."""
        self.config.app.state.live.end()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT; to be called in the main thread.

    From then on it is not ready, goes on answering for `service.drain_s`, and ends when the requests under way are
    answered.

    Raises:
        ConfigError: the address cannot be bound, or may not without API keys; the certificate cannot be used; or the
            application cannot be made.
    """
    check_reach(settings.service)
    check_certificate(settings.service)
    workers = settings.service.workers
    with bind(settings.service.host, settings.service.port) as listener:
        for number in (signal.SIGTERM, signal.SIGINT):  # while what answers is still imported and made
            signal.signal(number, _end_at_once)
        scheme = "https" if settings.service.ssl_certfile else "http"
        log.info("serving", url=url(listener, scheme), store=settings.store.url, workers=workers)
        if workers == 1:
            answer_at(listener, settings)
        else:
            from service.workers import serve_by_workers

            serve_by_workers(settings, listener, workers)
    log.info("stopped")


def _end_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(0)  # an exception may come in the middle of an import; and nothing is open yet that needs closing


def answer_at(listener: socket.socket, settings: Settings) -> None:
    """Answers at a socket, in this process, until SIGTERM or SIGINT.

    Raises:
        ConfigError: the application cannot be made.
        TailstreamError: the server could not be started.
    """
    # And torch, which a process that only watches workers does without.
    from service.app import create_app
    from trainer import decoding, tilting

    if not (decoding.is_loaded() and tilting.is_loaded()):
        log.warning("nothing is compiled: answers take several times as long; install with a C compiler at hand")
    server = Server(server_config(create_app(settings), settings.service), settings.service.drain_s)
    freeze_heap()

    # uvicorn raises the signal again once it has stopped; a handler of our own makes that an orderly return.
    def stop(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server.run(sockets=[listener])
    if not server.started and not server.should_exit:
        raise TailstreamError("the service could not be started; the log says why")


def server_config(app: FastAPI, settings: ServiceSettings) -> uvicorn.Config:
    """What uvicorn is told."""
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=Connection,
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # nothing here depends on who asks
        backlog=BACKLOG,
        timeout_graceful_shutdown=STOP_S,
        **_tls(settings),
    )


def _tls(settings: ServiceSettings) -> dict[str, Any]:
    """What uvicorn is told of certificates; nothing for plain HTTP."""
    if not settings.ssl_certfile:
        return {}
    return {
        "ssl_certfile": settings.ssl_certfile,
        "ssl_keyfile": settings.ssl_keyfile or None,
        "ssl_keyfile_password": settings.ssl_keyfile_password or None,
        "ssl_ca_certs": settings.ssl_ca_certs or None,
        "ssl_cert_reqs": ssl.CERT_REQUIRED if settings.ssl_ca_certs else ssl.CERT_NONE,
    }


def check_certificate(settings: ServiceSettings) -> None:
    """Whether certificate, key and authorities can be used, before anything is started.

    Raises:
        ConfigError: one is absent, is not PEM, or does not fit the others.
    """
    if not settings.ssl_certfile:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # The password even where it is empty: without any, openssl would ask at the terminal for an encrypted key's.
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile or None, settings.ssl_keyfile_password)
    except (OSError, ValueError) as error:  # which ssl.SSLError is
        files = " and ".join(name for name in (settings.ssl_certfile, settings.ssl_keyfile) if name)
        raise ConfigError(f"service.ssl_certfile and service.ssl_keyfile: {files} cannot be used: {error}") from error
    if settings.ssl_ca_certs:
        try:
            context.load_verify_locations(settings.ssl_ca_certs)
        except OSError as error:
            raise ConfigError(f"service.ssl_ca_certs: {settings.ssl_ca_certs} cannot be used: {error}") from error


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ConfigError: another program has the port, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        # Only a socket that listens keeps others from binding the same port.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"service.host and service.port: {host}:{port} cannot be bound ({error.strerror}); stop what uses it, or "
            "give another port (0 takes a free one)"
        ) from error
    return listener


def url(listener: socket.socket, scheme: str = "http") -> str:
    """Where a browser on this machine finds the service."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
