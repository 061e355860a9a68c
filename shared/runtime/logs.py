"""Logs: one JSON line per event, an event name plus fields."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any


class Log:
    """Writes `{"time", "level", "service", "pod", "event", ...fields}` lines.

    INFO per version or step, DEBUG per message.
    """

    def __init__(self, service: str, pod: str = "") -> None:
        self._logger = logging.getLogger(f"lagwise.{service}")
        self._base = {"service": service, "pod": pod}

    def debug(self, event: str, **fields: Any) -> None:
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._write(logging.ERROR, event, fields)

    def _write(self, level: int, event: str, fields: dict[str, Any]) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, extra={"lagwise_fields": {**self._base, **fields}})


class JsonFormatter(logging.Formatter):
    """Formats our events and third-party records alike as one JSON line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": round(time.time(), 3),
            "level": record.levelname,
            "event": record.getMessage(),
            **getattr(record, "lagwise_fields", {"logger": record.name}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str) -> None:
    """Send everything to stderr as JSON lines; idempotent."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("lagwise").setLevel(level)
