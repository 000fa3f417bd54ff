"""The row `neighbour` of the benchmarks: a quiet tenant alone, and beside one that writes at ten times its quota from
eight connections."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import cycle

import numpy as np

import kvbank
from benchmarks import material, noisy
from benchmarks.bench import Bench
from benchmarks.lines import Worker
from benchmarks.pair import Contender, Result, Target, compare
from benchmarks.service import EMBEDDER, EMBEDDING, serving

ROW = "neighbour"
# Calls a second that the noisy tenant may make, and those that it makes; calls of the quiet one in a round.
_QUOTA, _TIMES, _CONNECTIONS, _CALLS = 100, 10, 8, 100
_CHUNKS = 1000
# The aim for the slowest calls of the quiet tenant, beside the noisy one against alone.
_MORE = 1.5


def run(bench: Bench) -> Iterator[Result]:
    """Time the searches and writes of the quiet tenant, a round of them alone and a round beside the noisy one."""
    folder = bench.scratch(ROW)
    with ExitStack() as stack:
        stack.callback(bench.clear, folder)
        address = stack.enter_context(serving(folder)).address
        keys = _tenants(address)
        quiet = stack.enter_context(kvbank.connect(address, api_key=keys["quiet"]))
        arguments = (address, keys["noisy"], str(_QUOTA * _TIMES), str(_CONNECTIONS))
        noise = stack.enter_context(Worker("benchmarks.noisy", *arguments, log=bench.folder / "noisy.log"))
        for what, call in _calls(quiet).items():
            for name, percent in (("p50", 50), ("p99", 99)):
                bench.say(f"{what}, {name}")
                targets = (Target("ratio", _MORE),) if percent == 99 else ()
                contenders = [
                    Contender("ours", "ours", lambda c=call, p=percent: _beside(noise, c, p)),  # type: ignore[misc]
                    Contender("alone", "floor", lambda c=call, p=percent: _alone(c, p), targets),  # type: ignore[misc]
                ]
                yield from compare(ROW, f"{name} of {what} beside a noisy tenant", contenders, bench.n(20))
        bench.say(f"the noisy tenant's writes: {noise.call('end')}")


def _tenants(address: str) -> dict[str, str]:
    """Make both tenants, each with a bank of its name, and return their keys."""
    with kvbank.connect(address) as owner:
        operator = owner.access.create_key("operator").secret
    keys = {}
    with kvbank.connect(address, api_key=operator) as client:
        for name, calls in ((noisy.BANK, _QUOTA), ("quiet", None)):
            client.access.create_tenant(name, quota=kvbank.TenantQuota(calls=calls))
            keys[name] = client.access.create_key("admin", tenant=name).secret
    for name, key in keys.items():
        with kvbank.connect(address, api_key=key) as client:
            client.create_bank(name, kv=None, embedding=EMBEDDING)
    return keys


def _calls(client: kvbank.Client) -> dict[str, Callable[[], object]]:
    """Fill the bank of the quiet tenant, and return the calls that are timed."""
    digests, found = {"reader_digest": "", "embedder_digest": EMBEDDER}, material.vectors(_CHUNKS)
    client.write_many("quiet", (kvbank.NewChunk(vector) for vector in found), **digests)
    queries, vectors = cycle(material.near(found, 256)), cycle(found)
    return {
        "retrieve": lambda: client.retrieve("quiet", next(queries), top_k=8, **digests),
        "write": lambda: client.write("quiet", kvbank.NewChunk(next(vectors)), **digests),
    }


def _alone(call: Callable[[], object], percent: float) -> float:
    """Make the calls of a round, one after the other, and return a percentile of their seconds."""
    taken = []
    for _ in range(_CALLS):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return float(np.percentile(taken, percent))


def _beside(noise: Worker, call: Callable[[], object], percent: float) -> float:
    """Do as `_alone` while the noisy tenant writes."""
    noise.call("begin")
    try:
        return _alone(call, percent)
    finally:
        noise.call("end")
