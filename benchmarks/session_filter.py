"""The row `session_filter` of the benchmarks: what it costs to search only the chunks of one session in its bank.

One bank has the chunks of one session alone; the other one those of a session and of its fork, half each. What is
timed is a call of the SDK that asks for no K-V, with the filter of the session, and with a filter on metadata that lets
as many chunks pass. The floor is the same call without a filter.
"""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import numpy as np

import kvbank
from benchmarks import material
from benchmarks.bench import Bench
from benchmarks.filling import multiply
from benchmarks.pair import Contender, Result, Target, compare, timed
from benchmarks.service import EMBEDDER, EMBEDDING, connected, writer

ROW = "session_filter"
_BANKS, _WRITTEN, _TOP_K = ("alone", "shared"), 500, 10


def run(bench: Bench) -> Iterator[Result]:
    """Measure the time of a search in milliseconds, in banks of 5,000 and of 20,000 chunks."""
    for chunks in (5_000,) if bench.quick else (5_000, 20_000):
        folder = bench.scratch(ROW)
        try:
            yield from _among(bench, folder, chunks)
        finally:
            bench.clear(folder)


def _among(bench: Bench, folder: Path, chunks: int) -> Iterator[Result]:
    bench.say(f"fill two banks with {chunks:,} vectors each")
    found = material.vectors(chunks)
    with connected(folder) as client:
        sessions = {bank: _fill(client, bank, found) for bank in _BANKS}
    multiply(folder / "store/metadata.db", chunks // _WRITTEN, np.concatenate([found, found]))
    queries = material.near(found, 256)
    with connected(folder) as client:
        for bank in _BANKS:
            bench.say(f"search among {chunks:,}, {bank}")
            contenders = [
                _contender("by session", "ours", client, bank, client.sessions.get(sessions[bank]).filter, queries),
                _contender("by metadata", "ours", client, bank, kvbank.Filter(metadata={"half": 0}), queries),
                _contender("no filter", "floor", client, bank, None, queries),
            ]
            title = f"search among {chunks:,}, top {_TOP_K}, of a session whose bank is {bank}"
            yield from compare(ROW, title, contenders, bench.n(100))


def _fill(client: kvbank.Client, bank: str, found: material.Vectors) -> str:
    """Write chunks of a session, in a shared bank those of its fork between them; return the id of the session."""
    client.create_bank(bank, kv=None, embedding=EMBEDDING)
    session = client.sessions.create(bank=bank)
    fork = client.sessions.fork(session.session_id) if bank == "shared" else session
    branches = [each.stretches[-1].branch for each in (session, fork)]
    chunks = (
        kvbank.NewChunk(
            vector,
            start=number,
            metadata={"branch": branches[number % 2], "half": number % 2 if fork is not session else 0, "turn": number},
        )
        for number, vector in enumerate(found[:_WRITTEN])
    )
    writer(client, bank, reader="")(chunks)
    return session.session_id


def _contender(
    name: str, role: str, client: kvbank.Client, bank: str, filter_: kvbank.Filter | None, queries: material.Vectors
) -> Contender:
    each, options = cycle(queries), {"payload": False, "count": False, "embedder_digest": EMBEDDER}
    search = timed(lambda: client.retrieve(bank, next(each), top_k=_TOP_K, filter=filter_, **options))
    targets = (Target("ratio", 1.2),) if role == "floor" else ()
    return Contender(name, role, search, targets, judged=name == "by session")
