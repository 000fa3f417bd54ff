"""This file owns the words that models use for the enums of the protocol, such as "bf16" for DATA_TYPE_BF16.

The words that a caller may give stand in the `Literal`s of `kvbank._models` and `kvbank._session_models`, and nowhere
else.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, get_args

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from kvbank import _models as m
from kvbank import _session_models as sessions
from kvbank.v1 import bank_pb2, chunk_pb2, session_pb2
from kvbank.wire import enums

# Each enum of the protocol that a caller states, and the Literal with its words.
LITERALS: Mapping[EnumTypeWrapper, Any] = {
    bank_pb2.DataType: m.DataType,
    bank_pb2.Metric: m.Metric,
    bank_pb2.PolicyKind: m.PolicyKind,
    bank_pb2.IndexKind: m.IndexKind,
    chunk_pb2.PayloadKind: m.PayloadKind,
    session_pb2.TurnStatus: sessions.TurnStatus,
}
# An index of "auto" is one that is not stated.
_NUMBERS: dict[EnumTypeWrapper, dict[str, Any]] = {
    enum: enums.numbers(enum, get_args(words), unspecified="auto") for enum, words in LITERALS.items()
}
_WORDS = {enum: {number: word for word, number in known.items()} for enum, known in _NUMBERS.items()}


def numbers(enum: EnumTypeWrapper) -> Mapping[str, Any]:
    """Return the words of an enum, in the order of their `Literal`, with the numbers that stand for them in messages.

    The type of the numbers is Any, because protobuf's stubs have a type of their own for those of each enum.
    """
    return _NUMBERS[enum]


@lru_cache(256)
def word(enum: EnumTypeWrapper, number: int) -> str:
    """Return the word for a number of an enum: "least_retrieved" for EVICTION_REASON_LEAST_RETRIEVED.

    A number that only a newer server knows is returned as its digits.
    """
    if (known := _WORDS.get(enum, {}).get(number)) is not None:
        return known
    values = enum.DESCRIPTOR.values_by_number
    name: str = values[number].name if number in values else str(number)
    return name.removeprefix(values[0].name.removesuffix("UNSPECIFIED")).lower()
