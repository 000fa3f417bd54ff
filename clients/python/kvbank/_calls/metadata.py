"""Messages of metadata, and of conditions on metadata, are built here out of what a caller gives."""

from collections.abc import Mapping
from types import EllipsisType
from typing import Any

from kvbank import _arguments
from kvbank import _models as m
from kvbank._arguments import scalar, text
from kvbank._exceptions import FailedPrecondition
from kvbank.v1 import service_pb2
from kvbank.wire import scalars
from kvbank.wire.scalars import Scalar


def fields(metadata: Mapping[str, Scalar]) -> dict[str, dict[str, Any]]:
    """Return both fields of a message that has metadata. Errors: InvalidArgument for a key or a value of another
    type."""
    return scalars.fields(_arguments.checked_metadata(metadata))


def check_kept(message: Any, typed: bool) -> None:
    """Check that the server keeps all metadata of a message.

    typed: whether the server says that it keeps other metadata than strings.
    Errors: FailedPrecondition (TYPED_METADATA).
    """
    if message.typed_metadata and not typed:
        what = "this server is of an earlier version, and keeps metadata that are strings alone"
        raise FailedPrecondition(what, reason="TYPED_METADATA")


def condition(key: str, wanted: Any, negate: bool) -> service_pb2.MetadataCondition:
    """Build what a `Filter` says of one key; where all values are strings, in the form that earlier versions know."""
    key = text("metadata", key)
    if isinstance(wanted, EllipsisType):
        return service_pb2.MetadataCondition(key=key, negate=negate)
    typed = service_pb2.TypedCondition(key=key)
    if isinstance(wanted, m.Range):
        for name in m.Range.__slots__:
            if (bound := getattr(wanted, name)) is not None:
                getattr(typed, name).CopyFrom(scalars.message(bound))
    else:
        values = [scalar("metadata", value) for value in m.alternatives(wanted)]
        strings = [value for value in values if isinstance(value, str)]
        if len(strings) == len(values):
            return service_pb2.MetadataCondition(key=key, values=strings, negate=negate)
        typed.values.extend(map(scalars.message, values))
    return service_pb2.MetadataCondition(typed=typed, negate=negate)
