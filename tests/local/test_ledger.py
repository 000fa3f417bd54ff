"""The ledger of a bank holds what a plain dictionary holds, also while the places of chunks that are gone are given up,
some with each removal."""

import random

import numpy as np
import pytest

from memory_service.storage.local.evicting.ledger import Ledger


def same(ledger: Ledger, plain: dict[int, tuple[int, int, bool]]) -> bool:
    """Tell whether a copy of the ledger has the chunks of a dictionary: (size, retrievals, pinned) by id."""
    live = [(chunk_id, *plain[chunk_id][:2]) for chunk_id in sorted(plain) if not plain[chunk_id][2]]
    found = ledger.copied(ledger.room()).candidates()
    held = len(ledger) == len(plain) and all(map(ledger.has, plain))
    return held and list(zip(*(line.tolist() for line in found[:3]), strict=True)) == live


@pytest.mark.parametrize("moved", [1, 7, 10_000])
def test_a_ledger_holds_what_a_dictionary_holds(moved: int) -> None:
    for seed in range(30):
        chance = random.Random(seed)
        plain = {number: (chance.randrange(9), 0, False) for number in range(100, 100 + 2 * chance.randrange(60), 2)}
        ledger = Ledger([(number, size, 0, 0, False) for number, (size, *_) in plain.items()], moved=moved)
        spent, newest = set(plain), 100 + 2 * len(plain)
        for _ in range(60):
            some = chance.sample(sorted(plain), min(len(plain), chance.randrange(6)))
            some = sorted(plain)[: len(some)] if chance.random() < 0.5 else some
            match chance.randrange(4):
                case 0 | 1:
                    ledger.remove([*some, -1])
                    for number in some:
                        del plain[number]
                case 2 if (new := newest + chance.choice([2, 2, 2, -1, -5, -21])) not in spent:
                    # Writers overtake each other, so that an id may be lower than those before it.
                    ledger.add(new, 3, 0, False)
                    plain[new], newest = (3, 0, False), max(new, newest)
                    spent.add(new)
                case _:
                    ledger.count(np.array(some, np.int64), np.ones(len(some), np.int64), np.ones(len(some), np.int64))
                    ledger.pin(some[:1], True)
                    for number in some:
                        size, retrievals, pinned = plain[number]
                        plain[number] = (size, retrievals + 1, pinned or number == some[0])
            assert same(ledger, plain), seed
        ledger.compact()
        assert same(ledger, plain)
