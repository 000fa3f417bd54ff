"""The index against brute force: whatever was added, removed, merged, saved and loaded, answers are exact."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memory_service.domain.cancellation import Cancellation
from memory_service.domain.limits import IndexLimits
from memory_service.search.candidates import Selection
from memory_service.search.index import BankIndex
from memory_service.search.ivf import Ivf
from memory_service.search.loading import load
from memory_service.search.segments import Flat, Half
from memory_service.search.snapshots import Snapshots
from memory_service.search.upkeep import Upkeep

D = 8


# A test reaches them with few vectors.
SMALL = IndexLimits(tail_rows=16, read_one_of=10, segment_rows=128, small_rows=40, most_small=3, fewest_in_lists=80)


def snapshots(folder, store="store", limits=SMALL):
    return Snapshots(folder, store, D, min_free=0, durable=False, limits=limits)


class Truth:
    """The vectors of the records by id, and an index that has to agree with them."""

    def __init__(self, folder, kind="exact", ivf_from=10**9, limits=SMALL):
        self.vectors, self._next = {}, 1
        self.snapshots = snapshots(folder / "indexes" / "uid", limits=limits)
        self._kind, self._ivf_from = kind, ivf_from
        self.use(BankIndex(D, limits=limits))

    def use(self, made):
        self.index = made
        self.upkeep = Upkeep(made, self._kind, self._ivf_from, self.snapshots, lambda: False)

    def read(self, ids):
        found = [i for i in ids.tolist() if i in self.vectors]
        return np.array(found, np.int64), np.array([self.vectors[i] for i in found], np.float32).reshape(-1, D)

    def add(self, vectors):
        ids = np.arange(self._next, self._next + len(vectors))
        self._next += len(vectors)
        self.vectors |= dict(zip(ids.tolist(), vectors, strict=True))
        self.index.add(ids[::-1], vectors[::-1])  # commits are not in the order of ids

    def remove(self, ids):
        for chunk_id in ids:
            self.vectors.pop(chunk_id, None)
        self.index.remove(np.array(ids, np.int64))

    def tend(self):
        while self.upkeep.do_next():
            pass
        for segment in self.index.segments:
            segment.check()

    def save_tail(self):
        self.snapshots.save(self.index.segments[-1])

    def reload(self):
        self.use(load(np.array(sorted(self.vectors), np.int64), self.read, self.snapshots))

    def best(self, query, top_k, allowed=None, excluded=()):
        ids = [i for i in sorted(self.vectors) if (allowed is None or i in allowed) and i not in excluded]
        with np.errstate(over="ignore"):
            vectors = np.array([self.vectors[i] for i in ids], np.float32).reshape(-1, D)
            scores = np.multiply(vectors, query, dtype=np.float64).sum(axis=1).astype(np.float32)
        order = np.lexsort((ids, -scores))[:top_k]
        return [ids[i] for i in order], scores[order].tolist()

    def check(self, queries, top_k, allowed=None, excluded=()):
        selection = Selection(
            None if allowed is None else np.array(sorted(allowed), np.int64), np.array(sorted(excluded), np.int64)
        )
        found = self.index.search(queries, top_k, self.read, selection)
        for query, (ids, scores) in zip(queries, found, strict=True):
            assert (ids.tolist(), scores.tolist()) == self.best(query, top_k, allowed, excluded)


def vectors_of(how, count, seed):
    random = np.random.default_rng(seed)
    normal = random.standard_normal((count, D))
    made = {
        "unit": normal / np.linalg.norm(normal, axis=1, keepdims=True),
        "grid": random.integers(-1, 2, (count, D)),  # many ties
        "same": np.ones((count, D)) / 3,
        "near": 1 / 3 + 1e-7 * normal,  # equal in fp16
        "tiny": 1e-30 * normal,
        "denormal": 1e-44 * normal,
        "zero": np.zeros((count, D)),
        "large": 1e5 * normal,  # beyond fp16
        "huge": 1e38 * np.sign(normal),
        "mixed": normal * 10.0 ** random.integers(-38, 38, (count, 1)),
    }[how]
    return np.clip(made, -3e38, 3e38).astype(np.float32)


KINDS = ("unit", "grid", "same", "near", "tiny", "denormal", "zero", "large", "huge", "mixed")
seeds = st.integers(0, 2**32 - 1)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from(KINDS), st.integers(1, 60), seeds),
        st.tuples(st.just("add"), st.just("unit"), st.integers(1, 60), seeds),
        st.tuples(st.just("remove"), st.floats(0, 1), seeds),
        st.tuples(st.sampled_from(["tend", "save_tail", "reload", "seal"])),
    ),
    max_size=12,
)


@given(steps=steps, query_kind=st.sampled_from(KINDS), seed=seeds, top_k=st.integers(1, 40))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence_equals_brute_force(tmp_path_factory, steps, query_kind, seed, top_k):
    truth = Truth(tmp_path_factory.mktemp("data"))
    random = np.random.default_rng(seed)
    queries = np.concatenate([vectors_of(query_kind, 2, seed), vectors_of("unit", 1, seed)])
    for name, *arguments in steps:
        if name == "add":
            truth.add(vectors_of(*arguments))
        elif name == "remove":
            share, its_seed = arguments
            ids = sorted(truth.vectors)
            truth.remove([i for i in ids if np.random.default_rng([its_seed, i]).random() < share])
        elif name == "seal":
            truth.index.seal_tail()
        else:
            getattr(truth, name)()
        assert len(truth.index) == len(truth.vectors)
        truth.check(queries, top_k)
    ids = sorted(truth.vectors)
    some = {i for i in ids if random.random() < random.choice([0.02, 0.5])}
    others = {i for i in ids if random.random() < 0.2}
    truth.check(queries, top_k, allowed=some)
    truth.check(queries, top_k, excluded=others)
    truth.check(queries, top_k, allowed=some | {10**9}, excluded=others | {10**9 + 1})


@pytest.mark.parametrize("query_kind", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_size_of_values(tmp_path, kind, query_kind):
    """Also where a product leaves float32, at either end."""
    truth = Truth(tmp_path)
    for seed in range(3):
        truth.add(vectors_of(kind, 30, seed))
        truth.tend()
        truth.check(vectors_of(query_kind, 3, 9), 5)


def test_a_segment_of_which_faiss_lost_vectors_takes_no_place(tmp_path):
    truth = Truth(tmp_path)
    truth.add(vectors_of("unit", 40, 0))
    old = truth.index.segments[:-1]
    made = Half(D, np.sort(np.concatenate([segment.ids for segment in old])))
    made._index.ntotal = 0  # nothing that the service does can bring this about
    with pytest.raises(RuntimeError, match=f"FAISS has 0 vectors for {made.rows} ids"):
        truth.index.replace(old, [made])
    assert truth.index.segments[:-1] == old
    truth.check(vectors_of("unit", 3, 1), 10)
    truth.tend()
    truth.check(vectors_of("unit", 3, 1), 10)


def test_segments_are_merged_and_stay_few(tmp_path):
    truth = Truth(tmp_path)
    for seed in range(30):
        truth.add(vectors_of("unit", 16, seed))
        truth.tend()
    assert len(truth.index.segments) <= 12
    assert all(isinstance(segment, Half) for segment in truth.index.segments[:-1])
    truth.remove([i for i in truth.vectors if i % 5])
    truth.tend()
    assert sum(segment.dead for segment in truth.index.segments[:-1]) * 4 <= len(truth.index) + 16
    truth.check(vectors_of("unit", 3, 99), 10)
    truth.remove(list(truth.vectors))
    truth.tend()
    assert sum(segment.rows for segment in truth.index.segments) <= 16
    assert len(list(truth.snapshots.folder.iterdir())) == 0


def test_what_leaves_fp16_stays_float32(tmp_path):
    truth = Truth(tmp_path)
    truth.add(vectors_of("large", 40, 1))
    truth.add(vectors_of("unit", 40, 2))
    truth.tend()
    assert {type(segment) for segment in truth.index.segments[:-1]} == {Flat, Half}
    truth.reload()
    truth.tend()
    truth.check(vectors_of("unit", 3, 99), 10)


def test_lists_wait_for_vectors_that_fit_into_fp16(tmp_path):
    truth = Truth(tmp_path, "ivf")
    truth.add(vectors_of("large", 200, 1))
    truth.tend()
    truth.check(vectors_of("unit", 3, 99), 10)
    truth.add(clustered(600, 2))
    truth.tend()
    assert recall(truth, clustered(20, 3)) >= 0.95


def clustered(count, seed, clusters=12):
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((clusters, D))
    made = centres[random.integers(0, clusters, count)] + 0.2 * random.standard_normal((count, D))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def recall(truth, queries, top_k=10, **selected):
    selection = Selection(*(None if ids is None else np.array(sorted(ids)) for ids in [selected.get("allowed")]))
    found = truth.index.search(queries, top_k, truth.read, selection)
    hits = 0
    for query, (ids, scores) in zip(queries, found, strict=True):
        exact = truth.best(query, top_k, **selected)[0]
        assert len(ids) == len(exact)
        # What is found has its exact score, in the exact order.
        assert (ids.tolist(), scores.tolist()) == truth.best(query, top_k, allowed=set(ids.tolist()))
        hits += len(set(exact) & set(ids.tolist()))
    return hits / (len(queries) * top_k)


def test_lists_find_what_brute_force_finds(tmp_path):
    truth = Truth(tmp_path, "ivf", limits=replace(SMALL, tail_rows=512, segment_rows=4096))
    truth.add(clustered(3000, 1))
    truth.tend()
    lists = truth.index.segments[0]
    assert isinstance(lists, Ivf)
    assert lists.recall >= 0.99
    assert lists.probes < len(lists.sizes) / 2
    queries = clustered(50, 2)
    assert recall(truth, queries) >= 0.95
    # More, and fewer.
    truth.add(clustered(500, 3))
    truth.remove(list(truth.vectors)[::3])
    truth.tend()
    assert recall(truth, queries) >= 0.95
    # As many as are asked for, also from few lists, and also with a filter that lets few pass.
    assert recall(truth, queries[:5], 1000) >= 0.95
    assert recall(truth, queries, allowed={i for i in truth.vectors if i % 20 == 0}) >= 0.95
    # From the file, without a training.
    trained = truth.index.segments[0].centroids.copy()
    truth.reload()
    assert np.array_equal(truth.index.segments[0].centroids, trained)
    assert truth.index.segments[0].recall is not None
    assert recall(truth, queries) >= 0.95
    # What came meanwhile goes into the lists that there are; a bank that has doubled gets new ones.
    truth.add(clustered(1000, 4))
    truth.tend()
    assert np.array_equal(truth.index.segments[0].centroids, trained)
    truth.add(clustered(6000, 5))
    truth.tend()
    assert len(truth.index.segments[0].sizes) > len(trained)
    assert recall(truth, queries) >= 0.95


def test_auto_has_lists_from_its_bound_on_and_only_where_they_pay(tmp_path):
    truth = Truth(tmp_path, "auto", ivf_from=1000)
    truth.add(clustered(900, 1))
    truth.tend()
    assert not any(isinstance(segment, Ivf) for segment in truth.index.segments)
    truth.add(clustered(200, 2))
    truth.tend()
    assert isinstance(truth.index.segments[0], Ivf)
    truth.remove(list(truth.vectors)[:400])
    truth.tend()
    assert isinstance(truth.index.segments[0], Ivf)
    truth.upkeep.kind = "exact"
    truth.tend()
    assert not any(isinstance(segment, Ivf) for segment in truth.index.segments)
    truth.check(clustered(3, 3), 10)
    # No clusters, and so high a dimension for so few vectors that near ones are everywhere.
    truth = Truth(tmp_path / "other", "auto", ivf_from=500)
    truth.add(vectors_of("unit", 600, 1))
    truth.tend()
    assert not any(isinstance(segment, Ivf) for segment in truth.index.segments)


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "other_store", "garbage"])
def test_a_damaged_snapshot_costs_a_rebuild(tmp_path, harm):
    truth = Truth(tmp_path)
    truth.add(vectors_of("unit", 200, 1))
    truth.tend()
    truth.save_tail()
    paths = sorted(truth.snapshots.folder.glob("*.segment"))
    assert len(paths) > 1
    path = paths[0]
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
    elif harm == "cut":
        data = data[:-20]
    elif harm == "empty":
        data = bytearray()
    elif harm == "garbage":
        data = bytearray(np.random.default_rng(0).bytes(len(data)))
    path.write_bytes(data)
    if harm == "other_store":
        truth.snapshots = snapshots(truth.snapshots.folder, "another")
    truth.reload()
    truth.check(vectors_of("unit", 3, 9), 10)
    assert not path.exists()
    truth.tend()
    truth.reload()
    truth.check(vectors_of("unit", 3, 9), 10)


def test_every_byte_of_a_snapshot_is_checked(tmp_path):
    truth = Truth(tmp_path, "ivf")
    truth.add(clustered(100, 1))
    truth.tend()
    (path,) = truth.snapshots.folder.glob("*.segment")
    data = path.read_bytes()
    for place in np.random.default_rng(0).choice(len(data), 300, replace=False):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        assert list(truth.snapshots.load()) == []


def test_a_file_that_a_crash_left_is_not_counted_twice(tmp_path):
    truth = Truth(tmp_path)
    truth.add(vectors_of("unit", 64, 1))
    truth.tend()
    kept = {path: path.read_bytes() for path in truth.snapshots.folder.iterdir()}
    truth.remove([1, 2, 3])
    truth.add(vectors_of("unit", 400, 2))
    truth.tend()
    for path, data in kept.items():
        path.write_bytes(data)
    truth.reload()
    assert len(truth.index) == len(truth.vectors)
    truth.check(vectors_of("unit", 3, 9), 10)


def test_searches_go_on_while_the_index_changes(tmp_path):
    """Searches see every vector that stays, and none that was removed before they began."""
    truth = Truth(tmp_path)
    stay = vectors_of("unit", 100, 1)
    truth.add(stay)
    pace = threading.Event()

    def change():
        for seed in range(40):
            truth.add(0.5 * vectors_of("unit", 30, seed + 10))
            truth.remove([i for i in truth.vectors if i > 100][:25])
        pace.set()

    def tend():
        while not pace.is_set():
            truth.tend()

    def search(begin):
        count = 0
        while not pace.is_set() or not count:
            gone = set(range(101, 1 + min((i for i in truth.vectors.copy() if i > 100), default=101)))
            query = stay[(begin + count) % 100]
            (found,) = truth.index.search(query[None], 5, truth.read)
            assert found.ids[0] == 1 + (begin + count) % 100
            assert len(found.ids) == 5
            assert not gone & set(found.ids.tolist())
            count += 1

    with ThreadPoolExecutor(4) as threads:
        for task in [
            threads.submit(change),
            threads.submit(tend),
            threads.submit(search, 0),
            threads.submit(search, 50),
        ]:
            task.result()
    truth.tend()
    truth.check(vectors_of("unit", 3, 99), 20)


@pytest.mark.timeout(60)
def test_a_tail_that_grows_during_a_search(tmp_path):
    """Searches end, and are exact for the rows that were there when they began, where more rows are found."""
    truth = Truth(tmp_path)
    vectors = vectors_of("unit", 8, 1)
    truth.add(vectors[:2])

    class Growing(Cancellation):
        """Is asked between the steps of a search whether to go on, and adds rows instead of ending it."""

        def check(self) -> None:
            if len(truth.vectors) == 2:
                truth.add(vectors[2:])

    def search():
        Growing().enter()
        return truth.index.search(vectors[:1], 8, truth.read)

    (found,) = copy_context().run(search)
    assert len(truth.vectors) == 8
    assert {1, 2} <= set(found.ids.tolist())
    assert found.ids[0] == 1


def test_what_lies_in_the_place_of_a_snapshot_keeps_nobody_from_searching(serving, data):
    """Pipes whose other end is not written to, links, and folders cannot be removed as files can."""
    caller = serving()
    caller.create()
    chunk_id = caller.add()
    (bank,) = (data / "payloads").glob("????????????????")
    serving.stop()
    folder = data / "indexes" / bank.name
    folder.mkdir(parents=True)
    os.mkfifo(folder / "3.segment")
    (folder / "4.segment").symlink_to("/dev/zero")
    (folder / "5.segment").mkdir()
    (folder / "6.tmp").mkdir()
    assert list(serving().retrieve()[1]) == [chunk_id]
    serving.stop()
    assert {path.name for path in folder.iterdir()} == {"5.segment", "6.tmp"}


@pytest.mark.parametrize("rows", [0, 1, 1000, 40_000])
def test_faiss_searches_what_is_put_into_a_segment_after_it_was_made(rows):
    """Also in memory of so many bytes that it is taken from the system (more than 4 MiB)."""
    made = Half(64, np.arange(rows))
    made.codes[:] = np.random.default_rng(2).standard_normal((rows, 64), np.float32)
    queries = vectors_of("unit", 3, 1)[:, :1] * np.ones(64, np.float32)
    scores, found = made.search(queries, 5, None, 1.0)
    true = queries @ made.codes.astype(np.float32).T
    best = np.argsort(-true, axis=1)[:, :5]
    assert found[:, : best.shape[1]].tolist() == best.tolist()
    assert np.allclose(scores[:, : best.shape[1]], np.take_along_axis(true, best, axis=1), atol=1e-4)
