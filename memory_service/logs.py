"""How log records look: one line each, as text or JSON, with the request that they belong to."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

from kvbank._cli.output import printable
from memory_service import requests


def configure(form: Literal["text", "json"], level: str) -> None:
    """Send our records from `level` on, and warnings of others, to stderr; for a process that is all ours."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("memory_service").setLevel(level.upper())


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and request_id, method, bank, error where there are."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        fields = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_request(),
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class TextFormatter(logging.Formatter):
    """For people: what JsonFormatter says, and a traceback on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the lines of a traceback."""
        # A line break in a message could pass for a record of its own, and a terminal would obey what a caller sent.
        line = f"{_time(record)} {record.levelname} {record.name}: {printable(record.getMessage())}"
        if request := _request():
            line += " [" + " ".join(f"{key}={value!r}" for key, value in request.items()) + "]"
        if record.exc_info:
            line += "\n" + printable(self.formatException(record.exc_info), keep="\n")
        return line


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _request() -> dict[str, str]:
    request = requests.current()
    if request is None:
        return {}
    fields = {"request_id": request.id, "method": request.method, "bank": request.bank}
    return {name: value for name, value in fields.items() if value}
