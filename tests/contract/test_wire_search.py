"""Searching through the service: what may be found, in which order, and where the index is between two searches."""

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from kvbank.v1 import bank_pb2
from kvbank.v1 import service_pb2 as pb
from kvbank.wire.frames import prefix
from memory_service.domain.limits import IndexLimits, Limits
from tests.support.searching import best, fill, ids_of, normal, stats
from tests.support.waiting import wait_until

INVALID = grpc.StatusCode.INVALID_ARGUMENT


class TestFilter:
    """Selects before the top k: the near chunks that do not count make no room empty."""

    @pytest.fixture(autouse=True)
    def _chunks(self, vectors):
        self.caller = vectors
        made = []
        for number in range(30):
            chunk, data = vectors.chunk((1, 0, 0, 0), layers=[], start=number)
            chunk.metadata["speaker"] = "a"
            made.append((chunk, data))
        for number in range(4):
            chunk, data = vectors.chunk((0.1, 0, 0, 0), layers=[], start=1000 + number)
            chunk.metadata.clear()
            chunk.metadata["speaker"] = "b" if number % 2 else "c'\"%_"
            if number == 3:
                chunk.metadata["empty"] = ""
                chunk.pinned = True
            made.append((chunk, data))
        self.ids = [ack.chunk_id for ack in vectors.write(*made, bank="v")]
        self.far = self.ids[30:]

    def found(self, top_k=3, **filter_):
        (ids,) = ids_of(self.caller, banks=["v"], top_k=top_k, filter=pb.Filter(**filter_))
        return ids

    def condition(self, key, *values, negate=False):
        return pb.MetadataCondition(key=key, values=values, negate=negate)

    def test_metadata(self):
        far = self.far
        assert self.found(metadata=[self.condition("speaker", "b")]) == [far[1], far[3]]
        assert self.found(metadata=[self.condition("speaker", "b", "c'\"%_")]) == far[:3]
        assert self.found(metadata=[self.condition("speaker", "a", negate=True)]) == far[:3]
        assert self.found(metadata=[self.condition("empty")]) == [far[3]]
        assert self.found(metadata=[self.condition("empty", negate=True)]) == self.ids[:3]
        both = [self.condition("speaker", "b"), self.condition("empty", negate=True)]
        assert self.found(metadata=both) == [far[1]]
        assert self.found(metadata=[self.condition("nobody", "x")]) == []

    def test_start_and_pins(self):
        far = self.far
        assert self.found(start_from=1000) == far[:3]
        assert self.found(start_from=29, start_before=1001) == [self.ids[29], far[0]]
        assert self.found(pinned=True) == [far[3]]
        assert self.found(top_k=100, pinned=False) == self.ids[:33]

    def test_alternatives(self):
        far = self.far
        b, empty = pb.Filter(metadata=[self.condition("speaker", "b")]), pb.Filter(metadata=[self.condition("empty")])
        early = pb.Filter(start_from=29, start_before=1001)
        assert self.found(100, any_of=[b]) == [far[1], far[3]]
        assert self.found(100, any_of=[b, early]) == [self.ids[29], far[0], far[1], far[3]]
        assert self.found(100, any_of=[b, early], start_from=30) == [far[0], far[1], far[3]]
        assert self.found(100, any_of=[b, early], pinned=False, start_from=30) == far[:2]
        assert self.found(100, any_of=[empty, pb.Filter()]) == self.ids
        assert self.found(100, any_of=[pb.Filter(pinned=True)] * 100) == [far[3]]
        request = pb.ListChunksRequest(bank="v", filter=pb.Filter(any_of=[b, early]))
        listed = [chunk.chunk_id for chunk in self.caller.stub.ListChunks(request).chunks]
        assert listed == [self.ids[29], far[0], far[1], far[3]]

    def test_stretches(self):
        near, far = self.ids[:30], self.far
        chunks = [(near[3], "one"), (near[7], "one"), (far[0], "two"), (far[2], "one")]
        for chunk_id, branch in chunks:
            self.caller.stub.UpdateChunk(
                pb.UpdateChunkRequest(bank="v", chunk_id=chunk_id, metadata={"branch": branch})
            )
        line = [pb.Stretch(branch="one", start_before=7), pb.Stretch(branch="two")]
        assert self.found(100, stretches=line) == [near[3], far[0]]
        assert self.found(100, stretches=line[::-1], start_from=4) == [far[0]]
        assert self.found(100, stretches=[pb.Stretch(branch="one")]) == [near[3], near[7], far[2]]
        assert self.found(100, stretches=[*line, *(pb.Stretch(branch=f"{n}") for n in range(9_998))]) == [
            near[3],
            far[0],
        ]
        request = pb.ListChunksRequest(bank="v", filter=pb.Filter(stretches=line))
        assert [chunk.chunk_id for chunk in self.caller.stub.ListChunks(request).chunks] == [near[3], far[0]]

    def test_times(self):
        pages = self.caller.stub.ListChunks(pb.ListChunksRequest(bank="v", page_size=1000)).chunks
        times = [chunk.create_time.ToMicroseconds() for chunk in pages]

        def at(microseconds, nanos=0):
            return Timestamp(seconds=microseconds // 10**6, nanos=microseconds % 10**6 * 1000 + nanos)

        for bound in (min(times), times[10], max(times), max(times) + 1):
            late = [i for i, made in zip(self.ids, times, strict=True) if made >= bound]
            early = [i for i, made in zip(self.ids, times, strict=True) if made < bound]
            assert self.found(100, created_from=at(bound)) == late
            assert self.found(100, created_before=at(bound)) == early
            later = [i for i, made in zip(self.ids, times, strict=True) if made > bound]
            assert self.found(100, created_from=at(bound, 1)) == later

    def test_lists_take_it_too(self):
        request = pb.ListChunksRequest(bank="v", filter=pb.Filter(start_from=1001))
        assert [chunk.chunk_id for chunk in self.caller.stub.ListChunks(request).chunks] == self.far[1:]

    def test_nonsense_is_refused(self, refused):
        for number, (field, filter_) in enumerate(
            (
                ("filter.metadata.key", {"metadata": [pb.MetadataCondition(values=["x"])]}),
                ("filter.metadata", {"metadata": [pb.MetadataCondition(key="k")] * 33}),
                ("filter.metadata.values", {"metadata": [pb.MetadataCondition(key="k", values=["v"] * 1001)]}),
                ("filter.created_from", {"created_from": Timestamp(nanos=-1)}),
                ("filter.created_before", {"created_before": Timestamp(seconds=2**62)}),
                (
                    "filter.created_before",
                    {"created_from": Timestamp(seconds=2), "created_before": Timestamp(seconds=2)},
                ),
                ("filter.start_before", {"start_from": 5, "start_before": 4}),
                ("filter.start_before", {"any_of": [pb.Filter(start_from=5, start_before=4)]}),
                ("filter.any_of", {"any_of": [pb.Filter()] * 101}),
                ("filter.stretches", {"stretches": [pb.Stretch(branch="b")] * 10_001}),
                ("filter.stretches", {"any_of": [pb.Filter(stretches=[pb.Stretch(branch="b")] * 5_001)] * 2}),
                ("filter.any_of", {"any_of": [pb.Filter(any_of=[pb.Filter()])]}),
                ("filter.metadata", {"any_of": [pb.Filter(metadata=[pb.MetadataCondition(key="k")] * 33)]}),
                (
                    "filter.metadata.values",
                    {"any_of": [pb.Filter(metadata=[pb.MetadataCondition(key="k", values=["v"] * 600)])] * 2},
                ),
            )
        ):
            print("case", number, field)
            with refused("INVALID_FIELD", INVALID):
                self.found(**filter_)
            assert refused.info.metadata["field"] == field
            with refused("INVALID_FIELD", INVALID):
                self.caller.stub.ListChunks(pb.ListChunksRequest(bank="v", filter=pb.Filter(**filter_)))


def test_filters_within_each_other_without_end_are_refused(vectors, refused):
    """Refuse a message of five thousand filters, each within the one before, as one that is none."""
    deep = b""
    for _ in range(5_000):
        deep = encoded(7, deep)
    request = encoded(5, deep)
    ask = vectors.channel.unary_stream("/kvbank.v1.MemoryService/ListChunks")
    with refused("INVALID_FIELD", INVALID):
        list(ask(request))


def encoded(field, data):
    """Return a message that has these bytes in a field."""
    return prefix(field, len(data)) + data


def test_several_banks_and_queries_are_one_order(vectors):
    vectors.create("w", layers=[])
    data = {name: normal(200, seed) for seed, name in enumerate("vw")}
    data["w"][:50] = data["v"][:50]  # ties over banks: lower id first
    ids = {name: fill(vectors, data[name], name) for name in "vw"}
    queries = np.concatenate([normal(5, 9), data["v"][:3]])
    everything = np.concatenate([data["v"], data["w"]]), ids["v"] + ids["w"]
    expected = [best(*everything, query, 20) for query in queries]
    for banks in (["v", "w"], ["w", "v"]):
        assert ids_of(vectors, queries.ravel(), banks=banks, top_k=20) == expected
    header, _ = vectors.retrieve(queries[:1], banks=["v", "w"], top_k=20, reader_digest="")
    middle = header.queries[0].hits[10].score
    above = [hit.chunk_id for hit in header.queries[0].hits if hit.score >= middle]
    assert ids_of(vectors, queries[:1], banks=["v", "w"], top_k=20, min_score=middle) == [above]
    assert {chunk.bank for chunk in header.chunks} == {"v", "w"}


def test_what_has_expired_takes_no_place(vectors):
    chunk, data = vectors.chunk((1, 0, 0, 0), layers=[])
    chunk.expiry.ttl.FromMilliseconds(300)
    made = [(chunk, data), *(vectors.chunk((0.5, 0, 0, 0), layers=[]) for _ in range(3))]
    first, *others = [ack.chunk_id for ack in vectors.write(*made, bank="v")]
    seen = []

    def gone():
        seen.append(ids_of(vectors, banks=["v"], top_k=2, skip_count=True)[0])
        return seen[-1] == others[:2]

    wait_until(gone)
    assert all(ids in ([first, others[0]], others[:2]) for ids in seen)


def test_a_retried_call_counts_once(caller):
    chunk_id = caller.add()
    key = bytes(range(16))
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: caller.retrieve(request_id=key), range(16)))
    assert caller.count(chunk_id) == 1
    caller.retrieve(request_id=bytes(16))
    caller.retrieve(skip_count=True)
    caller.retrieve(np.array([[1, 0, 0, 0]] * 3))
    assert caller.count(chunk_id) == 5


def test_a_bank_at_rest_leaves_memory_and_comes_back(serving):
    caller = serving(index_idle=0.3)
    caller.create("v", layers=[])
    data = normal(1000)
    ids = fill(caller, data)
    query = normal(1, 9)[0]
    expected = [best(data, ids, query)]
    assert ids_of(caller, query, banks=["v"]) == expected
    assert stats(caller).loaded
    assert stats(caller).vectors == 1000
    wait_until(lambda: not stats(caller).loaded)
    assert stats(caller).memory_bytes == 0
    # Changes while it rests are not missed.
    more = normal(50, 2)
    ids += fill(caller, more)
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="v", chunk_ids=expected[0][:3]))
    kept = [i for i, chunk_id in enumerate(ids) if chunk_id not in expected[0][:3]]
    expected = [best(np.concatenate([data, more])[kept], [ids[i] for i in kept], query)]
    assert ids_of(caller, query, banks=["v"]) == expected


def test_index_kinds(serving):
    caller = serving()
    caller.create("v", layers=[], index=bank_pb2.INDEX_KIND_IVF)
    data = normal(2000)
    ids = fill(caller, data)
    assert stats(caller).kind == bank_pb2.INDEX_KIND_EXACT
    query = normal(1, 9)[0]
    expected = best(data, ids, query)
    assert ids_of(caller, query, banks=["v"]) == [expected]
    wait_until(lambda: stats(caller).kind == bank_pb2.INDEX_KIND_IVF)
    assert stats(caller).recall >= 0.95
    (found,) = ids_of(caller, query, banks=["v"])
    assert len(set(found) & set(expected)) >= 6
    bank = bank_pb2.Bank(name="v", index=bank_pb2.INDEX_KIND_EXACT)
    caller.stub.UpdateBank(pb.UpdateBankRequest(bank=bank, update_mask={"paths": ["index"]}))
    wait_until(lambda: stats(caller).kind == bank_pb2.INDEX_KIND_EXACT)
    assert not stats(caller).HasField("recall")
    assert ids_of(caller, query, banks=["v"]) == [expected]


def test_tombstones_are_compacted(serving):
    caller = serving(limits=Limits(index=IndexLimits(tail_rows=64)))
    caller.create("v", layers=[])
    data = normal(640)
    ids = fill(caller, data)
    ids_of(caller, banks=["v"])
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="v", chunk_ids=ids[::2]))
    wait_until(lambda: stats(caller).vectors <= 320 + 128)
    assert stats(caller).vectors - stats(caller).tombstones == 320
    query = normal(1, 9)[0]
    assert ids_of(caller, query, banks=["v"]) == [best(data[1::2], ids[1::2], query)]


# Snapshots


# Side by side


def test_searches_beside_writes_and_deletes(serving):
    """Searches always find a chunk that stays, and never again one whose deletion was answered."""
    caller = serving(limits=Limits(index=IndexLimits(tail_rows=64)))
    caller.create("v", layers=[])
    stay = normal(50)
    stay /= np.linalg.norm(stay, axis=1, keepdims=True)
    ids = fill(caller, stay)
    gone, done = set(), threading.Event()

    def change():
        for seed in range(15):
            others = fill(caller, 0.3 * normal(40, 100 + seed) / 4)
            caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="v", chunk_ids=others[:30]))
            gone.update(others[:30])
        done.set()

    def search():
        while not done.is_set():
            for chunk_id, vector in zip(ids, stay, strict=True):
                before = set(gone)
                (found,) = ids_of(caller, vector, banks=["v"], top_k=3, skip_count=True)
                assert found[0] == chunk_id
                assert not before & set(found)

    with ThreadPoolExecutor(3) as threads:
        for task in [threads.submit(change), threads.submit(search), threads.submit(search)]:
            task.result()
