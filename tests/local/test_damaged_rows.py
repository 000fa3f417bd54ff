"""A row that cannot be used costs one chunk and is said once; the rest of the bank is served."""

import sqlite3
from contextlib import closing

import grpc
import pytest

from kvbank.v1 import service_pb2 as pb
from tests.support.diagonal import rotated

DATA_LOSS = grpc.StatusCode.DATA_LOSS
BAD = 5
DAMAGE = {
    "embedding, cut": "UPDATE contents SET embedding = substr(embedding, 1, 12) WHERE chunk_id = 5",
    "embedding, longer": "UPDATE contents SET embedding = CAST(embedding || x'00000000' AS BLOB) WHERE chunk_id = 5",
    "embedding, odd": "UPDATE contents SET embedding = substr(embedding, 1, 15) WHERE chunk_id = 5",
    "embedding, NaN": "UPDATE contents SET embedding = x'0000c07f000000000000000000000000' WHERE chunk_id = 5",
    "embedding, text that is not UTF-8": "UPDATE contents SET embedding = embedding || x'ff' WHERE chunk_id = 5",
    "embedding, text": "UPDATE contents SET embedding = 'abcdabcdabcdabcd' WHERE chunk_id = 5",
    "text, not UTF-8": "UPDATE contents SET text = CAST(x'ff20ff' AS TEXT) WHERE chunk_id = 5",
    "text, bytes": "UPDATE contents SET text = x'6162' WHERE chunk_id = 5",
    "token ids, cut": "UPDATE contents SET token_ids = substr(token_ids, 1, 7) WHERE chunk_id = 5",
    "descriptor, cut": "UPDATE contents SET payload = substr(payload, 1, 20) WHERE chunk_id = 5",
    "descriptor, none": "UPDATE contents SET payload = NULL WHERE chunk_id = 5",
    "descriptor, empty list": "UPDATE contents SET payload = '[]' WHERE chunk_id = 5",
    "descriptor, of another type": "UPDATE contents SET payload = replace(payload, 'bf16', 'bg16') WHERE chunk_id = 5",
    "descriptor, not UTF-8": "UPDATE contents SET payload = CAST(x'5bff' AS TEXT) WHERE chunk_id = 5",
    "metadata, cut": "UPDATE chunks SET meta = substr(meta, 1, 5) WHERE chunk_id = 5",
    "metadata, a list": "UPDATE chunks SET meta = '[]' WHERE chunk_id = 5",
    "metadata, not UTF-8": "UPDATE chunks SET meta = CAST(x'7b22ff223a2261227d' AS TEXT) WHERE chunk_id = 5",
    "a figure, text": "UPDATE chunks SET start = 'x' WHERE chunk_id = 5",
    # Well formed, and not what was written.
    "descriptor, another name": "UPDATE contents SET payload = replace(payload, 'pos.1', 'pns.1') WHERE chunk_id = 5",
    "descriptor, another layer": "UPDATE contents SET payload = replace(payload, '.1\"', '.2\"') WHERE chunk_id = 5",
    "text, another": "UPDATE contents SET text = 'a test' WHERE chunk_id = 5",
    "token ids, others": "UPDATE contents SET token_ids = zeroblob(20) WHERE chunk_id = 5",
    "metadata, others": """UPDATE chunks SET meta = '{"speaker": "b"}' WHERE chunk_id = 5""",
    "a figure, another": "UPDATE chunks SET start = start + 1 WHERE chunk_id = 5",
    "vector, another": "UPDATE contents SET embedding = zeroblob(16) WHERE chunk_id = 5",
}


def pages(caller):
    """List all chunks, page by page."""
    ids, page = [], pb.ListChunksResponse(next_page_token="0")
    while page.next_page_token:
        request = pb.ListChunksRequest(bank="b", page_size=3, page_token=page.next_page_token, with_embedding=True)
        page = caller.stub.ListChunks(request)
        ids += [chunk.chunk_id for chunk in page.chunks]
    return ids


def code_of(call, caller):
    try:
        call(caller)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


CALLS = {
    "retrieve": lambda caller: caller.retrieve(top_k=20),
    "fetch": lambda caller: caller.fetch(BAD),
    "get": lambda caller: caller.stub.GetChunk(pb.GetChunkRequest(bank="b", chunk_id=BAD, with_embedding=True)),
    "list": lambda caller: caller.stub.ListChunks(pb.ListChunksRequest(bank="b", with_embedding=True)),
}


@pytest.mark.parametrize("name", rotated([*DAMAGE], 0, every=2))
def test_a_row_that_cannot_be_used_is_said_once_and_then_left_out(caller, data, name):
    ids = [ack.chunk_id for ack in caller.write(*(caller.chunk() for _ in range(8)))]
    with closing(sqlite3.connect(data / "metadata.db", isolation_level=None)) as database:
        assert database.execute(DAMAGE[name]).rowcount == 1
    needs_embedding = name.startswith("embedding")
    calls = ["list", "get"] if needs_embedding else ["fetch", "retrieve"]
    codes = [code_of(CALLS[call], caller) for call in [*calls, "retrieve", "list"]]
    assert codes.count(DATA_LOSS) == 1
    assert set(codes) <= {DATA_LOSS, grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND}
    left = [chunk_id for chunk_id in ids if chunk_id != BAD]
    assert list(caller.retrieve(top_k=20)[1]) == left
    assert pages(caller) == left
    assert caller.usage().chunks_quarantined == 1
    assert len(list(data.glob("quarantine/*/5.json"))) == 1


@pytest.mark.parametrize("name", [name for name in DAMAGE if name.startswith("embedding")])
def test_an_index_is_loaded_without_a_row_that_cannot_be_used(serving, refused, data, name):
    caller = serving()
    caller.create()
    ids = [ack.chunk_id for ack in caller.write(*(caller.chunk() for _ in range(8)))]
    serving.stop()
    with closing(sqlite3.connect(data / "metadata.db", isolation_level=None)) as database:
        database.execute(DAMAGE[name])
    caller = serving()
    with refused("CHECKSUM_MISMATCH", DATA_LOSS):
        caller.retrieve()
    assert refused.info.metadata["chunk_id"] == "5"
    assert list(caller.retrieve(top_k=20)[1]) == [chunk_id for chunk_id in ids if chunk_id != BAD]


def test_a_filter_passes_a_row_whose_metadata_are_no_json(caller, refused, data):
    ids = [ack.chunk_id for ack in caller.write(*(caller.chunk() for _ in range(8)))]
    with closing(sqlite3.connect(data / "metadata.db", isolation_level=None)) as database:
        database.execute(DAMAGE["metadata, cut"])
    asked = {"filter": {"metadata": [{"key": "speaker", "values": ["a"]}]}, "top_k": 20}
    with refused("CHECKSUM_MISMATCH", DATA_LOSS):
        caller.retrieve(**asked)
    assert list(caller.retrieve(**asked)[1]) == [chunk_id for chunk_id in ids if chunk_id != BAD]
