"""Failures: every one that this code makes carries a reason of the public list (docs/errors.md)."""

import errno
import logging
import secrets
from typing import TYPE_CHECKING

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from kvbank.v1 import error_pb2
from memory_service.observe.seldom import Repeating

if TYPE_CHECKING:
    import sqlite3

    from sqlalchemy.exc import DBAPIError

DOMAIN = "kvbank"
_SQLITE_INTERRUPT, _SQLITE_FULL = 9, 13
# Bytes. A message goes twice, once with up to three for each.
_LONGEST_MESSAGE, _LONGEST_VALUE = 1024, 512
_log = logging.getLogger(__name__)
_failures = Repeating()

INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
ALREADY_EXISTS = grpc.StatusCode.ALREADY_EXISTS
FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
DATA_LOSS = grpc.StatusCode.DATA_LOSS
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
INTERNAL = grpc.StatusCode.INTERNAL


class ServiceError(Exception):
    """A refusal or failure that the caller sees.

    `reason` is a value of kvbank.v1.ErrorReason without its prefix; what varies in `message` also stands in `metadata`.
    Both are cut, because they may have a caller's words in them, and gRPC drops a status of more than some 8 kB.
    """

    def __init__(self, code: grpc.StatusCode, reason: str, message: str, **metadata: object) -> None:
        error_pb2.ErrorReason.Value(f"ERROR_REASON_{reason}")
        self.code = code
        self.reason = reason
        self.message = _cut(message, _LONGEST_MESSAGE)
        self.metadata = {key: _cut(str(value), _LONGEST_VALUE) for key, value in metadata.items()}
        super().__init__(self.message)

    def status(self) -> status_pb2.Status:
        """As google.rpc.Status with one ErrorInfo."""
        detail = any_pb2.Any()
        detail.Pack(error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata))
        return status_pb2.Status(code=code_pb2.Code.Value(self.code.name), message=self.message, details=[detail])


class QuotaError(ServiceError):
    """QUOTA_EXCEEDED: a write would pass a hard bound of its bank; says so as google.rpc.QuotaFailure too."""

    def __init__(self, bank: str, unit: str, usage: int, limit: int, size: int) -> None:
        text = f"the quota of bank {bank} is {limit} {unit}: {usage} used, {size} asked for"
        figures = {"unit": unit, "usage": usage, "limit": limit, "size": size}
        super().__init__(RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED", text, **figures)
        self._violation = error_details_pb2.QuotaFailure.Violation(subject=f"bank:{bank}", description=text)

    def status(self) -> status_pb2.Status:
        """With the QuotaFailure behind the ErrorInfo."""
        status = super().status()
        status.details.add().Pack(error_details_pb2.QuotaFailure(violations=[self._violation]))
        return status


def _cut(text: str, most: int) -> str:
    """Cut a text to so many bytes of UTF-8, and tell whether it had more."""
    data = text.encode(errors="replace")
    return text if len(data) <= most else data[:most].decode(errors="ignore") + "..."


class StartError(Exception):
    """The service cannot start; the text is one line for the operator."""


def without_frames(error: BaseException) -> None:
    """Take the tracebacks from an error and from what led to it. Their frames hold what the call held, its message too,
    for as long as anybody holds the error; and where a frame holds the error itself, that is for good, because objects
    this large are too few to make Python look for cycles."""
    led: list[BaseException | None] = [error]
    seen: set[int] = set()
    while led:
        if (some := led.pop()) is not None and id(some) not in seen:
            seen.add(id(some))
            some.__traceback__ = None
            led += (some.__cause__, some.__context__)


def invalid(field: str, message: str) -> ServiceError:
    """Make the error INVALID_FIELD, which names the field."""
    return ServiceError(INVALID_ARGUMENT, "INVALID_FIELD", f"{field}: {message}", field=field)


def serialized(message: Message, limit: int) -> bytes:
    """An answer as it travels. Errors: TOO_LARGE for one that would not be taken, without a reason."""
    answer = message.SerializeToString()
    check_size(len(answer), limit)
    return answer


def check_size(size: int, limit: int) -> None:
    """Refuse an answer of too many bytes. Errors: TOO_LARGE."""
    if size > limit:
        text = f"the answer, or its header, would have {size} bytes; ask for less at once"
        raise ServiceError(RESOURCE_EXHAUSTED, "TOO_LARGE", text, limit=limit, size=size)


def from_os_error(error: OSError) -> ServiceError:
    """The storage's answer in our terms."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ServiceError(RESOURCE_EXHAUSTED, "DISK_FULL", "the disk is full", free=0)
    name = errno.errorcode.get(error.errno or 0, "unknown")
    return ServiceError(UNAVAILABLE, "STORAGE_ERROR", f"the storage answered with an error ({name})", errno=name)


def from_database_error(error: "DBAPIError | sqlite3.Error") -> ServiceError:
    """SQLite's answer in our terms; hot statements meet it without SQLAlchemy in between."""
    answer = getattr(error, "orig", error)
    code = getattr(answer, "sqlite_errorcode", 0)
    if code & 0xFF == _SQLITE_FULL:
        return ServiceError(RESOURCE_EXHAUSTED, "DISK_FULL", "the disk is full", free=0)
    name = getattr(answer, "sqlite_errorname", "unknown")
    return ServiceError(UNAVAILABLE, "STORAGE_ERROR", f"the database answered with an error ({name})", errno=name)


def to_service_error(error: Exception) -> ServiceError:
    """Whatever was raised, as the caller may see it; a defect is logged under a request id and says no more."""
    import sqlite3

    from sqlalchemy.exc import DBAPIError

    from memory_service.domain.cancellation import Cancelled

    # Here, because it refuses with errors of this file.
    from memory_service.observe import request as requests

    if isinstance(error, ServiceError):
        return error
    if (
        isinstance(error, Cancelled)
        or getattr(getattr(error, "orig", error), "sqlite_errorcode", 0) == _SQLITE_INTERRUPT
    ):
        return ServiceError(UNAVAILABLE, "NOT_SERVING", "the call was broken off")
    if isinstance(error, OSError | DBAPIError | sqlite3.Error):
        _failures.error(_log, error, "storage error")
        return from_os_error(error) if isinstance(error, OSError) else from_database_error(error)
    request = requests.current()
    request_id = request.id if request else secrets.token_hex(8)
    _log.error("internal error, request id %s", request_id, exc_info=error)
    return ServiceError(INTERNAL, "INTERNAL", f"internal error, request id {request_id}", request_id=request_id)
