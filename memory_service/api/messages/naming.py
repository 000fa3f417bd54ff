"""The banks that a message names. This file owns that every message of the memory service and of sessions is looked
into, whatever its field is called."""

from typing import Any

from kvbank.v1 import service_pb2, session_pb2


def banks(message: Any) -> list[str]:
    """Return the names of the banks in a request, or in the header of a chunk; none for messages of other services."""
    if message.DESCRIPTOR.file is session_pb2.DESCRIPTOR:
        return _of_session(message)
    if message.DESCRIPTOR.file is not service_pb2.DESCRIPTOR:
        return []
    for whole in ("retrieve", "fetch"):
        message = getattr(message, whole, message)
    for field in ("bank", "name", "banks"):
        value = getattr(message, field, None)
        if value is not None:
            value = getattr(value, "name", value)  # CreateBank and UpdateBank have a whole bank
            by = filter(None, [getattr(message, "by", "")])  # ReplaceBank names two
            return [value, *by] if isinstance(value, str) else list(value)
    return []


def _of_session(message: Any) -> list[str]:
    """Return the names of the banks in a request of the session service. Which bank a session has is not said in
    requests that name the session; see `memory_service.operations.sessions`."""
    if isinstance(message, session_pb2.CreateSessionRequest):
        return [*filter(None, [message.session.bank]), *message.session.reads]
    if isinstance(message, session_pb2.UpdateSessionRequest):
        return list(message.reads.names)
    if isinstance(message, session_pb2.ForgetRequest) and message.WhichOneof("target") == "chunks":
        return [message.chunks.bank]
    return []
