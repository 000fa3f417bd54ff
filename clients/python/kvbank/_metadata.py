"""Metadata and conditions on them, out of what a caller gives."""

from collections.abc import Mapping
from types import EllipsisType
from typing import Any

from kvbank import _arguments, _scalars
from kvbank import _models as m
from kvbank._arguments import scalar, text
from kvbank._exceptions import FailedPrecondition
from kvbank._scalars import Scalar
from kvbank.v1 import service_pb2


def fields(metadata: Mapping[str, Scalar]) -> dict[str, dict[str, Any]]:
    """Both fields of a message. InvalidArgument for a key or a value of another type."""
    return _scalars.fields(_arguments.metadata(metadata))


def check_kept(message: Any, typed: bool) -> None:
    """FailedPrecondition where a message has metadata that the server would drop. typed: what it says that it keeps."""
    if message.typed_metadata and not typed:
        text = "this server is of an earlier version, and keeps metadata that are strings alone"
        raise FailedPrecondition(text, reason="TYPED_METADATA")


def condition(key: str, wanted: Any, negate: bool) -> service_pb2.MetadataCondition:
    """What a `Filter` says of one key, in the form that earlier versions know where that can say it."""
    key = text("metadata", key)
    if isinstance(wanted, EllipsisType):
        return service_pb2.MetadataCondition(key=key, negate=negate)
    typed = service_pb2.TypedCondition(key=key)
    if isinstance(wanted, m.Range):
        for name in m.Range.__slots__:
            if (bound := getattr(wanted, name)) is not None:
                getattr(typed, name).CopyFrom(_scalars.message(bound))
    else:
        values = [scalar("metadata", value) for value in m.alternatives(wanted)]
        strings = [value for value in values if isinstance(value, str)]
        if len(strings) == len(values):
            return service_pb2.MetadataCondition(key=key, values=strings, negate=negate)
        typed.values.extend(map(_scalars.message, values))
    return service_pb2.MetadataCondition(typed=typed, negate=negate)
