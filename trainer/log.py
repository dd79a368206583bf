"""Log lines: one event a line with its facts as keys, coloured for a terminal, JSON for machines, always on stderr."""

import logging
import sys
from typing import Literal

import structlog
from structlog.typing import Processor

LogFormat = Literal["auto", "console", "json"]


def configure_logging(format: LogFormat) -> None:
    """Sends structlog's events and the log records of other packages to stderr in one form.

    Tailstream's own events are shown from INFO on, those of other packages (uvicorn, kafka) from WARNING on.

    Args:
        format: `auto` writes for people when a terminal reads stderr, and JSON otherwise.
    """
    terminal = sys.stderr.isatty()
    for_people = format == "console" or (format == "auto" and terminal)
    every_event: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Processor] = (
        [structlog.dev.ConsoleRenderer(colors=terminal)]
        if for_people
        else [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
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
