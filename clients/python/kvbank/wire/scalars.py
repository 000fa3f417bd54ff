"""This file owns the form of metadata in messages: strings are in the map `metadata`, values of other types in the map
`typed_metadata`, which earlier versions do not know. The service uses this file too."""

from collections.abc import Mapping
from typing import Any

from kvbank.v1 import bank_pb2

# A number is an int of 64 bits or a finite float; a bool is none.
Scalar = str | int | float | bool
_FIELDS: Mapping[type, str] = {str: "text", bool: "flag", int: "integer", float: "real"}


def fields(metadata: Mapping[str, Scalar]) -> dict[str, dict[str, Any]]:
    """Return both fields that metadata has in a message, by name."""
    strings = {key: value for key, value in metadata.items() if isinstance(value, str)}
    others = {key: message(value) for key, value in metadata.items() if not isinstance(value, str)}
    return {"metadata": strings, "typed_metadata": others}


def read(message: Any) -> dict[str, Scalar]:
    """Return the metadata of a message with both fields. Errors: ValueError for a scalar without a value."""
    found: dict[str, Scalar] = dict(message.metadata)
    if typed := message.typed_metadata:
        found.update({key: value(scalar) for key, scalar in typed.items()})
    return found


def message(value: Scalar) -> bank_pb2.Scalar:
    """Return the message of a value of metadata."""
    made = bank_pb2.Scalar()
    setattr(made, _FIELDS[type(value)], value)
    return made


def value(message: bank_pb2.Scalar) -> Scalar:
    """Return the value of a message. Errors: ValueError where it has none."""
    kind = message.WhichOneof("value")
    if kind is None:
        raise ValueError("a scalar of metadata has no value")
    found: Scalar = getattr(message, kind)
    return found
