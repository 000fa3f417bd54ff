"""The observation of requests. This file owns that each request, over whichever transport it came, is counted, timed
and logged from its first to its last moment."""

import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from memory_service.observe import request as requests
from memory_service.observe.audit import AuditLog
from memory_service.observe.metrics import Metrics
from memory_service.observe.request import Request
from memory_service.observe.seldom import Repeating

_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
# Codes of failures that are the service's and not the caller's.
_TROUBLE = ("INTERNAL", "UNKNOWN", "DATA_LOSS", "UNAVAILABLE")
# Reasons that mean bytes which do not match their checksum, and where that was seen.
_CHECKSUMS = {"CHECKSUM_IN_TRANSIT": "write", "CHECKSUM_MISMATCH": "read"}
_log = logging.getLogger(__name__)


def request_id(wanted: object) -> str:
    """Return the request id that the caller sent where that is one, else a new one."""
    return wanted if isinstance(wanted, str) and _ID.fullmatch(wanted) else secrets.token_hex(8)


class Observer:
    """Counts, times and logs requests, and has them written to the audit log; threads may share it."""

    def __init__(self, metrics: Metrics, audit: AuditLog) -> None:
        self._metrics, self._audit = metrics, audit
        # The failures that were logged, which may come with every call.
        self._said = Repeating()
        # Finding the instrument of some labels costs more than using it.
        self._seconds = cache(metrics.request_seconds.labels)
        self._running = cache(metrics.requests_running.labels)

    @contextmanager
    def of(self, request: Request, code: Callable[[BaseException | None], str]) -> Iterator[None]:
        """Observe a request, which begins and ends with the block.

        code: returns the name of the gRPC status code for the error that the block raised, or for None.
        """
        requests.enter(request)
        running, start = self._running(request.method), time.perf_counter()
        running.inc()
        try:
            yield
        except BaseException as error:
            self._ended(request, code(error), time.perf_counter() - start)
            raise
        else:
            self._ended(request, code(None), time.perf_counter() - start)
        finally:
            running.dec()

    def unknown(self, method: str) -> None:
        """Count a call of a method that does not exist."""
        self._metrics.errors.labels("unknown", "UNIMPLEMENTED").inc()
        self._audit.called(Request(request_id(None), method), "UNIMPLEMENTED", 0)
        _log.debug("there is no method %s", method[: requests.LONGEST_LOGGED])

    def _ended(self, request: Request, code: str, seconds: float) -> None:
        self._seconds(request.method, code).observe(seconds)
        self._audit.called(request, code, seconds)
        if code not in ("OK", "CANCELLED"):
            self._metrics.errors.labels(request.method, request.reason or code).inc()
        if at := _CHECKSUMS.get(request.reason):
            self._metrics.checksum_failures.labels(at).inc()
        # A stop, or a caller that is too slow, is no failure of the service.
        trouble = (code in _TROUBLE and request.reason != "NOT_SERVING") or request.reason == "DISK_FULL"
        level = (
            logging.WARNING
            if trouble and self._said.due(f"{request.method} {code} {request.reason}")
            else logging.DEBUG
        )
        _log.log(level, "%s %s %.6f s", code, request.reason or "-", seconds)
