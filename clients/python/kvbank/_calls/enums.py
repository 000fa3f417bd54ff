"""This file owns the words that models use for the enums of the protocol, such as "bf16" for DATA_TYPE_BF16.

A word is the name of its enum value without the prefix, in lower case. The words that a caller may give stand in the
`Literal`s of `kvbank._models`, and nowhere else.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, get_args

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from kvbank import _models as m
from kvbank.v1 import bank_pb2, chunk_pb2

# Words without a value of their own: an index of "auto" is one that nobody has stated.
_UNSPECIFIED = ("auto",)

# Each enum of the protocol that a caller states, and the Literal with its words.
WORDS: Mapping[EnumTypeWrapper, Any] = {
    bank_pb2.DataType: m.DataType,
    bank_pb2.Metric: m.Metric,
    bank_pb2.PolicyKind: m.PolicyKind,
    bank_pb2.IndexKind: m.IndexKind,
    chunk_pb2.PayloadKind: m.PayloadKind,
}


def _prefix(enum: EnumTypeWrapper) -> str:
    """Return what the names of all values of an enum begin with, such as "DATA_TYPE_"."""
    first: str = enum.DESCRIPTOR.values_by_number[0].name
    return first.removesuffix("UNSPECIFIED")


def _number(enum: EnumTypeWrapper, word: str) -> int:
    number: int = enum.Value(_prefix(enum) + ("UNSPECIFIED" if word in _UNSPECIFIED else word.upper()))
    return number


_NUMBERS: dict[EnumTypeWrapper, dict[str, int]] = {
    enum: {word: _number(enum, word) for word in get_args(words)} for enum, words in WORDS.items()
}


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
    for known, its_number in _NUMBERS.get(enum, {}).items():
        if its_number == number:
            return known
    values = enum.DESCRIPTOR.values_by_number
    name: str = values[number].name if number in values else str(number)
    return name.removeprefix(_prefix(enum)).lower()
