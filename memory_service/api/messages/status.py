"""How a call ends on the wire: the code of each reason, the status of an error, and the bytes of an answer within their
bound. Defects are logged here, under the request id that the caller is told.
"""

import logging
import secrets
from collections.abc import Mapping

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from memory_service.domain.errors import AwayError, LeaseError, QuotaError, RateError, Reason, ServiceError, refusal_for
from memory_service.observe import request as requests
from memory_service.observe.seldom import Repeating

DOMAIN = "kvbank"
_CODES: Mapping[grpc.StatusCode, tuple[Reason, ...]] = {
    grpc.StatusCode.INVALID_ARGUMENT: ("INVALID_FIELD", "NOT_FINITE", "TENSOR_MISMATCH", "CHECKSUM_IN_TRANSIT"),
    grpc.StatusCode.NOT_FOUND: (
        "BANK_NOT_FOUND",
        "CHUNK_NOT_FOUND",
        "TENANT_NOT_FOUND",
        "API_KEY_NOT_FOUND",
        "SESSION_NOT_FOUND",
        "TURN_NOT_FOUND",
    ),
    grpc.StatusCode.UNAUTHENTICATED: ("UNAUTHENTICATED",),
    grpc.StatusCode.PERMISSION_DENIED: ("PERMISSION_DENIED",),
    grpc.StatusCode.ALREADY_EXISTS: ("BANK_EXISTS", "KEY_REUSED", "TENANT_EXISTS", "SESSION_EXISTS"),
    grpc.StatusCode.FAILED_PRECONDITION: (
        "READER_MISMATCH",
        "EMBEDDER_MISMATCH",
        "BANKS_DIFFER",
        "STAGED_FILE",
        "NOT_SAME_HOST",
        "TENANT_NOT_EMPTY",
        "BANK_CHANGED",
        "LEASE_HELD",
        "LEASE_LOST",
        "TURN_CONFLICT",
        "TURN_FORGOTTEN",
    ),
    grpc.StatusCode.RESOURCE_EXHAUSTED: ("BANK_FULL", "TOO_LARGE", "DISK_FULL", "QUOTA_EXCEEDED", "RATE_EXCEEDED"),
    grpc.StatusCode.DATA_LOSS: ("CHECKSUM_MISMATCH",),
    grpc.StatusCode.UNAVAILABLE: ("NOT_SERVING", "STORAGE_ERROR"),
    grpc.StatusCode.INTERNAL: ("INTERNAL",),
}
CODE_OF: Mapping[Reason, grpc.StatusCode] = {reason: code for code, reasons in _CODES.items() for reason in reasons}
_log = logging.getLogger(__name__)
_failures = Repeating()


def status(error: ServiceError) -> status_pb2.Status:
    """Make the status of an error: one ErrorInfo, and behind it a QuotaFailure where a quota is the reason, and a
    RetryInfo where it is known when the call can be made again."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    details: list[Message] = [info]
    if isinstance(error, QuotaError | RateError):
        violation = error_details_pb2.QuotaFailure.Violation(subject=error.subject, description=error.description)
        details.append(error_details_pb2.QuotaFailure(violations=[violation]))
    if isinstance(error, RateError | LeaseError | AwayError):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(error.seconds * 1e9))
        details.append(retry)
    packed = [any_pb2.Any() for _ in details]
    for place, detail in zip(packed, details, strict=True):
        place.Pack(detail)
    code = code_pb2.Code.Value(CODE_OF[error.reason].name)
    return status_pb2.Status(code=code, message=error.message, details=packed)


def to_service_error(error: Exception) -> ServiceError:
    """Return what the caller is told of an error; of a defect it is only the request id under which it is logged."""
    if (refusal := refusal_for(error)) is not None:
        if refusal is not error and refusal.reason != "NOT_SERVING":
            _failures.error(_log, error, "storage error")
        return refusal
    request = requests.current()
    request_id = request.id if request else secrets.token_hex(8)
    _log.error("internal error, request id %s", request_id, exc_info=error)
    return ServiceError("INTERNAL", f"internal error, request id {request_id}", request_id=request_id)


def without_frames(error: BaseException) -> None:
    """Take the tracebacks from an error and from the errors that led to it.

    Their frames hold what the call held, its message too, for as long as anything holds the error; and where a frame
    holds the error itself, that is for good, because objects this large are too few to make Python look for cycles.
    """
    led: list[BaseException | None] = [error]
    seen: set[int] = set()
    while led:
        if (some := led.pop()) is not None and id(some) not in seen:
            seen.add(id(some))
            some.__traceback__ = None
            led += (some.__cause__, some.__context__)


def serialized(message: Message, limit: int) -> bytes:
    """Return an answer as it travels. Errors: TOO_LARGE where it has more than `limit` bytes, which gRPC would refuse
    without a reason."""
    answer = message.SerializeToString()
    check_size(len(answer), limit)
    return answer


def check_size(size: int, limit: int) -> None:
    """Refuse an answer of more than `limit` bytes. Errors: TOO_LARGE."""
    if size > limit:
        text = f"the answer, or its header, would have {size} bytes; ask for less at once"
        raise ServiceError("TOO_LARGE", text, limit=limit, size=size)
