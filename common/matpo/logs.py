"""Logs: one fixed event name plus fields, as text for people or JSON for machines, on stderr."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

from matpo.settings import LogSettings


def configure(settings: LogSettings, *, process: str) -> None:
    """Set up structlog for this process. `process` (for example "actor-1") is in every line."""
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if settings.format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=28)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)


def get(**fields: Any) -> Any:
    """A logger with fields bound."""
    return structlog.get_logger(**fields)
