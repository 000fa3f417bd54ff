"""The rows `retrieve_same_host` and `retrieve_network`: one call searches among 20,000 chunks and returns the K-V of
the eight nearest, 1 MiB each.

Queries aim at clusters whose chunks have K-V of 1 MiB. All other chunks are searched as well, but have K-V of one
token, so that the bank does not fill the disk.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count, cycle
from pathlib import Path

import faiss
import numpy as np

import kvbank
from benchmarks import material
from benchmarks.bench import Bench
from benchmarks.floors import bare_grpc
from benchmarks.lines import Worker
from benchmarks.pair import Contender, Result, Target, compare, timed
from benchmarks.plain_socket import plain_socket
from benchmarks.service import EMBEDDER, EMBEDDING, READER, connected, serving, spec, writer

SAME_HOST, NETWORK = "retrieve_same_host", "retrieve_network"
_TOP_K, _WITH_KV = 8, 5


def run(bench: Bench) -> Iterator[Result]:
    """Measure those of the two rows that are wanted, over one data folder."""
    chunks = 5_000 if bench.quick else 20_000
    folder = bench.scratch("retrieve")
    try:
        bench.say(f"write {chunks} chunks")
        found = material.vectors(chunks)
        with serving(folder, same_host=True) as process:
            with kvbank.connect(process.address) as client:
                _fill(client, found)
            if SAME_HOST in bench.rows:
                yield from _same_host(bench, folder, process.address, found)
        if NETWORK in bench.rows:
            yield from _network(bench, folder, found)
    finally:
        bench.clear(folder)


def _network(bench: Bench, folder: Path, found: material.Vectors) -> Iterator[Result]:
    search, _ = _floors(found)
    with ExitStack() as stack:
        client, rpc = stack.enter_context(connected(folder)), stack.enter_context(bare_grpc(folder))
        receiver = stack.enter_context(plain_socket(folder))

        def search_and_receive() -> None:
            search()
            receiver.receive(_TOP_K)

        contenders = [
            Contender("ours", "ours", timed(_retrieving(client, found))),
            Contender(
                "FAISS flat, then 8 MiB over a plain socket, hashed",
                "floor",
                timed(search_and_receive),
                (Target("ratio", 1.25),),
            ),
            Contender("bare gRPC stream of 8 MiB", "floor", timed(lambda: rpc.stream(_TOP_K))),
            *_redis(bench, stack, NETWORK, folder, found, 0.9),
        ]
        bench.say("retrieve over the network path")
        title = f"retrieve 8 x 1 MiB among {len(found):,}, loopback TCP, verified"
        yield from compare(NETWORK, title, contenders, bench.n(100))


def _same_host(bench: Bench, folder: Path, address: str, found: material.Vectors) -> Iterator[Result]:
    search, search_and_copy = _floors(found)
    stack = ExitStack()
    client, mapping = (stack.enter_context(kvbank.connect(address, mapped=mapped)) for mapped in (False, True))
    contenders = [
        Contender("ours", "ours", timed(_retrieving(client, found))),
        Contender("mapped", "ours", timed(_retrieving(mapping, found))),
        Contender("FAISS flat, in process", "floor", timed(search), (Target("difference", 1.0),)),
        Contender("FAISS flat, and memcpy of 8 MiB", "floor", timed(search_and_copy)),
    ]
    with stack:
        contenders += _redis(bench, stack, SAME_HOST, folder, found, 0.6)
        bench.say("retrieve on the same host")
        title = f"retrieve 8 x 1 MiB among {len(found):,}, same host, verified"
        yield from compare(SAME_HOST, title, contenders, bench.n(100))


def _redis(
    bench: Bench, stack: ExitStack, row: str, folder: Path, found: material.Vectors, most: float
) -> list[Contender]:
    """Return the peer of a row, none where it cannot run. most: of its time, what ours may take."""
    bench.say("fill Redis")
    arguments = (len(found), _WITH_KV, material.MIB, int(row == NETWORK))
    pair = bench.peer(stack, row, "faiss_redis", str(folder), *map(str, arguments), needs="redis-server")
    title = "FAISS flat, then Redis MGET" + (" over TCP" if row == NETWORK else "")
    return [Contender(title, "peer", partial(_asking, pair, count()), (Target("ratio", most),))] if pair else []


def _asking(worker: Worker, turn: Iterator[int]) -> float:
    return worker.time("retrieve", next(turn))


def with_kv(chunks: int) -> list[int]:
    """Return the numbers of the vectors whose chunks have K-V of 1 MiB: those of the first clusters."""
    clusters = chunks // material.CLUSTER
    return [number for number in range(chunks) if number % clusters < _WITH_KV]


def _fill(client: kvbank.Client, found: material.Vectors) -> None:
    large = set(with_kv(len(found)))
    token = material.tensors(1, tokens=1)

    def chunks() -> Iterator[kvbank.NewChunk]:
        for number, vector in enumerate(found):
            yield kvbank.NewChunk(vector, material.tensors(1, seed=number) if number in large else token)

    client.create_bank("chunks", kv=spec(1), embedding=EMBEDDING)
    writer(client, "chunks")(chunks())


def _retrieving(client: kvbank.Client, found: material.Vectors) -> Callable[[], None]:
    queries = cycle(material.near(found[with_kv(len(found))], 256))

    def retrieve() -> None:
        answer = client.retrieve("chunks", next(queries), top_k=_TOP_K, reader_digest=READER, embedder_digest=EMBEDDER)
        assert sum(_size(chunk) for chunk in answer.chunks.values()) > _TOP_K * material.MIB

    return retrieve


def _size(chunk: kvbank.Chunk) -> int:
    assert chunk.tensors is not None
    return sum(tensor.nbytes for tensor in chunk.tensors.values())


def _floors(found: material.Vectors) -> tuple[Callable[[], None], Callable[[], None]]:
    faiss.omp_set_num_threads(1)  # with two on two busy cores it takes about four times as long
    index = faiss.IndexFlatIP(material.DIMENSION)
    index.add(found)
    queries = cycle(material.near(found[with_kv(len(found))], 256))
    parts = cycle(np.random.default_rng(0).integers(256, size=(8, _TOP_K * material.MIB), dtype=np.uint8))
    target = np.empty(_TOP_K * material.MIB, np.uint8)

    def search() -> None:
        index.search(next(queries)[None], _TOP_K)

    def search_and_copy() -> None:
        search()
        np.copyto(target, next(parts))

    return search, search_and_copy
