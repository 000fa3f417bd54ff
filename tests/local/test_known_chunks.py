"""A chunk that was answered before is answered as it is now, and not as it was."""

import sqlite3
from contextlib import closing

import grpc
from google.protobuf.duration_pb2 import Duration

from kvbank.v1 import bank_pb2
from kvbank.v1 import service_pb2 as pb
from memory_service.domain.limits import Pauses
from memory_service.domain.model import Bank, Chunk, EmbeddingSpec, KvSpec, Policy
from memory_service.storage.chunks.known_chunks import KnownChunks, State
from tests.support.waiting import wait_until

BANK = Bank("b", KvSpec("", (), 0, 0, None), EmbeddingSpec("", 4), None, Policy(), {})


def answered(caller, chunk_id, **fields):
    """Return a chunk as a retrieval answers it; None where it is not among the hits."""
    return next((chunk for chunk in caller.retrieve(**fields)[0].chunks if chunk.chunk_id == chunk_id), None)


def test_what_changes_of_a_chunk_is_answered_at_once(caller):
    """Retrieve a chunk between all that can change of it, without K-V and with some layers as well."""
    first, other = (caller.add(text=text) for text in ("one", "two"))
    before = answered(caller, first)
    assert (before.text, before.retrieval_count, dict(before.metadata)) == ("one", 0, {"speaker": "a"})
    assert answered(caller, other).text == "two"
    caller.stub.GetChunk(pb.GetChunkRequest(bank="b", chunk_id=first))  # writes the counts
    counted = answered(caller, first, omit_payload=True)
    assert counted.retrieval_count == 2
    assert counted.HasField("last_retrieve_time")
    caller.stub.PinChunks(pb.PinChunksRequest(bank="b", chunk_ids=[first], pinned=True))
    caller.stub.UpdateChunk(pb.UpdateChunkRequest(bank="b", chunk_id=first, metadata={"speaker": "b"}))
    changed = answered(caller, first)
    assert (changed.pinned, dict(changed.metadata), changed.text) == (True, {"speaker": "b"}, "one")
    some = answered(caller, first, layers=[1])
    assert [tensor.name for tensor in some.payload.tensors] == ["k.1", "v.1", "pos.1"]
    assert answered(caller, first).payload == before.payload
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[first]))
    assert answered(caller, first) is None


def test_a_chunk_that_expires_is_answered_no_more(serving, data):
    """Fetch a chunk until its time is up, while its row stays."""
    caller = serving(pauses=Pauses(left_out={"expiry"}))
    caller.create()
    chunk_id = caller.add(expiry=bank_pb2.Expiry(ttl=Duration(nanos=300_000_000)))

    def is_gone():
        try:
            return not caller.fetch(chunk_id)
        except grpc.RpcError as error:
            return error.code() == grpc.StatusCode.NOT_FOUND

    assert not is_gone()
    wait_until(is_gone, "it is answered still", 10)
    with closing(sqlite3.connect(data / "metadata.db")) as database:
        assert database.execute("SELECT count(*) FROM chunks").fetchone() == (1,)


def test_damage_behind_a_chunk_that_is_known_is_found_by_the_next_start(serving, refused, data):
    caller = serving()
    caller.create()
    chunk_id = caller.add()
    before = answered(caller, chunk_id)
    with closing(sqlite3.connect(data / "metadata.db", isolation_level=None)) as database:
        database.execute("UPDATE contents SET text = 'a test'")
    assert answered(caller, chunk_id).text == before.text == "a text"
    serving.stop()
    caller = serving()
    with refused("CHECKSUM_MISMATCH", grpc.StatusCode.DATA_LOSS):
        caller.retrieve()


def test_what_is_known_is_bounded_and_forgotten():
    """Keep more chunks than there is room for: the first go. What is removed goes at once."""

    def learn(chunk_id, letters=4000):
        chunk = Chunk(b"", 0, 0, 0, b"", "x" * letters, {}, b"", None, chunk_id=chunk_id)
        return known.learn(State(chunk_id, b"", 0, None, False, 0, False, None, 0), chunk)

    known = KnownChunks(most=40_000)
    for chunk_id in range(1, 1001):
        learn(chunk_id, 2000)
    few = known.among(range(1001))
    assert 1 < len(few) < 10
    assert few[-1] == 1000
    assert learn(1001, 100_000).kept is None
    assert known.among([1001]) == []
    # Its row was read before its metadata were replaced, and noted only after that.
    assert known.now(State(few[-1], b"other", 0, None, False, 0, False, None, 0), BANK) is None
    # The name of its bank is another one since.
    assert known.now(State(few[-1], b"", 0, None, False, 0, False, None, 0), BANK).bank == "b"
    known.removed(None, few[:1])
    assert known.among(range(1001)) == few[1:]
    known.purge(None)
    assert known.among(range(1001)) == []
    assert known._bytes == 0
