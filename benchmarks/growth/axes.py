"""The axes of growth: what becomes larger, through which sizes, and how a size is measured."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import kvbank
from benchmarks import material
from benchmarks.bench import Bench
from benchmarks.filling import multiply
from benchmarks.growth.measuring import CHUNKS, Figures, calls, fill, kept, timed
from benchmarks.lines import Worker
from benchmarks.service import EMBEDDER, connected, processor_time, serving

_BANK = "chunks"
# Chunks from which a bank is searched by lists, and the seconds that these may take to be made.
_LISTS_FROM, _PATIENCE_S = 200_000, 1800.0
# Where the number of banks grows: chunks of a bank, and tokens of a chunk.
_SMALL, _TOKEN = 10, 1
# How long callers call at a point, and how long one of the workers computes between two calls, in seconds.
_SPAN_S, _PAUSE_S = 5.0, 0.05

Measure = Callable[[Bench, Path, int], Figures]


@dataclass(frozen=True)
class Axis:
    """One thing that becomes larger, through these sizes.

    about: its name as a heading of a column. measure: measures a size, in a folder of its own.
    """

    about: str
    sizes: Sequence[int]
    measure: Measure


def _chunks(bench: Bench, folder: Path, size: int) -> Figures:
    """Measure a bank of so many chunks. All but the first thousand have no file of K-V, and no call asks for it."""
    found = material.vectors(size)
    with connected(folder) as client:
        fill(client, _BANK, found[:CHUNKS])
    if size > CHUNKS:
        multiply(folder / "store/metadata.db", size // CHUNKS, found)
    found = found[:CHUNKS].copy()
    with connected(folder) as client:
        bench.say(f"make the index of {size:,} chunks")
        _wait_for_index(client, found[0], "ivf" if size >= _LISTS_FROM else "exact")
        bench.say(f"call among {size:,} chunks")
        return timed(folder, calls(client, [_BANK], found), bench.n(200)) | kept(folder)


def _wait_for_index(client: kvbank.Client, query: material.Vectors, kind: str) -> None:
    """Wait until the bank is searched by its kind of index. Errors: RuntimeError when it is not in time."""
    begin = time.perf_counter()
    while True:
        client.retrieve(_BANK, query, payload=False, count=False, embedder_digest=EMBEDDER, timeout=_PATIENCE_S)
        if client.stats([_BANK]).banks[0].index.kind == kind:
            return
        if time.perf_counter() - begin > _PATIENCE_S:
            raise RuntimeError(f"no {kind} index after {_PATIENCE_S:g} s")
        time.sleep(0.5)


def _payload(bench: Bench, folder: Path, size: int) -> Figures:
    """Measure chunks with so many tokens of K-V, 4 KiB each."""
    found = material.vectors(64)
    with connected(folder) as client:
        fill(client, _BANK, found, size)
        bench.say(f"call for K-V of {size:,} tokens")
        return timed(folder, calls(client, [_BANK], found, size), bench.n(200 if size < 1024 else 40)) | kept(folder)


def _banks(bench: Bench, folder: Path, size: int) -> Figures:
    """Measure so many small banks, which are asked in turn; the first search of a bank loads its index."""
    found = material.vectors(_SMALL)
    names = [f"{number:05}" for number in range(size)]
    with connected(folder) as client:
        for name in names:
            fill(client, name, found, _TOKEN)
    with connected(folder) as client:
        bench.say(f"call for {size:,} banks")
        first = []
        for name in names:
            begin = time.perf_counter()
            client.retrieve(name, found[0], payload=False, embedder_digest=EMBEDDER)
            first.append(time.perf_counter() - begin)
        made = calls(client, names, found, _TOKEN)
        return {"first search, ms": 1000 * float(np.median(first))} | timed(folder, made, bench.n(200)) | kept(folder)


def _connections(bench: Bench, folder: Path, size: int) -> Figures:
    """Measure calls of one client while others are connected, and ask for nothing."""
    found = material.vectors(CHUNKS)
    with serving(folder) as process, ExitStack() as stack:
        own = [("grpc.use_local_subchannel_pool", 1)]  # else those of a process share a connection
        connect = partial(kvbank.connect, process.address, options=own)
        client, *others = [stack.enter_context(connect()) for _ in range(size)]
        fill(client, _BANK, found)
        for other in others:
            other.server_info()
        bench.say(f"call beside {size:,} connections")
        return timed(folder, calls(client, [_BANK], found), bench.n(200)) | kept(folder)


def _callers(pause: float, bench: Bench, folder: Path, size: int) -> Figures:
    """Measure so many processes that retrieve at the same time. pause: seconds between two calls of one."""
    with serving(folder) as process, ExitStack() as stack:
        with kvbank.connect(process.address) as client:
            fill(client, _BANK, material.vectors(CHUNKS))
        logs = [folder / f"caller-{number}.log" for number in range(size)]
        started = [
            stack.enter_context(Worker("benchmarks.growth.caller", process.address, _BANK, log=log)) for log in logs
        ]
        bench.say(f"{size} callers")
        _run(started, 0.5, pause)
        used, begin = processor_time(folder), time.perf_counter()
        ended = _run(started, _SPAN_S, pause)
        span, used = time.perf_counter() - begin, processor_time(folder) - used
        times = np.concatenate([taken for _, taken in ended])
        return {
            "calls/s": len(times) / span,
            "p50, ms": 1000 * float(np.percentile(times, 50)),
            "p99, ms": 1000 * float(np.percentile(times, 99)),
            "service, processor ms": 1000 * used / len(times),
            "caller, processor ms": 1000 * sum(own for own, _ in ended) / len(times),
            **kept(folder),
        }


def _run(callers: Sequence[Worker], seconds: float, pause: float) -> list[tuple[float, list[float]]]:
    for caller in callers:
        caller.begin("run", seconds, pause)
    return [caller.value() for caller in callers]


AXES = {
    "chunks": Axis("chunks of the bank", (1_000, 10_000, 100_000, 1_000_000), _chunks),
    "payload": Axis("tokens of a chunk's K-V, 4 KiB each", (1, 16, 256, 4096), _payload),
    "banks": Axis("banks", (1, 10, 100, 1_000, 10_000), _banks),
    "connections": Axis("connections", (1, 10, 100, 900), _connections),
    "clients": Axis("processes that call without a pause", (1, 2, 4, 8, 16), partial(_callers, 0.0)),
    "workers": Axis("processes that compute 50 ms between two calls", (1, 2, 4, 8, 16), partial(_callers, _PAUSE_S)),
}
