"""Structured logs: one event per line, JSON, with the correlation id of what is being done."""

import contextlib
import logging
import re
import sys
import uuid
from collections.abc import Iterator

import structlog

from services.common import tracing

_CORRELATION_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


def configure(service: str, level: str = "INFO") -> None:
    """Send structlog and the standard library's loggers to standard error as JSON lines."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                lambda _logger, _name, event: {"service": service, **event},
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # Their routine messages (every poll, every request) would bury ours.
    for noisy in ("aiokafka", "faust", "mode", "uvicorn.access", "grpc._cython.cygrpc"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def new_correlation_id() -> str:
    return uuid.uuid4().hex


def accepted_correlation_id(proposed: str | None) -> str:
    """The caller's correlation id if it is harmless (letters, digits, ._:-, at most 64), else a new one."""
    return proposed if proposed and _CORRELATION_ID.fullmatch(proposed) else new_correlation_id()


def current_correlation_id() -> str:
    """The id bound by `correlated`, or a new one where nothing is bound."""
    bound = structlog.contextvars.get_contextvars().get("correlation_id")
    return bound if isinstance(bound, str) else new_correlation_id()


@contextlib.contextmanager
def correlated(correlation_id: str, *, is_entry: bool = False) -> Iterator[None]:
    """Every log line inside carries the id. Where traces are on, inside is a span of its trace, named like the function that says
    this, unless there is one around already or the edge makes its own (`is_entry`)."""
    with structlog.contextvars.bound_contextvars(correlation_id=correlation_id):
        if is_entry or not tracing.is_on():
            yield
            return
        with tracing.continued(sys._getframe(2).f_code.co_qualname, correlation_id):
            yield
