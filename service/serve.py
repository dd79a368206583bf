"""How the service is started and stopped: the address first, then uvicorn."""

import signal
import socket
from types import FrameType
from typing import Final

import structlog
import uvicorn

from service.auth import check_reach
from trainer.config import Settings
from trainer.errors import ConfigError, TailstreamError

STOP_S: Final = 10  # longest wait for requests under way when the service is told to stop
BACKLOG: Final = 2048

log = structlog.stdlib.get_logger(__name__)


class Server(uvicorn.Server):
    """A server of `create_app` that does not wait for the pages that are open when it stops."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the pages' streams, then waits for the requests under way."""
        self.config.app.state.live.end()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT; requests under way are answered first. To be called in the main thread.

    Raises:
        ConfigError: the address cannot be bound, or may not without API keys; or the application cannot be made.
    """
    check_reach(settings.service)
    workers = settings.service.workers
    with bind(settings.service.host, settings.service.port) as listener:
        log.info("serving", url=url(listener), store=settings.store.url, workers=workers)
        if workers == 1:
            answer_at(listener, settings)
        else:
            from service.workers import serve_by_workers

            serve_by_workers(settings, listener, workers)
    log.info("stopped")


def answer_at(listener: socket.socket, settings: Settings) -> None:
    """Answers at a socket, in this process, until SIGTERM or SIGINT.

    Raises:
        ConfigError: the application cannot be made.
        TailstreamError: the server could not be started.
    """
    from service.app import create_app  # and torch, which a process that only watches workers does without

    server = Server(
        uvicorn.Config(
            create_app(settings),
            loop="uvloop",
            http="httptools",
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,  # nothing here depends on who asks
            backlog=BACKLOG,
            timeout_graceful_shutdown=STOP_S,
        )
    )

    # uvicorn raises the signal again once it has stopped; a handler of our own makes that an orderly return.
    def stop(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server.run(sockets=[listener])
    if not server.started and not server.should_exit:
        raise TailstreamError("the service could not be started; the log says why")


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


def url(listener: socket.socket) -> str:
    """Where a browser on this machine finds the service."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
