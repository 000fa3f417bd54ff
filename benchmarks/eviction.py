"""The row `eviction` of the benchmarks: a full bank is cut back by a quarter. Its chunks have vectors only, so that no
file is unlinked.

It is cut twice: while a reader and a writer are at work, whose longest calls are taken; then alone, for the time that
one evicted chunk costs. `benchmarks.filling` tells how the bank of a million chunks is made.
"""

import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path

import kvbank
from benchmarks import material
from benchmarks.bench import Bench
from benchmarks.filling import multiply
from benchmarks.lines import Worker, serve
from benchmarks.pair import Result, Target
from benchmarks.service import EMBEDDER, connected, serving, writer

ROW = "eviction"
_DIMENSION, _TARGET, _BASELINE_S = 8, 75, 5.0
_BATCH, _WRITTEN, _LARGE = 1000, 1000, 200_000
_PATIENCE_S, _EVERY_S = 120.0, 0.005


def run(bench: Bench) -> Iterator[Result]:
    """Measure the longest call of others, in milliseconds, and the time of one evicted chunk, in microseconds."""
    chunks = 20_000 if bench.quick else 1_000_000
    folder = bench.scratch(ROW)
    try:
        bench.say(f"fill a bank with {chunks:,} chunks")
        found = material.vectors(_WRITTEN, _DIMENSION)
        with connected(folder) as client:
            embedding = kvbank.EmbeddingSpec(EMBEDDER, _DIMENSION)
            policy = kvbank.Policy(target=_TARGET)
            for name, capacity in (("full", kvbank.Capacity(chunks=chunks)), ("other", None)):
                client.create_bank(name, kv=None, embedding=embedding, capacity=capacity, policy=policy)
            writer(client, "full", reader="")(map(kvbank.NewChunk, found))
        multiply(folder / "store/metadata.db", chunks // _WRITTEN)
        with serving(folder) as process, kvbank.connect(process.address) as client:
            bench.say("make the index")
            _settle(client, found, chunks)
            bench.say("evict, with a reader and a writer at work")
            yield from _pauses(client, process.address, found, chunks, folder)
            bench.say("evict, alone")
            yield _cost(client, found, chunks, folder)
    finally:
        bench.clear(folder)


def _settle(client: kvbank.Client, found: material.Vectors, chunks: int) -> None:
    """Wait until the bank is searched by the kind of index that fits its size, at most 120 s. Lists are trained
    first."""
    kind = "ivf" if chunks >= _LARGE else "exact"
    begin = time.perf_counter()
    while True:
        client.retrieve("full", found[0], payload=False, count=False, embedder_digest=EMBEDDER)
        if client.stats(["full"]).banks[0].index.kind == kind or time.perf_counter() - begin > _PATIENCE_S:
            return
        time.sleep(0.5)


def _pauses(
    client: kvbank.Client, address: str, found: material.Vectors, chunks: int, folder: Path
) -> Iterator[Result]:
    """Measure the longest call of a reader of the full bank, and of a writer to another bank, before and during the
    eviction."""
    with ExitStack() as stack:
        callers = {
            who: stack.enter_context(Worker(__name__, address, who, log=folder / f"{who}.log"))
            for who in ("reader", "writer")
        }
        longest: list[dict[str, float]] = []
        for happens in (lambda: time.sleep(_BASELINE_S), lambda: _evict(client, found, chunks)):
            for caller in callers.values():
                caller.call("longest")
            happens()
            longest.append({who: 1000 * caller.call("longest") for who, caller in callers.items()})
    for who in callers:
        title = f"longest call of a {who} while a bank of {chunks:,} is cut by a quarter"
        about, (rest, during) = "the longest call without eviction", (figures[who] for figures in longest)
        targets = (Target("ours", 50.0),)
        yield Result(ROW, title, during, about, "floor", rest, "ms", 1, os.getloadavg()[0], targets)


def _call(address: str, who: str) -> None:
    """Read (`who` is "reader") or write ("writer") with pauses of 5 ms until stdin closes; answer `longest` with the
    longest call since it was last asked, in seconds."""
    found, longest = material.vectors(_WRITTEN, _DIMENSION), [0.0]
    one_call, ended = threading.Lock(), threading.Event()
    with kvbank.connect(address) as client:
        write = writer(client, "other", reader="")

        def call(number: int) -> None:
            vector = found[number % _WRITTEN]
            if who == "writer":
                write([kvbank.NewChunk(vector)])
            else:
                client.retrieve("full", vector, payload=False, count=False, embedder_digest=EMBEDDER)

        def again() -> None:
            for number in count():
                with one_call:
                    begin = time.perf_counter()
                    call(number)
                    longest[0] = max(longest[0], time.perf_counter() - begin)
                if ended.wait(_EVERY_S):
                    return

        def since_last() -> float:
            with one_call:  # wait for the call under way, so that it counts
                seconds, longest[0] = longest[0], 0.0
            return seconds

        thread = threading.Thread(target=again)
        call(0)
        thread.start()
        serve({"longest": since_last})
        ended.set()
        thread.join()


def _evict(client: kvbank.Client, found: material.Vectors, capacity: int) -> tuple[float, int]:
    """Write one chunk too many; return the seconds until the bank is at its target, and how many chunks were evicted.

    Errors: RuntimeError when the bank does not come down to its target.
    """
    before = client.get_bank("full").usage.chunks_evicted
    begin = time.perf_counter()
    writer(client, "full", reader="")([kvbank.NewChunk(found[0])])
    # Chunks that are written while the last batch is evicted stay above the target.
    while (usage := client.get_bank("full").usage).chunks > 1.001 * capacity * _TARGET / 100 + 1:
        if time.perf_counter() - begin > _PATIENCE_S:
            raise RuntimeError(f"the eviction stopped at {usage.chunks} chunks")
        time.sleep(0.01)
    return time.perf_counter() - begin, usage.chunks_evicted - before


def _cost(client: kvbank.Client, found: material.Vectors, chunks: int, folder: Path) -> Result:
    now = client.get_bank("full").usage.chunks
    client.update_bank("full", capacity=kvbank.Capacity(chunks=now))
    seconds, victims = _evict(client, found, now)
    title = f"eviction of {victims:,} out of {now:,} chunks, per victim"
    floor = 1e6 * _delete(folder / "floor.db", now, victims) / victims
    about = f"SQLite, delete by key in transactions of {_BATCH}"
    mine = 1e6 * seconds / victims
    return Result(ROW, title, mine, about, "floor", floor, "us", 1, os.getloadavg()[0], (Target("ours", 50.0),))


def _delete(path: Path, rows: int, victims: int) -> float:
    """Return the seconds that SQLite takes to delete the first rows of a table with rows of 200 bytes, each batch of
    them durable. rows: rows of the table. victims: rows to delete."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("CREATE TABLE records (id INTEGER PRIMARY KEY, content)")
        with database:
            database.executemany("INSERT INTO records VALUES (?, ?)", ((row, bytes(200)) for row in range(rows)))
        begin = time.perf_counter()
        for first in range(0, victims, _BATCH):
            with database:
                numbers = [(row,) for row in range(first, min(first + _BATCH, victims))]
                database.executemany("DELETE FROM records WHERE id = ?", numbers)
        return time.perf_counter() - begin


if __name__ == "__main__":
    _call(*sys.argv[1:])
