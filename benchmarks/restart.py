"""The row `restart` of the benchmarks: a service with a bank of 100,000 chunks is started again. It loads the snapshots
of the index, or, where they are gone, makes the index from the records."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import kvbank
from benchmarks import material
from benchmarks.bench import Bench
from benchmarks.pair import Result, Target
from benchmarks.service import EMBEDDER, EMBEDDING, connected, serving, writer

ROW = "restart"


def run(bench: Bench) -> Iterator[Result]:
    """Time two spans, in milliseconds: "index ready", from when the service takes calls to its first answer; and "whole
    start", from the start of the process to that answer."""
    chunks, rounds = (20_000, 3) if bench.quick else (100_000, 7)
    folder = bench.scratch(ROW)
    try:
        found = material.vectors(chunks)
        with connected(folder) as client:
            bench.say(f"write {chunks:,} chunks")
            client.create_bank("records", kv=None, embedding=EMBEDDING)
            writer(client, "records", reader="")(map(kvbank.NewChunk, found))
        snapshots = folder / "store/indexes"
        times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for _ in range(rounds):
            for with_snapshot in (True, False):
                bench.say("start with snapshot" if with_snapshot else "start without")
                if not with_snapshot:
                    shutil.rmtree(snapshots, ignore_errors=True)
                times[with_snapshot].append(_start(folder, found[7]))
        load = os.getloadavg()[0]
        for place, title, limit in ((0, "index ready after a restart", 1 / 5), (1, "whole start", 1 / 2)):
            mine, theirs = (1000 * median(pair[place] for pair in times[which]) for which in (True, False))
            name, targets = f"{title}, {chunks:,} chunks", (Target("ratio", limit),)
            yield Result(ROW, name, mine, "rebuilt from the records", "floor", theirs, "ms", rounds, load, targets)
    finally:
        bench.clear(folder)


def _start(folder: Path, query: material.Vectors) -> tuple[float, float]:
    """Start and stop the service; return the seconds to its first answer, from when it takes calls and from the start
    of the process. The stop takes a snapshot of the index."""
    begin = time.perf_counter()
    with serving(folder) as process:
        ready = time.perf_counter()
        with kvbank.connect(process.address) as client:
            client.retrieve("records", query, payload=False, embedder_digest=EMBEDDER)
            answered = time.perf_counter()
    return answered - ready, answered - begin
