"""Where the time of a call goes: `python -m benchmarks.hot_paths` shows, for each kind of call over TCP and over a unix
socket, how long it takes and how much processor time the client and each kind of the service's threads use for it.

Processor time says more than wall time on a machine on which other work runs. With `--functions` the threads are
profiled too; that makes all of them slower, so that its figures compare functions and not calls.
"""

import cProfile
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import kvbank
from benchmarks import material
from benchmarks.hot_paths_server import Function, functions_of
from benchmarks.lines import Worker
from benchmarks.service import EMBEDDER, EMBEDDING, READER, spec, writer

_WAYS = ("tcp", "unix")
_CALLS = (
    "get_bank",
    "search",
    "retrieve 1 MiB",
    "retrieve 8 MiB",
    "fetch 1 MiB",
    "fetch 8 MiB",
    "write a vector",
    "write 1 MiB",
)
_WITH_KV = 64
_WARM = 5
# Kinds of threads that take less of a call are left out, in milliseconds.
_LEAST_MS = 0.01
# What threads wait in. Each thread has such a call open where its profile ends, in the time of another thread.
_WAITS = ("'select.epoll' objects>", "'_queue.SimpleQueue' objects>")
_COLUMNS = ("median", "client", "service", "processor time of the service by thread")
Call = Callable[[], object]


def main(
    over: Annotated[
        list[str] | None, typer.Option(metavar="WAY", help=f"Go this way only: {' or '.join(_WAYS)}.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="CALL", help=f"Make this call only; may be repeated. One of: {', '.join(_CALLS)}."),
    ] = None,
    vectors: Annotated[int, typer.Option(min=100, help="Chunks without K-V that are searched.")] = 20_000,
    rounds: Annotated[int, typer.Option(min=1, help="How often each call is made.")] = 200,
    functions: Annotated[int, typer.Option(min=0, help="Profile, and show so many functions of each side.")] = 0,
) -> None:
    """Show where the time of calls goes."""
    if unknown := {*(over or ()), *(only or ())} - {*_WAYS, *_CALLS}:
        raise typer.BadParameter(f"no such way or call: {', '.join(sorted(unknown))}")
    console, folder = Console(width=180), Path("build").absolute()
    folder.mkdir(exist_ok=True)
    # Not in /tmp, which may be memory: writes are synced.
    with tempfile.TemporaryDirectory(prefix="hot-paths-", dir=folder) as scratch:
        ids = _fill(Path(scratch), vectors)
        for way in over or _WAYS:
            with ExitStack() as stack:
                service, client = _served(stack, Path(scratch), way, profiled=bool(functions))
                made = _calls(client, ids, material.vectors(vectors))
                table = Table("call", *_COLUMNS, title=f"over {way}, milliseconds a call", title_justify="left")
                for name in only or _CALLS:
                    row, found = _measured(made[name], service, rounds, functions)
                    table.add_row(name, *row)
                    if found:
                        console.print(_ranked(f"{name} over {way}", found, rounds, functions))
                console.print(table)
    console.print(f"load average {os.getloadavg()[0]:.1f}")


def _served(stack: ExitStack, folder: Path, way: str, *, profiled: bool = False) -> tuple[Worker, kvbank.Client]:
    """Start a service on a folder, and connect to it. way: "tcp" or "unix", where it shares its files too."""
    unix = way == "unix"
    listen = f"unix:{stack.enter_context(tempfile.TemporaryDirectory())}/socket" if unix else "127.0.0.1:0"
    settings = json.dumps({"data": str(folder / "store"), "listen": listen, "same_host": unix})
    module, log = "benchmarks.hot_paths_server", folder / "service.log"
    service = stack.enter_context(Worker(module, settings, "profiled" if profiled else "", log=log))
    return service, stack.enter_context(kvbank.connect(service.call("address")))


def _fill(folder: Path, vectors: int) -> list[int]:
    """Make a bank of vectors and one of chunks with 1 MiB of K-V each; return the ids of the latter."""
    with ExitStack() as stack:
        _, client = _served(stack, folder, "tcp")
        found = material.vectors(vectors)
        client.create_bank("vectors", kv=None, embedding=EMBEDDING)
        writer(client, "vectors", reader="")(map(kvbank.NewChunk, found))
        for bank in ("chunks", "written"):
            client.create_bank(bank, kv=spec(1), embedding=EMBEDDING)
        chunks = (kvbank.NewChunk(found[i], material.tensors(1, seed=i)) for i in range(_WITH_KV))
        return [written.chunk_id for written in writer(client, "chunks")(chunks)]


def _calls(client: kvbank.Client, ids: list[int], found: material.Vectors) -> dict[str, Call]:
    """Return what is called, by name. ids: of chunks with K-V. found: the vectors [n, d] that are searched, of which
    the first have K-V in another bank."""
    near, near_kv = (cycle(material.near(some, 256)) for some in (found, found[:_WITH_KV]))
    tensors = material.tensors(1)

    def search() -> None:
        client.retrieve("vectors", next(near), payload=False, embedder_digest=EMBEDDER)

    def retrieve(top_k: int) -> None:
        client.retrieve("chunks", next(near_kv), top_k=top_k, reader_digest=READER, embedder_digest=EMBEDDER)

    def fetch(count: int) -> None:
        client.fetch("chunks", ids[:count], reader_digest=READER)

    def write(held: dict[str, Any] | None) -> None:
        bank, reader = ("written", READER) if held else ("vectors", "")
        client.write(bank, kvbank.NewChunk(next(near), held), reader_digest=reader, embedder_digest=EMBEDDER)

    calls: list[Call] = [partial(client.get_bank, "vectors"), search]
    calls += [partial(retrieve, 1), partial(retrieve, 8), partial(fetch, 1), partial(fetch, 8)]
    calls += [partial(write, None), partial(write, tensors)]
    return dict(zip(_CALLS, calls, strict=True))


def _measured(call: Call, service: Worker, rounds: int, functions: int) -> tuple[list[str], list[Function]]:
    """Make a call some rounds. Return its row of figures, in milliseconds a call, and where it is profiled its
    functions."""
    for _ in range(_WARM):
        call()
    profile = None
    if functions:
        service.call("forget")
        profile = cProfile.Profile(time.thread_time)
    before, own, times = service.call("seconds"), time.process_time(), []
    for _ in range(rounds):
        begin = time.perf_counter()
        profile.runcall(call) if profile else call()
        times.append(time.perf_counter() - begin)
    own, after = time.process_time() - own, service.call("seconds")
    used = {kind: 1000 * (after[kind] - before.get(kind, 0)) / rounds for kind in after}
    parts = [f"{kind} {some:.2f}" for kind, some in sorted(used.items(), key=_by_time) if some >= _LEAST_MS]
    row = [f"{some:.2f}" for some in (1000 * median(times), 1000 * own / rounds, sum(used.values()))]
    found = [*functions_of("client", profile), *service.call("functions")] if profile else []
    return [*row, ", ".join(parts)], found


def _by_time(item: tuple[Any, float]) -> float:
    return -item[1]


def _ranked(title: str, found: list[Function], rounds: int, most: int) -> Table:
    """Return the functions of each kind of thread in which most time is spent, without that of those they call."""
    own: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    for kind, function, count, seconds in found:
        own[kind, function] += 1000 * seconds / rounds
        calls[kind, function] += count
    table = Table("thread", "function", "calls", "ms", title=title, title_justify="left")
    for kind in dict.fromkeys(kind for kind, _ in own):
        ranked = ((key, some) for key, some in own.most_common() if key[0] == kind and some >= _LEAST_MS)
        mine = [(key, some) for key, some in ranked if not key[1].endswith(_WAITS)]
        for key, some in mine[:most]:
            table.add_row(*key, f"{calls[key] / rounds:.1f}", f"{some:.3f}")
    return table


if __name__ == "__main__":
    typer.run(main)
