"""Log records as lines, of text or of JSON. This file owns that each record is one line, bounded, and names the request
that it belongs to."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

from grpc._cython.cygrpc import ExecuteBatchError

from kvbank.console.output import printable
from memory_service.observe import request as requests

# The most characters of a message, and of an error with its traceback.
_LONGEST_MESSAGE, _LONGEST_ERROR = 2_000, 20_000


def configure(form: Literal["text", "json"], level: str) -> None:
    """Send the records of this package from `level` on, and the warnings of other packages, to stderr. This is for a
    process that is a server and nothing else, because it takes away other handlers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("memory_service").setLevel(level.upper())


class JsonFormatter(logging.Formatter):
    """Makes one JSON object of each record: time, level, logger, message, and request_id, method, tenant, bank and
    error where there are such; the owner of the data folder is no tenant."""

    def format(self, record: logging.LogRecord) -> str:
        """Make the line of a record."""
        fields = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
            **_request(),
        }
        if record.exc_info:
            fields["error"] = _error(self, record)
        return json.dumps(fields)


class TextFormatter(logging.Formatter):
    """Makes a line for people of each record, with all that `JsonFormatter` says, and a traceback on further lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Make the line of a record, and the lines of its traceback."""
        # A line break in a message could pass for a record of its own, and a terminal may obey what a caller wrote.
        line = f"{_time(record)} {record.levelname} {record.name}: {printable(_message(record))}"
        if request := _request():
            line += " [" + " ".join(f"{key}={value!r}" for key, value in request.items()) + "]"
        if record.exc_info:
            line += "\n" + printable(_error(self, record), keep="\n\t")
        return line


def leave_out_callers_who_left() -> None:
    """Have gRPC not log, as an error with its traceback, that an answer could not be sent because its caller had gone.
    A second call does nothing."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_not_of_a_caller_who_left)


def _is_not_of_a_caller_who_left(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], ExecuteBatchError))


def _message(record: logging.LogRecord) -> str:
    """Return the text of a record, bounded, because it may have a caller's words in it."""
    return _cut(record.getMessage(), _LONGEST_MESSAGE)


def _error(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    assert record.exc_info
    return _cut(formatter.formatException(record.exc_info), _LONGEST_ERROR)


def _cut(text: str, most: int) -> str:
    """Cut a long text to its begin and its end, and say how much is left out."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}... ({len(text) - most} characters) ...{text[-half:]}"


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _request() -> dict[str, str]:
    request = requests.current()
    if request is None:
        return {}
    caller = request.caller
    tenant = "" if caller is None or caller.is_owner else caller.tenant
    fields = {"request_id": request.id, "method": request.method, "tenant": tenant, "bank": request.bank}
    return {name: value for name, value in fields.items() if value}
