"""The row `search` of the benchmarks: the search alone, one query at a time, top 10 in 384 dimensions. Among 20,000 and
100,000 vectors it is exact; among 200,000 (with `--million` also a million) it goes by lists.

A call of the SDK that asks for no K-V, over TCP and over a unix socket, is compared with the index in this process,
used as the service uses it (with the exact scores from the records), and that with FAISS in this process with the same
settings: the same fp16 vectors and, where there are lists, the same centroids, lists and probes. Recall is the share
that was found of the true top 10 (float32, all vectors) of 256 queries near stored vectors.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import faiss as _faiss
import numpy as np
import numpy.typing as npt

import kvbank
from benchmarks import material
from benchmarks.bench import Bench
from benchmarks.filling import multiply
from benchmarks.pair import Contender, Result, Target, compare, timed
from benchmarks.service import EMBEDDER, EMBEDDING, connected, writer
from memory_service.care.folder import Folder
from memory_service.domain.model import Bank
from memory_service.domain.tenants import DEFAULT_TENANT
from memory_service.search.index import BankIndex
from memory_service.search.ivf import Ivf
from memory_service.search.loading import load
from memory_service.search.snapshots import Snapshots
from memory_service.storage.local.records import bank_rows, chunk_rows

ROW = "search"
faiss: Any = _faiss  # the stubs of faiss describe it in part only
_WAYS = {"TCP": False, "a unix socket": True}
# Milliseconds that a call may take beyond its search.
_MORE_MS = 0.5
_BANK, _TOP_K, _QUERIES, _WRITTEN, _PATIENCE_S = "vectors", 10, 256, 1000, 1800.0

Kind = Literal["exact", "ivf"]
Ids = npt.NDArray[np.int64]
# Takes a query [d], returns the numbers of the nearest vectors [10].
Search = Callable[[material.Vectors], Ids]


@dataclass(frozen=True)
class Searched:
    """One way to search, with its name and with its role as of a `Contender`."""

    name: str
    role: Any
    search: Search
    targets: tuple[Target, ...] = ()


def run(bench: Bench) -> Iterator[Result]:
    """Measure the time of a search, in milliseconds, and its recall, in one bank after the other."""
    banks: list[tuple[int, Kind]] = [(20_000, "exact"), (100_000, "exact"), (200_000, "ivf")]
    if bench.quick:
        banks = [(5_000, "exact"), (10_000, "ivf")]
    if bench.million:
        banks.append((1_000_000, "ivf"))
    for chunks, kind in banks:
        folder = bench.scratch(ROW)
        try:
            yield from _among(bench, folder, chunks, kind)
        finally:
            bench.clear(folder)


def _among(bench: Bench, folder: Path, chunks: int, kind: Kind) -> Iterator[Result]:
    bench.say(f"fill a bank with {chunks:,} vectors")
    found = material.vectors(chunks)
    _fill(folder, found, kind)
    bench.say(f"make the index of {chunks:,} vectors")
    _settle(folder, found, kind)
    queries = material.near(found, _QUERIES).astype(np.float32)
    true = faiss.knn(queries, found, _TOP_K, metric=faiss.METRIC_INNER_PRODUCT)[1]
    faiss.omp_set_num_threads(1)  # as the service searches
    for way, same_host in _WAYS.items():
        with Folder(folder / "store") as store, connected(folder, same_host=same_host) as client:
            bank, ids, index = _index(store)
            call = Searched(f"the call over {way}", "ours", partial(_call, client, ids))
            search = partial(_alone, store, bank, index, ids)
            bench.say(f"search among {chunks:,} over {way}")
            how = "exact" if kind == "exact" else "{} of {:,} lists".format(*_lists(index))
            title = f"search among {chunks:,}, top {_TOP_K}, {how}"
            floor = Searched("the index alone", "floor", search, (Target("difference", _MORE_MS),))
            yield from _times(title, [call, floor], queries, bench.n(200))
            if not same_host:
                alone, theirs = Searched("the index alone", "ours", search), list(_floors(index, found, kind))
                yield from _times(title, [alone, *theirs], queries, bench.n(200))
                yield from _recalls(title, [call, alone], theirs, queries, true)


# The bank


def _fill(folder: Path, found: material.Vectors, kind: Kind) -> None:
    with connected(folder) as client:
        client.create_bank(_BANK, kv=None, embedding=EMBEDDING, index=kind)
        writer(client, _BANK, reader="")(map(kvbank.NewChunk, found[:_WRITTEN]))
    multiply(folder / "store/metadata.db", len(found) // _WRITTEN, found)


def _settle(folder: Path, found: material.Vectors, kind: Kind) -> None:
    """Wait until the bank has its kind of index. The stop of the service writes the index to files, where the next
    start finds it. Errors: RuntimeError when the index is not ready in time."""
    begin = time.perf_counter()
    with connected(folder) as client:
        client.retrieve(_BANK, found[0], payload=False, count=False, embedder_digest=EMBEDDER, timeout=_PATIENCE_S)
        while client.stats([_BANK]).banks[0].index.kind != kind:
            if time.perf_counter() - begin > _PATIENCE_S:
                raise RuntimeError(f"no lists of {len(found)} vectors after {_PATIENCE_S:g} s")
            time.sleep(0.2)


# Who searches


def _index(store: Folder) -> tuple[Bank, Ids, BankIndex]:
    """Return the bank, all ids of its chunks, ascending, and its index as the service loads it."""
    with store.read() as connection:
        bank = bank_rows.named(connection, DEFAULT_TENANT, _BANK)
        assert bank is not None
        snapshots = Snapshots(store.path / "indexes" / bank.uid, store.store_id(), material.DIMENSION, 0, durable=False)
        ids = chunk_rows.ids(connection, bank.bank_id)
        return bank, ids, load(ids, partial(chunk_rows.vectors, connection, bank), snapshots)


def _call(client: kvbank.Client, ids: Ids, query: material.Vectors) -> Ids:
    answer = client.retrieve(_BANK, query, top_k=_TOP_K, payload=False, count=False, embedder_digest=EMBEDDER)
    return np.searchsorted(ids, [hit.chunk_id for hit in answer.queries[0]])


def _alone(store: Folder, bank: Bank, index: BankIndex, ids: Ids, query: material.Vectors) -> Ids:
    with store.read() as connection:
        (best,) = index.search(query[None], _TOP_K, partial(chunk_rows.vectors, connection, bank))
    return np.searchsorted(ids, best.ids)


def _floors(index: BankIndex, found: material.Vectors, kind: Kind) -> Iterator[Searched]:
    if kind == "exact":
        for name, made in (
            ("FAISS flat, float32", faiss.IndexFlatIP(material.DIMENSION)),
            ("FAISS flat, fp16", _fp16_index()),
        ):
            made.add(found)
            yield Searched(name, "floor", partial(_faiss_search, made))
        return
    yield Searched("FAISS, same lists and probes", "floor", partial(_faiss_search, _same_lists(_ivf(index))))


def _fp16_index() -> Any:
    fp16, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexScalarQuantizer(material.DIMENSION, fp16, metric)
    index.is_trained = True
    return index


def _same_lists(ours: Ivf) -> Any:
    """Make an index of FAISS with the centroids, lists and probes of ours; its ids are numbers of vectors."""
    quantizer = faiss.IndexFlatIP(material.DIMENSION)
    quantizer.add(ours.centroids)
    fp16, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFScalarQuantizer(quantizer, material.DIMENSION, len(ours.sizes), fp16, metric, False)
    index.is_trained, index.nprobe, index.ntotal = True, ours.probes, ours.rows
    for number, (rows, codes) in enumerate(ours.lists):
        if len(rows):
            index.invlists.add_entries(number, len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(codes.view(np.uint8)))
    return index


def _faiss_search(index: Any, query: material.Vectors) -> Ids:
    found: Ids = index.search(query[None], _TOP_K)[1][0]
    return found


def _ivf(index: BankIndex) -> Ivf:
    (lists,) = [segment for segment in index.segments if isinstance(segment, Ivf)]
    return lists


def _lists(index: BankIndex) -> tuple[int, int]:
    lists = _ivf(index)
    return lists.probes, len(lists.sizes)


# Figures


def _times(title: str, all_: list[Searched], queries: material.Vectors, n: int) -> Iterator[Result]:
    contenders = [
        Contender(one.name, one.role, timed(partial(_next, one.search, cycle(queries))), one.targets) for one in all_
    ]
    yield from compare(ROW, title, contenders, n)


def _next(search: Search, queries: Iterator[material.Vectors]) -> Ids:
    return search(next(queries))


def _recalls(
    title: str, ours: list[Searched], theirs: list[Searched], queries: material.Vectors, true: Ids
) -> Iterator[Result]:
    load_average = os.getloadavg()[0]
    for one in ours:
        for other in theirs:
            mine, floor = (_recall(who.search, queries, true) for who in (one, other))
            name = f"recall@{_TOP_K}, {title}, {one.name}"
            yield Result(ROW, name, mine, other.name, "floor", floor, "of 1", len(queries), load_average)


def _recall(search: Search, queries: material.Vectors, true: Ids) -> float:
    hits = sum(len(np.intersect1d(search(query), best)) for query, best in zip(queries, true, strict=True))
    return hits / true.size
