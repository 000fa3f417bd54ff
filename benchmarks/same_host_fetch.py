"""The row `same_host_fetch` of the benchmarks: one call gets a chunk of 4 MiB by its id, on the same host, with
checksums verified."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count, cycle
from pathlib import Path

import xxhash

import kvbank
from benchmarks import material
from benchmarks.bench import Bench
from benchmarks.floors import Rpc, bare_grpc
from benchmarks.lines import Worker
from benchmarks.pair import Contender, Result, Target, compare, timed
from benchmarks.service import EMBEDDING, READER, serving, spec, writer

ROW = "same_host_fetch"
_CHUNKS, _MIB = 16, 4
_SIZE = _MIB * material.MIB


def run(bench: Bench) -> Iterator[Result]:
    """Time fetches in which every contender goes round 16 chunks that are in memory or in the page cache."""
    folder = bench.scratch(ROW)
    with ExitStack() as stack:
        stack.callback(bench.clear, folder)
        address = stack.enter_context(serving(folder, same_host=True)).address
        client, mapping = (stack.enter_context(kvbank.connect(address, mapped=mapped)) for mapped in (False, True))
        rpc = stack.enter_context(bare_grpc(folder, unix=True))
        contenders = [
            Contender("1,024 tokens of a layer", "ours", timed(_fetching(client, client, 1)), (Target("ours", 0.6),)),
            Contender("256 tokens of 4 layers", "ours", timed(_fetching(client, client, 4)), (Target("ours", 0.6),)),
            Contender(
                "1,024 tokens of a layer, mapped", "ours", timed(_fetching(client, mapping, 1)), (Target("ours", 0.6),)
            ),
            Contender("a unary RPC, then the file read and hashed", "floor", timed(_reading(rpc, folder))),
            Contender("bare gRPC stream of 4 MiB", "floor", timed(lambda: rpc.stream(_MIB))),
        ]
        names = {"lmcache_blobs": "LMCache lm://", "redis_blobs": "Redis GET, unix socket"}
        for module, name in names.items():
            needs = "redis-server" if module == "redis_blobs" else None
            if worker := bench.peer(stack, ROW, module, str(folder), needs=needs):
                worker.call("put", _CHUNKS, _SIZE)
                contenders.append(Contender(name, "peer", _getting(worker), (Target("ratio", 1 / 2.5),)))
        bench.say("fetch")
        yield from compare(ROW, "same-host fetch of 4 MiB, verified", contenders, bench.n(200))


def _fetching(client: kvbank.Client, reader: kvbank.Client, layers: int) -> Callable[[], None]:
    bank, vectors = f"layers-{layers}-{reader is client}", material.vectors(_CHUNKS)
    client.create_bank(bank, kv=spec(layers), embedding=EMBEDDING)
    tokens = material.TOKENS * _MIB // layers
    chunks = (kvbank.NewChunk(v, material.tensors(layers, tokens, seed=i)) for i, v in enumerate(vectors))
    ids = cycle([written.chunk_id for written in writer(client, bank)(chunks)])

    def fetch() -> None:
        (chunk,) = reader.fetch(bank, [next(ids)], reader_digest=READER)
        assert chunk.tensors is not None

    return fetch


def _reading(rpc: Rpc, folder: Path) -> Callable[[], None]:
    files = [folder / f"raw-{number}" for number in range(_CHUNKS)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * _SIZE)
    turn, buffer = cycle(files), bytearray(_SIZE)

    def read() -> None:
        rpc.unary()
        with next(turn).open("rb", buffering=0) as file:
            file.readinto(buffer)
        xxhash.xxh3_64_intdigest(buffer)

    return read


def _getting(worker: Worker) -> Callable[[], float]:
    turn = count()
    return lambda: worker.time("get", next(turn) % _CHUNKS, _SIZE)
