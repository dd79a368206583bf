"""Log lines: one event a line with its facts as keys, coloured for a terminal, JSON for machines, always on stderr."""

import logging
import os
import sys
from typing import Final, Literal

import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor, WrappedLogger

LogFormat = Literal["auto", "console", "json"]
FIRST: Final = ("timestamp", "level", "event")  # keys of a line, where people read it although it is JSON


def configure_logging(format: LogFormat) -> None:
    """Sends structlog's events and the log records of other packages to stderr in one form.

    Tailstream's own events are shown from INFO on, those of other packages (uvicorn, kafka) from WARNING on.

    Tracebacks are without the values of local variables: among those are passwords of brokers and API keys.

    Args:
        format: `auto` writes for people when a terminal reads stderr, and JSON otherwise.
    """
    terminal = sys.stderr.isatty()
    for_people = format == "console" or (format == "auto" and terminal)
    every_event: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        *([_with_rank] if os.environ.get("WORLD_SIZE", "1") != "1" else []),
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Processor] = (
        [structlog.dev.ConsoleRenderer(colors=terminal, exception_formatter=structlog.dev.plain_traceback)]
        if for_people
        else [
            structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
            _first_things_first,
            structlog.processors.JSONRenderer(default=str),
        ]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
            foreign_pre_chain=every_event,
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for own in ("trainer", "service"):
        logging.getLogger(own).setLevel(logging.INFO)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *every_event,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def _first_things_first(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    return {key: event[key] for key in FIRST if key in event} | dict(event)


def _with_rank(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Says which of the ranks that torchrun started a line is of."""
    return {**event, "rank": int(os.environ.get("RANK", "0"))}
