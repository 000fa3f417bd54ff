"""What the contract and the domain call the same things."""

from typing import Any, get_args

import pytest

from kvbank.v1 import bank_pb2, chunk_pb2, service_pb2
from memory_service.api.messages.convert import NUMBERS
from memory_service.domain.model import DType, EvictionReason, IndexKind, PayloadKind, PolicyKind

ENUMS = {
    DType: bank_pb2.DataType,
    PolicyKind: bank_pb2.PolicyKind,
    IndexKind: bank_pb2.IndexKind,
    PayloadKind: chunk_pb2.PayloadKind,
    EvictionReason: service_pb2.EvictionReason,
}


@pytest.mark.parametrize("words", ENUMS, ids=str)
def test_each_word_of_the_domain_has_its_value_in_the_contract_and_each_value_its_word(words: Any) -> None:
    numbers = NUMBERS[words]
    assert tuple(numbers) == get_args(words)
    assert len(set(numbers.values())) == len(numbers)
    # 0 is what is not said; of the kinds of an index that has a word.
    assert {0, *numbers.values()} == set(ENUMS[words].values())


def test_every_enum_with_words_is_tried() -> None:
    assert ENUMS.keys() == NUMBERS.keys()
