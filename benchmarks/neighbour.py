"""The row `neighbour` of the benchmarks: a quiet tenant alone, and beside one that writes, or asks for its bank, at up
to ten times its quota from eight connections."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path

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
# Answers after which the noisy tenant has used up the calls that it had saved, which are as many as it may make a
# second, and those that it gains meanwhile. A write costs two, a stream and a chunk.
_SETTLED = {"GetBank": _QUOTA * 3 // 2, "WriteChunks": _QUOTA * 3 // 4}
# The aim for the slowest calls of the quiet tenant, beside the noisy one against alone.
_MORE = 1.5


def run(bench: Bench) -> Iterator[Result]:
    """Time the searches and writes of the quiet tenant: a round of them beside the noisy one, a round of them alone,
    and a round beside the same noise at another service on this machine, which says what the quiet tenant feels of the
    processors and the disk."""
    folder = bench.scratch(ROW)
    with ExitStack() as stack:
        stack.callback(bench.clear, folder)
        (address, keys), (other, others) = (_service(stack, folder / name) for name in ("ours", "other"))
        quiet = stack.enter_context(kvbank.connect(address, api_key=keys["quiet"]))
        noise, elsewhere = (
            _noise(bench, stack, *where) for where in ((address, keys["noisy"]), (other, others["noisy"]))
        )
        for what, call in _calls(quiet).items():
            for method, does in (("WriteChunks", "writes"), ("GetBank", "asks")):
                bench.say(f"{what} beside one that {does}")
                contenders = [
                    Contender("ours", "ours", partial(_beside, call, method, noise)),
                    Contender("alone", "floor", partial(_alone, call), (Target("ratio", _MORE),)),
                    Contender("beside the same at another service", "floor", partial(_beside, call, method, elsewhere)),
                ]
                yield from compare(ROW, f"p99 of {what} beside a tenant that {does}", contenders, bench.n(20))


def _service(stack: ExitStack, folder: Path) -> tuple[str, dict[str, str]]:
    """Run a service with both tenants, and return its address and their keys."""
    folder.mkdir()
    address = stack.enter_context(serving(folder)).address
    return address, _tenants(address)


def _noise(bench: Bench, stack: ExitStack, address: str, key: str) -> Worker:
    arguments = (address, key, str(_QUOTA * _TIMES), str(_CONNECTIONS))
    return stack.enter_context(Worker("benchmarks.noisy", *arguments, log=bench.folder / "noisy.log"))


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


def _alone(call: Callable[[], object]) -> float:
    """Make the calls of a round, one after the other, and return the 99th percentile of their seconds."""
    taken = []
    for _ in range(_CALLS):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return float(np.percentile(taken, 99))


def _beside(call: Callable[[], object], method: str, noise: Worker) -> float:
    """Do as `_alone` while the noisy tenant calls this method, and has used up the calls that it had saved."""
    noise.call("begin", method, _SETTLED[method])
    try:
        return _alone(call)
    finally:
        noise.call("end")
