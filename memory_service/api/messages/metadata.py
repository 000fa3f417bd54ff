"""Metadata of requests, and conditions on metadata, are read here. This file owns the refusal of metadata that a
message can say and the domain cannot."""

import math
from dataclasses import fields
from typing import Any

from kvbank.v1 import bank_pb2, service_pb2
from kvbank.wire import scalars
from kvbank.wire.scalars import Scalar
from memory_service.domain.errors import invalid
from memory_service.domain.model import Condition, Metadata, Range

_BOUNDS = tuple(field.name for field in fields(Range))


def read(field: str, message: Any) -> Metadata:
    """Read the metadata of a message, which has them in two maps. field: what they are called in errors. Errors:
    INVALID_FIELD."""
    if not (scalars_ := message.typed_metadata):
        return dict(message.metadata)
    typed = {key: _value(field, scalar) for key, scalar in scalars_.items()}
    if wrong := next((key for key, value in typed.items() if isinstance(value, str) or key in message.metadata), None):
        raise invalid(field, f"has {wrong!r} with a string in typed_metadata, or in both maps")
    return {**message.metadata, **typed}


def condition(message: service_pb2.MetadataCondition) -> Condition:
    """Read a condition of a filter. Errors: INVALID_FIELD."""
    if not message.HasField("typed"):
        made = Condition(message.key, tuple(message.values), message.negate)
    else:
        if message.key or message.values:
            raise invalid("filter.metadata.typed", "stands in the place of key and values")
        typed = message.typed
        values = tuple(_value("filter.metadata.values", value) for value in typed.values)
        made = Condition(typed.key, values, message.negate, _range(typed))
    if not made.key:
        raise invalid("filter.metadata.key", "must not be empty")
    return made


def _range(message: service_pb2.TypedCondition) -> Range | None:
    bounds: dict[str, float] = {}
    for name in _BOUNDS:
        if message.HasField(name):
            bound = _value(f"filter.metadata.{name}", getattr(message, name))
            if isinstance(bound, str | bool):
                raise invalid(f"filter.metadata.{name}", "must be a number")
            bounds[name] = bound
    return Range(**bounds) if bounds else None


def _value(field: str, message: bank_pb2.Scalar) -> Scalar:
    try:
        value = scalars.value(message)
    except ValueError as error:
        raise invalid(field, str(error)) from None
    if isinstance(value, float) and not math.isfinite(value):
        raise invalid(field, "has a number that is not finite")
    return value
