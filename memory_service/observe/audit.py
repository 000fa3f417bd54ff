"""The audit log has a JSON line for every call, refused ones too, that says who did what to which bank, and no content.

This file owns the rules that no call waits for the log, that what a caller made long is cut, and that a log that cannot
be written is a trouble of the service for as long as it lasts.
"""

import json
import logging
import queue
from contextlib import suppress
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import QueueListener, RotatingFileHandler
from pathlib import Path
from typing import Any

from kvbank.files import private
from memory_service.domain.errors import StartError
from memory_service.observe.request import LONGEST_LOGGED, Request
from memory_service.observe.troubles import Troubles

# Lines that may wait for the disk; those beyond them are counted as lost.
_MOST_WAITING = 100_000
TROUBLE = "audit"


class AuditLog:
    """Writes what calls were made; threads may share it. Until `begin`, and after `end`, it does nothing."""

    def __init__(self, troubles: Troubles, most_waiting: int = _MOST_WAITING) -> None:
        """Begin with no file. most_waiting: the lines that wait for the disk."""
        self._troubles = troubles
        self._waiting: queue.Queue[Any] = queue.Queue(most_waiting)
        self._listener: QueueListener | None = None

    def begin(self, path: Path, largest: int, kept: int) -> None:
        """Append to the file `path`, which is made private where there is none.

        largest: the bytes at which the file becomes `path.1`, and that one `path.2`. kept: how many of these are kept.
        Errors: StartError for a file that cannot be opened.
        """
        try:
            file = _File(path, largest, kept, self._troubles)
        except OSError as error:
            raise StartError(f"cannot write the audit log {path}: {error.strerror}") from error
        self._listener = _Listener(self._waiting, file)
        self._listener.start()

    def end(self) -> None:
        """Write what waits, and close the file. A second call does nothing."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.stop()
            for file in listener.handlers:
                file.close()

    def called(self, request: Request, code: str, seconds: float) -> None:
        """Write down that a call has ended. code: the name of its gRPC status code."""
        if self._listener is None:
            return
        caller = request.caller
        said = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": request.id,
            "key": caller.key_id if caller else "",
            "subject": caller.subject if caller else "",
            "tenant": caller.tenant if caller else "",
            "peer": request.peer,
            "method": request.method,
            "bank": request.bank,
            "session": request.session,
            "receipt": request.receipt,
            "result": code,
            "reason": request.reason,
        }
        line = {name: value[:LONGEST_LOGGED] for name, value in said.items() if value}
        text = json.dumps({**line, "seconds": round(seconds, 6)})
        try:
            self._waiting.put_nowait(logging.makeLogRecord({"msg": text}))
        except queue.Full:
            self._troubles.begin(TROUBLE, "the audit log is slower than the calls, and lines of it are lost")


class _Listener(QueueListener):
    """A thread that hands on what waits in the queue until it is stopped."""

    def __init__(self, waiting: "queue.Queue[Any]", handler: logging.Handler) -> None:
        """Listen to a queue of log records."""
        super().__init__(waiting, handler)
        self._waiting = waiting

    def enqueue_sentinel(self) -> None:
        """Wait for room, where the base class would fail for a full queue."""
        self._waiting.put(None)


class _File(RotatingFileHandler):
    """A handler that appends lines to a private file, and tells the troubles of the service whether that works."""

    def __init__(self, path: Path, largest: int, kept: int, troubles: Troubles) -> None:
        """Open the file for appending. Errors: OSError."""
        self._troubles, self._written = troubles, False
        super().__init__(path, maxBytes=largest, backupCount=kept, encoding="utf-8")

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", opener=private.opener)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, and end the trouble where that works."""
        self._written = True
        super().emit(record)
        if self._written:
            self._troubles.end(TROUBLE)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Note that a line could not be written, in the place of a traceback on stderr for each."""
        self._written = False
        self._troubles.begin(TROUBLE, f"the audit log {self.baseFilename} cannot be written; lines of it are lost")

    def close(self) -> None:
        """Close the file, and leave what a full disk does not take."""
        with suppress(OSError):
            super().close()
