"""Writing and reading chunks: what comes back is what went in."""

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import xxhash

from kvbank.v1 import service_pb2 as pb


def test_round_trip_is_bit_equal(caller):
    chunks = [caller.chunk((1, 0, 0, 0)), caller.chunk((0, 1, 0, 0), m=5)]
    acks = caller.write(*chunks)
    assert [ack.idempotency_key for ack in acks] == [chunk.idempotency_key for chunk, _ in chunks]
    assert acks[0].chunk_id < acks[1].chunk_id
    header, parts = caller.retrieve((0.5, 1, 0, 0))
    assert [hit.chunk_id for hit in header.queries[0].hits] == [acks[1].chunk_id, acks[0].chunk_id]
    assert [round(hit.score, 6) for hit in header.queries[0].hits] == [1.0, 0.5]
    assert parts == {ack.chunk_id: data for ack, (_, data) in zip(acks, chunks, strict=True)}
    assert caller.fetch(acks[1].chunk_id, acks[0].chunk_id) == parts
    got, sent = header.chunks[0], chunks[0][0]
    for field in ("start", "original_length", "stored_length", "token_ids", "text", "metadata", "idempotency_key"):
        assert getattr(got, field) == getattr(sent, field)
    assert got.payload.producer == sent.payload.producer
    assert [tensor.name for tensor in got.payload.tensors] == [tensor.name for tensor in sent.payload.tensors]
    digests = b"".join(tensor.checksum.to_bytes(8, "little") for tensor in got.payload.tensors)
    assert got.payload.checksum == xxhash.xxh3_64_intdigest(digests)


def test_large_chunk_in_large_frames(caller, frames):
    caller.create("big", layers=[0])
    m = 40_000
    chunk, data = caller.chunk(m=m, layers=[0])
    chunk.original_length, chunk.token_ids[:] = m, []
    (ack,) = caller.stub.WriteChunks(frames(chunk, data, "big", step=1 << 20))
    assert caller.fetch(ack.chunk_id, bank="big") == {ack.chunk_id: data}


def test_layer_subset(caller):
    chunk, data = caller.chunk()
    chunk_id = caller.write((chunk, data))[0].chunk_id
    half = len(data) // 2
    header, parts = caller.retrieve(layers=[3])
    assert parts == {chunk_id: data[half:]}
    assert [tensor.name for tensor in header.chunks[0].payload.tensors] == ["k.3", "v.3", "pos.3"]
    assert header.chunks[0].payload.checksum == caller.retrieve()[0].chunks[0].payload.checksum
    assert caller.fetch(chunk_id, layers=[1]) == {chunk_id: data[:half]}


def test_vectors_only_bank(caller):
    caller.create("v", layers=[])
    chunk_id = caller.add(bank="v", layers=[])
    header, parts = caller.retrieve(banks=["v"], reader_digest="")
    assert [chunk.chunk_id for chunk in header.chunks] == [chunk_id]
    assert (list(header.sent), parts) == ([False], {})


def test_held_payloads_are_not_sent(caller):
    first, second = caller.add((1, 0, 0, 0)), caller.add((0.9, 0, 0, 0))
    header, _ = caller.retrieve()
    checksum = header.chunks[0].payload.checksum
    held = [pb.HeldChunk(chunk_id=first, checksum=checksum), pb.HeldChunk(chunk_id=second, checksum=checksum)]
    header, parts = caller.retrieve(store_id=header.store_id, held=held)
    assert list(parts) == [second]
    assert list(header.sent) == [False, True]
    _, parts = caller.retrieve(store_id="another", held=held)
    assert list(parts) == [first, second]
    header, parts = caller.retrieve(omit_payload=True, reader_digest="")
    assert (list(header.sent), parts) == ([False, False], {})


def test_ties_go_to_the_lower_id_also_at_the_border(caller):
    caller.create("t", layers=[])
    ids = [ack.chunk_id for ack in caller.write(*(caller.chunk((1, 1, 0, 0), layers=[]) for _ in range(200)), bank="t")]
    caller.add((0, 0, 1, 0), bank="t", layers=[])
    best = caller.add((2, 2, 0, 0), bank="t", layers=[])
    header, _ = caller.retrieve((1, 1, 0, 0), banks=["t"], reader_digest="", top_k=5)
    assert [hit.chunk_id for hit in header.queries[0].hits] == [best, *ids[:4]]


def test_search_agrees_with_numpy(caller):
    caller.create("n", layers=[])
    vectors = np.random.default_rng(3).standard_normal((300, 4)).astype("<f4")
    acks = caller.write(*(caller.chunk(vector, layers=[]) for vector in vectors), bank="n")
    ids = np.array([ack.chunk_id for ack in acks])
    gone = ids[::7]
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="n", chunk_ids=gone.tolist()))
    kept = ~np.isin(ids, gone)
    queries = np.random.default_rng(4).standard_normal((30, 4)).astype("<f4")
    header, _ = caller.retrieve(queries, banks=["n"], reader_digest="", top_k=10)
    scores = queries.astype("f8") @ vectors[kept].T
    expected = ids[kept][np.argsort(-scores, axis=1)[:, :10]]
    assert [[hit.chunk_id for hit in row.hits] for row in header.queries] == expected.tolist()


def test_min_score_and_several_banks(caller):
    caller.create("c")
    near, far = caller.add((1, 0, 0, 0)), caller.add((0.1, 0, 0, 0))
    other = caller.add((0.5, 0, 0, 0), bank="c")
    header, parts = caller.retrieve(banks=["c", "b"])
    assert [hit.chunk_id for hit in header.queries[0].hits] == [near, other, far]
    assert [(chunk.chunk_id, chunk.bank) for chunk in header.chunks] == [(near, "b"), (far, "b"), (other, "c")]
    assert set(parts) == {near, far, other}
    header, _ = caller.retrieve(banks=["c", "b"], min_score=0.5)
    assert [hit.chunk_id for hit in header.queries[0].hits] == [near, other]


def test_min_share_of_the_best_score(caller):
    caller.create("c")
    near, far = caller.add((1, 0, 0, 0)), caller.add((0.1, 0, 0, 0))
    other = caller.add((0.5, 0, 0, 0), bank="c")
    queries = np.array([[2, 0, 0, 0], [-1, 0, 0, 0]], "<f4")

    def hits(share: float) -> list[list[int]]:
        header, _ = caller.retrieve(queries, banks=["c", "b"], min_share=share)
        return [[hit.chunk_id for hit in row.hits] for row in header.queries]

    assert hits(0) == [[near, other, far], [far]]
    assert hits(0.05) == [[near, other, far], [far]]
    assert hits(0.5) == [[near, other], [far]]
    assert hits(1) == [[near], [far]]
    other_count = caller.get(other, bank="c").retrieval_count
    assert (caller.count(near), other_count, caller.count(far)) == (4, 3, 6)  # what is left out is not counted
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(grpc.RpcError, match="min_share"):
            caller.retrieve(min_share=wrong)


def test_empty_bank_answers_nothing(caller):
    header, parts = caller.retrieve()
    assert (list(header.queries[0].hits), list(header.chunks), parts) == ([], [], {})


def test_paging(caller):
    ids = [ack.chunk_id for ack in caller.write(*(caller.chunk() for _ in range(7)))]
    seen, token, pages = [], "", 0
    while token or not pages:
        page = caller.stub.ListChunks(pb.ListChunksRequest(bank="b", page_size=3, page_token=token))
        seen += [chunk.chunk_id for chunk in page.chunks]
        token, pages = page.next_page_token, pages + 1
    assert (seen, pages) == (ids, 3)
    page = caller.stub.ListChunks(pb.ListChunksRequest(bank="b", with_embedding=True))
    assert page.chunks[0].embedding == np.array([1, 0, 0, 0], "<f4").tobytes()


def test_get_update_delete(caller):
    chunk_id = caller.add()
    request = pb.UpdateChunkRequest(bank="b", chunk_id=chunk_id, metadata={"topic": "x"})
    assert caller.stub.UpdateChunk(request).chunk.metadata == {"topic": "x"}
    chunk = caller.stub.GetChunk(pb.GetChunkRequest(bank="b", chunk_id=chunk_id, with_embedding=True)).chunk
    assert (chunk.metadata, len(chunk.embedding)) == ({"topic": "x"}, 16)
    answer = caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[chunk_id, 999]))
    assert answer.deleted == 1
    assert caller.ids() == []
    usage = caller.usage()
    assert (usage.chunks, usage.tokens, usage.bytes, usage.chunks_deleted) == (0, 0, 0, 1)


def test_replay_returns_the_first_result(caller):
    chunk = caller.chunk()
    first = caller.write(chunk)[0]
    again = caller.write(chunk)[0]
    assert (again.chunk_id, again.replayed, again.gone) == (first.chunk_id, True, False)
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[first.chunk_id]))
    gone = caller.write(chunk)[0]
    assert (gone.chunk_id, gone.replayed, gone.gone) == (first.chunk_id, True, True)


def test_a_chunk_that_is_written_if_absent(caller):
    """Acknowledge a chunk that is there whatever its content, and do not count one that is gone."""

    def write(chunk, data):
        header, *frames = caller.frames(chunk, data)
        header.header.if_absent = True
        return next(iter(caller.stub.WriteChunks(iter([header, *frames]))))

    chunk, data = caller.chunk()
    first = write(chunk, data)
    chunk.text = "another"
    again = write(chunk, data)
    assert (again.chunk_id, again.replayed, again.gone) == (first.chunk_id, True, False)
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[first.chunk_id]))
    anew = write(chunk, data)
    assert (anew.chunk_id > first.chunk_id, anew.replayed, anew.gone) == (True, False, False)
    assert caller.fetch(anew.chunk_id) == {anew.chunk_id: data}
    assert caller.get(anew.chunk_id).text == "another"


def test_one_key_many_writers(caller):
    chunk = caller.chunk()
    with ThreadPoolExecutor(8) as pool:
        acks = [ack for acks in pool.map(lambda _: caller.write(chunk), range(8)) for ack in acks]
    assert len({ack.chunk_id for ack in acks}) == 1
    assert sum(not ack.replayed for ack in acks) == 1
    assert len(caller.ids()) == 1


def test_refused_chunk_ends_the_stream_and_the_others_stay(caller, refused, frames):
    stream = caller.stub.WriteChunks(
        frame for chunk, data in (caller.chunk(), caller.chunk((1, 0, 0))) for frame in frames(chunk, data)
    )
    first = next(stream)
    with refused("INVALID_FIELD", grpc.StatusCode.INVALID_ARGUMENT):
        next(stream)
    assert caller.ids() == [first.chunk_id]


def test_narrow_window_still_passes_everything(serving):
    caller = serving(max_unacknowledged_bytes=1)
    caller.create()
    assert len(caller.write(*(caller.chunk() for _ in range(20)))) == 20


def test_ids_come_in_stream_order_beyond_a_block(caller):
    caller.create("v", layers=[])
    ids = caller.write_together((caller.chunk(layers=[]) for _ in range(2500)), "v")
    assert ids == sorted(set(ids))


def test_reading_while_evicting(caller):
    """Chunks that go between search and read are replaced, never an error."""
    caller.stub.DeleteBank(pb.DeleteBankRequest(name="b"))
    caller.create(capacity={"chunks": 8})
    caller.write(*(caller.chunk() for _ in range(8)))
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            caller.write(*(caller.chunk() for _ in range(8)))

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            sizes = [len(caller.retrieve(top_k=3)[1]) for _ in range(100)]
        finally:
            stop.set()
        writing.result()
    assert set(sizes) == {3}


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_positions_may_differ_by_head(caller, shape):
    chunk, data = caller.chunk()
    position = np.broadcast_to(np.array([0, 2, 4], "<i4"), shape).tobytes()
    parts, begin = [], 0
    for tensor in chunk.payload.tensors:
        part = data[begin : begin + tensor.length]
        begin += tensor.length
        if tensor.name.startswith("pos."):
            part = position
            tensor.shape[:] = shape
            tensor.length, tensor.checksum = len(part), xxhash.xxh3_64_intdigest(part)
        parts.append(part)
    chunk_id = caller.write((chunk, b"".join(parts)))[0].chunk_id
    assert caller.fetch(chunk_id) == {chunk_id: b"".join(parts)}
