"""A retrieval that begins before its service knows whether another one has changed the bank."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvbank.v1 import service_pb2 as pb
from memory_service.api.embedded import LocalServer
from memory_service.domain.limits import Limits
from memory_service.storage.base import Seen
from tests.support.caller import Caller
from tests.support.engines import ENGINES, opened
from tests.support.stalling import StallingProxy
from tests.support.store import new_bank

KIND = ENGINES["postgres"]
pytestmark = pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())
# Nothing recurs while a test runs.
IDLE = Limits(expiry_s=3600)


class Reader:
    """A service behind a proxy, of which it is known how often it asks the database."""

    def __init__(self, caller: Caller, proxy: StallingProxy) -> None:
        self.caller, self._proxy = caller, proxy

    def found(self, **fields: Any) -> dict[int, str]:
        """Return the texts of the chunks of bank "v" that a retrieval finds, by id."""
        header, _ = self.caller.retrieve(banks=["v"], reader_digest="", **fields)
        return {chunk.chunk_id: chunk.text for chunk in header.chunks}

    def asked(self) -> int:
        """Return how often the database is asked for a retrieval, and for what the service does meanwhile."""
        before = self._proxy.questions
        self.found()
        return self._proxy.questions - before

    def warmed(self) -> dict[int, str]:
        """Return what is found, when one question has become enough."""
        for _ in range(9):
            before = self._proxy.questions
            found = self.found()
            if self._proxy.questions == before + 1:
                return found
        raise AssertionError("each retrieval asks the database more than once")


@pytest.fixture
def services(tmp_path: Path) -> Iterator[tuple[Reader, Caller]]:
    """Open two services on one database: one that reads, and one that changes it."""
    with KIND.place(tmp_path) as place:
        proxy, own = StallingProxy.before(place["data"]), {**place, "durability": "os", "limits": IDLE}
        with (
            LocalServer(**{**own, "data": proxy.url}) as here,
            LocalServer(**{**own, "cache": f"{place['cache']}-2"}) as there,
        ):
            reader, writer = Caller(here.address), Caller(there.address, first_key=1000)
            yield Reader(reader, proxy), writer
            reader.channel.close()
            writer.channel.close()
        proxy.close()


def test_what_another_service_has_changed_is_found_by_the_next_retrieval(services: tuple[Reader, Caller]) -> None:
    reader, writer = services
    writer.create("v", layers=[])
    first, second = (writer.add(bank="v", layers=[], text=text) for text in ("one", "two"))
    assert reader.warmed() == {first: "one", second: "two"}
    third = writer.add(bank="v", layers=[], text="x" * 20_000)
    assert reader.found() == reader.found() == {first: "one", second: "two", third: "x" * 20_000}
    writer.stub.DeleteChunks(pb.DeleteChunksRequest(bank="v", chunk_ids=[first, third]))
    assert reader.found() == reader.warmed() == {second: "two"}
    only = {"filter": pb.Filter(metadata=[pb.MetadataCondition(key="speaker", values=["b"])])}
    assert reader.found(**only) == {}
    writer.stub.UpdateChunk(pb.UpdateChunkRequest(bank="v", chunk_id=second, metadata={"speaker": "b"}))
    assert reader.found(**only) == reader.found(**only) == {second: "two"}


def test_the_changes_of_another_service_are_read_with_two_questions(services: tuple[Reader, Caller]) -> None:
    reader, writer = services
    writer.create("v", layers=[])
    writer.add(bank="v", layers=[])
    reader.warmed()
    asked = []
    for _ in range(9):
        writer.add(bank="v", layers=[])
        asked.append(reader.asked())
    # Whether the bank is as it was known, how it is now, the two, and the rows of what is found then.
    assert min(asked) <= 6, asked


def test_a_bank_that_has_another_name_or_is_another_one_is_that_at_once(services: tuple[Reader, Caller]) -> None:
    reader, writer = services
    old, new = writer.create("v", layers=[]), writer.create("w", layers=[])
    first, second = writer.add(bank="v", layers=[]), writer.add(bank="w", layers=[])
    assert list(reader.warmed()) == [first]
    replaced = {"name": "v", "uid": old.uid, "chunks": 1, "chunks_written": 1, "by": "w", "by_uid": new.uid}
    writer.stub.ReplaceBank(pb.ReplaceBankRequest(**replaced))
    assert list(reader.found()) == list(reader.warmed()) == [second]
    writer.stub.DeleteBank(pb.DeleteBankRequest(name="v"))
    with pytest.raises(grpc.RpcError, match="there is no bank"):
        reader.found()
    writer.create("v", layers=[])
    assert reader.found() == reader.found() == {}


def test_a_bank_is_still_known_when_its_service_learns_that_the_one_before_it_is_gone(tmp_path: Path) -> None:
    with KIND.place(tmp_path) as place, opened(place, limits=IDLE) as here:
        with opened({**place, "cache": f"{place['cache']}-2"}, limits=IDLE) as there:
            old, new = (there.store.create_bank(new_bank(name))[0] for name in "vw")
            here.store.current(old.tenant, ["v"])
            there.store.replace_bank(old.tenant, Seen("v", old.uid, 0, 0), "w", new.uid, {})
        here.store.current(old.tenant, ["v"])
        here.store.feed.look_after()  # type: ignore[attr-defined]
        assert here.store.foreseen(old.tenant, "v", lambda bank, _: bank.uid) == new.uid
