"""Errors of gRPC become errors of this package here: by the ErrorInfo where the service sent one, else by the code."""

import re
from typing import Any

from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from kvbank import _exceptions as errors

DOMAIN = "kvbank"
# gRPC's words for a call that never left this process.
NEVER_SENT = "failed to connect to all addresses"

BY_CODE: dict[str, type[errors.ServiceError]] = {
    "INVALID_ARGUMENT": errors.InvalidArgument,
    "OUT_OF_RANGE": errors.InvalidArgument,
    "NOT_FOUND": errors.NotFound,
    "ALREADY_EXISTS": errors.AlreadyExists,
    "FAILED_PRECONDITION": errors.FailedPrecondition,
    "RESOURCE_EXHAUSTED": errors.ResourceExhausted,
    "DATA_LOSS": errors.DataLoss,
    "UNAVAILABLE": errors.Unavailable,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "UNAUTHENTICATED": errors.Unauthenticated,
    "PERMISSION_DENIED": errors.PermissionDenied,
}

# Reasons with a class of their own; the others take the class of their code.
BY_REASON: dict[str, type[errors.ServiceError]] = {
    "BANK_NOT_FOUND": errors.BankNotFound,
    "CHUNK_NOT_FOUND": errors.ChunkNotFound,
    "API_KEY_NOT_FOUND": errors.ApiKeyNotFound,
    "TENANT_NOT_FOUND": errors.TenantNotFound,
    "SESSION_NOT_FOUND": errors.SessionNotFound,
    "TURN_NOT_FOUND": errors.TurnNotFound,
    "SESSION_EXISTS": errors.SessionExists,
    "LEASE_HELD": errors.LeaseHeld,
    "LEASE_LOST": errors.LeaseLost,
    "TURN_CONFLICT": errors.TurnConflict,
    "READER_MISMATCH": errors.ReaderMismatch,
    "EMBEDDER_MISMATCH": errors.EmbedderMismatch,
    "BANK_FULL": errors.BankFull,
    "QUOTA_EXCEEDED": errors.QuotaExceeded,
    "RATE_EXCEEDED": errors.RateExceeded,
    "TOO_LARGE": errors.TooLarge,
    "DISK_FULL": errors.DiskFull,
}

# gRPC's core: "CLIENT: Sent message larger than max (70000000 vs. 67108864)", also "Received message ...".
_OVER_LONG = re.compile(r"(Sent|Received) message larger than max \((\d+) vs\. (\d+)\)")
_NOT_KNOWN = "the server does not know this call; it may be of an earlier version"
# grpc.aio's own, with the code RESOURCE_EXHAUSTED and nothing else.
_TOO_MANY_CALLS = "Concurrent RPC limit exceeded"


# What gRPC says where TLS fails for good, and what that means.
_UNTRUSTED = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate is of no authority that the client trusts, or has expired "
    "(root_certificates, or KVBANK_TLS_CA, names the authorities)",
    "Hostname Verification Check failed": "its certificate is of another name than the address (server_name, or "
    "KVBANK_TLS_SERVER_NAME, says which name it must have)",
    "WRONG_VERSION_NUMBER": "it speaks no TLS, which the client was told to speak",
    "Failed to create security handshaker": "gRPC cannot use the client's certificate, or it is not that of the key",
}
_CLOSED = ("Socket closed", "Connection reset by peer", "Handshake read failed")


def from_rpc_error(error: Any, request_id: str = "", *, tls: bool = False, where: str = "") -> errors.ServiceError:
    """Return the error of this package for a `grpc.RpcError` of a call that this client did not cancel.

    tls: whether it was made over TLS. where: the address that was called, of several.
    """
    code, message = error.code().name, error.details() or ""
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):  # details that contradict the status, or are none: some proxy's, not ours
        status = None
    if status is not None and (info := _error_info(status)) is not None:
        return _with_reason(code, message, status, info, request_id)
    if code == "CANCELLED":  # by a server that stops: what this client cancels, it does not ask about
        return errors.Unavailable(f"the server ended the call ({message})", request_id=request_id)
    if message.startswith(_TOO_MANY_CALLS):
        return errors.Unavailable(f"the server has too many calls under way ({message})", request_id=request_id)
    over_long = _OVER_LONG.search(message)
    if over_long is not None:
        return _too_large(over_long[1], over_long[2], over_long[3], request_id)
    if code == "UNAVAILABLE":
        return _no_connection(message, request_id, tls, f" at {where}" if where else "")
    said = _NOT_KNOWN if code == "UNIMPLEMENTED" and message.startswith("Method not found") else code
    return BY_CODE.get(code, errors.Internal)(f"{said}: {message}", code=code, request_id=request_id)


def _no_connection(message: str, request_id: str, tls: bool, where: str) -> errors.ServiceError:
    """Return the error for a server that was not reached, with what TLS may have to do with it. where: " at ADDRESS",
    or nothing."""
    if tls:
        for said, meaning in _UNTRUSTED.items():
            if said in message:
                return errors.Untrusted(
                    f"cannot speak TLS with the server{where}: {meaning} ({message})", request_id=request_id
                )
    hint = ""
    if message.startswith(NEVER_SENT) and any(said in message for said in _CLOSED):
        hint = "; does it want a client's certificate?" if tls else "; does it speak TLS (tls=True, or KVBANK_TLS=1)?"
    return errors.Unavailable(f"UNAVAILABLE{where}: {message}{hint}", request_id=request_id)


def from_status(data: bytes, request_id: str) -> errors.ServiceError:
    """Return the error of this package for a serialized google.rpc.Status, which a direct call answers."""
    try:
        status = status_pb2.Status.FromString(data)
        code = code_pb2.Code.Name(status.code)
    except (ValueError, DecodeError):
        return errors.Internal("the server answers with an error that is none", request_id=request_id)
    info = _error_info(status) or error_details_pb2.ErrorInfo()
    return _with_reason(code, status.message, status, info, request_id)


def _with_reason(
    code: str, message: str, status: status_pb2.Status, info: error_details_pb2.ErrorInfo, request_id: str
) -> errors.ServiceError:
    kind = BY_REASON.get(info.reason) or BY_CODE.get(code, errors.Internal)
    error = kind(message, code=code, reason=info.reason, metadata=dict(info.metadata), request_id=request_id)
    error.retry_after = _retry_after(status)
    return error


def _retry_after(status: status_pb2.Status) -> float | None:
    """Return the seconds after which a server says that a call can be made again; None where it says nothing of use."""
    for detail in status.details:
        retry = error_details_pb2.RetryInfo()
        if _unpacked(detail, retry):
            seconds = float(retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9)
            return seconds if seconds >= 0 else None
    return None


def _error_info(status: status_pb2.Status) -> error_details_pb2.ErrorInfo | None:
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if _unpacked(detail, info) and info.domain == DOMAIN:
            return info
    return None


def _unpacked(detail: Any, message: Message) -> bool:
    try:
        return bool(detail.Unpack(message))
    except DecodeError:
        return False


def _too_large(verb: str, size: str, limit: str, request_id: str) -> errors.TooLarge:
    return errors.TooLarge(
        f"a {verb.lower()} message has {size} bytes, over the limit of {limit}",
        reason="TOO_LARGE",
        metadata={"size": size, "limit": limit},
        request_id=request_id,
    )
