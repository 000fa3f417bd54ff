"""The banks that a message names. This file owns that every message of the memory service is looked into, whatever its
field is called."""

from typing import Any

from kvbank.v1 import service_pb2


def banks(message: Any) -> list[str]:
    """Return the names of the banks in a request, or in the header of a chunk; none for messages of other services."""
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
