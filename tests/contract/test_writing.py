"""The way of one chunk into a bank (`operations.writing`), over every engine: its order, and what a repeated write is
told."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from memory_service.domain.limits import Pauses
from memory_service.domain.model import Bank
from memory_service.storage.base import Engine, Vectors, Written
from tests.support.store import held, new_chunk, reason
from tests.support.waiting import wait_until
from tests.support.writing import PAYLOAD, admitted, begun, made_bank, writer


class Watcher:
    """A follower that notes, when it is told of a chunk, what else can be seen of it."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.seen: list[tuple[list[int], bool]] = []
        self.answered = False

    def added(self, bank: Bank, ids: Sequence[int], vectors: Vectors) -> None:
        assert self.engine is not None
        with self.engine.store.read() as view:
            found = list(view.chunks(bank, ids))
        for chunk in found:
            assert chunk.payload is not None
            self.engine.objects.open(bank.uid, chunk.chunk_id, chunk.payload).close()
        self.seen.append(([chunk.chunk_id for chunk in found], self.answered))

    def removed(self, bank: Bank, ids: Sequence[int]) -> None:
        """Do nothing, because only additions are watched."""

    def changed(self, bank: Bank) -> None:
        """Do nothing, because only additions are watched."""

    def dropped(self, bank: Bank) -> None:
        """Do nothing, because only additions are watched."""


def test_the_object_is_there_before_the_row_the_row_before_the_index_and_the_index_before_the_answer(
    open_engine: Any,
) -> None:
    watcher, passed = Watcher(), list[list[int]]()
    with open_engine(follower=watcher) as engine:
        watcher.engine, bank = engine, made_bank(engine)
        # No row is there yet when the object is about to be stored.
        writes = writer(engine, Pauses(at={"object stored": lambda: passed.append(held(engine.store, bank))}))
        write = admitted(writes, bank, replace(new_chunk(1), payload=PAYLOAD))
        done = begun(writes, write)
        done.add_done_callback(lambda _: setattr(watcher, "answered", True))
        chunk_id = done.result(60).chunk_id
        assert passed == [[]]
        assert watcher.seen == [([chunk_id], False)]
        assert chunk_id == write.chunk_id


@pytest.mark.parametrize("text", ["chunk 1", "other"])
def test_a_write_into_a_bank_that_is_deleted_meanwhile_is_told_that_also_a_repeated_one(
    open_engine: Any, text: str
) -> None:
    # The key of the first write may be known for some time after the objects of the bank have gone.
    with open_engine(pauses=Pauses(left_out={"clearing"})) as engine:
        bank, writes = made_bank(engine), writer(engine, Pauses())
        chunk = replace(new_chunk(1), payload=PAYLOAD)
        first = begun(writes, admitted(writes, bank, chunk)).result(60)
        assert begun(writes, admitted(writes, bank, chunk)).result(60) == Written(chunk.key, first.chunk_id, True)
        again = admitted(writes, bank, replace(chunk, text=text))
        other = admitted(writes, bank, replace(new_chunk(2), payload=PAYLOAD))
        engine.store.delete_bank("default", "b")
        if engine.objects.path(bank.uid, 1) is not None:  # a bank has a place of its own
            wait_until(lambda: not engine.objects.there(bank.uid))
        assert reason(lambda: begun(writes, other).result(60)) == "BANK_NOT_FOUND"
        assert reason(lambda: begun(writes, again).result(60)) == "BANK_NOT_FOUND"
