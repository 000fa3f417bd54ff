"""Enums of the protocol are looked up by words here: POLICY_KIND_RECENCY_HALF is "recency_half".

Client and service make their tables of words and numbers by this file, so that no table is written by hand.
"""

import re
from collections.abc import Iterable
from typing import Any

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper


def numbers(enum: EnumTypeWrapper, words: Iterable[str], unspecified: str = "") -> dict[str, Any]:
    """Return the number of each word in an enum. unspecified: the word of ..._UNSPECIFIED, where that has one. Errors:
    ValueError for a word that the enum does not have."""
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enum.DESCRIPTOR.name).upper()
    return {word: enum.Value(f"{prefix}_{'UNSPECIFIED' if word == unspecified else word.upper()}") for word in words}
