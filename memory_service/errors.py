"""Failures: every one that this code makes carries a reason of the public list (docs/errors.md)."""

import errno
import logging
import secrets
from typing import TYPE_CHECKING

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from kvbank.v1 import error_pb2

if TYPE_CHECKING:
    from sqlalchemy.exc import DBAPIError

DOMAIN = "kvbank"
_SQLITE_FULL = 13
_log = logging.getLogger(__name__)

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
    """

    def __init__(self, code: grpc.StatusCode, reason: str, message: str, **metadata: object) -> None:
        super().__init__(message)
        error_pb2.ErrorReason.Value(f"ERROR_REASON_{reason}")
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = {key: str(value) for key, value in metadata.items()}

    def status(self) -> status_pb2.Status:
        """As google.rpc.Status with one ErrorInfo."""
        detail = any_pb2.Any()
        detail.Pack(error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata))
        return status_pb2.Status(code=code_pb2.Code.Value(self.code.name), message=self.message, details=[detail])


class StartError(Exception):
    """The service cannot start; the text is one line for the operator."""


def invalid(field: str, message: str) -> ServiceError:
    """INVALID_FIELD, naming the field."""
    return ServiceError(INVALID_ARGUMENT, "INVALID_FIELD", f"{field}: {message}", field=field)


def from_os_error(error: OSError) -> ServiceError:
    """The storage's answer in our terms."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ServiceError(RESOURCE_EXHAUSTED, "DISK_FULL", "the disk is full", free=0)
    name = errno.errorcode.get(error.errno or 0, "unknown")
    return ServiceError(UNAVAILABLE, "STORAGE_ERROR", f"the storage answered with an error ({name})", errno=name)


def from_database_error(error: "DBAPIError") -> ServiceError:
    """SQLite's answer in our terms."""
    code = getattr(error.orig, "sqlite_errorcode", 0)
    if code & 0xFF == _SQLITE_FULL:
        return ServiceError(RESOURCE_EXHAUSTED, "DISK_FULL", "the disk is full", free=0)
    name = getattr(error.orig, "sqlite_errorname", "unknown")
    return ServiceError(UNAVAILABLE, "STORAGE_ERROR", f"the database answered with an error ({name})", errno=name)


def to_service_error(error: Exception) -> ServiceError:
    """Whatever was raised, as the caller may see it; a defect is logged under a request id and says no more."""
    from sqlalchemy.exc import DBAPIError

    if isinstance(error, ServiceError):
        return error
    if isinstance(error, OSError | DBAPIError):
        _log.error("storage error", exc_info=error)
        return from_os_error(error) if isinstance(error, OSError) else from_database_error(error)
    request_id = secrets.token_hex(8)
    _log.error("internal error, request id %s", request_id, exc_info=error)
    return ServiceError(INTERNAL, "INTERNAL", f"internal error, request id {request_id}", request_id=request_id)
