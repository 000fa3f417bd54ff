"""The row `small_records` of the benchmarks: durable records of 384 dimensions and 200 characters of text, one at a
time, one at a time by each of eight processes, and many at once.

One at a time, each call returns when its record is durable. Many at once are, with us, one pipelined stream in which
each record is acknowledged separately, and with the peers one call of all records. Of eight processes ours share a
service; the floor is one process that writes the records of all.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import kvbank
from benchmarks import material, record_floors
from benchmarks.bench import Bench
from benchmarks.lines import Worker, serve
from benchmarks.pair import Contender, Result, Target, compare, timed
from benchmarks.service import EMBEDDING, serving, writer

ROW = "small_records"
_CLIENTS, _EACH = 8, 20
_PEERS = {
    "milvus_records": "milvus-lite, no fsync",
    "lance_records": "LanceDB, no fsync",
    "qdrant_records": "qdrant-client local",
    "redis_records": "Redis, appendfsync always",
}


def run(bench: Bench) -> Iterator[Result]:
    """Measure records per second: ours with durability fsync, every peer with its defaults, except Redis, whose default
    may lose the last second."""
    folder = bench.scratch(ROW)
    with ExitStack() as stack:
        stack.callback(bench.clear, folder)
        address = stack.enter_context(serving(folder)).address
        client = stack.enter_context(kvbank.connect(address))
        client.create_bank("records", kv=None, embedding=EMBEDDING)
        peers: dict[str, Worker] = {}
        for module, name in _PEERS.items():
            needs = "redis-server" if module == "redis_records" else None
            if worker := bench.peer(stack, ROW, module, str(folder), needs=needs):
                peers[name] = worker
        database = stack.enter_context(closing(record_floors.opened(folder / "floor.db")))
        embedding = bytes(4 * material.DIMENSION)
        append = record_floors.appending(folder / "floor.log", material.TEXT.encode() + embedding)
        insert = record_floors.inserting(database, material.TEXT, embedding)
        for operation, records, rounds in (("single", 50, 16), ("batch", 500, 16)):
            bench.say(f"records, {operation}")
            floor = append if operation == "single" else insert
            about = "append and fsync" if operation == "single" else "SQLite, one commit for all"
            limit = (Target("ours", 2000.0, at_least=True),) if operation == "batch" else ()
            contenders = [
                Contender("ours", "ours", timed(partial(_ours(client, operation), records)), limit),
                Contender(about, "floor", timed(partial(floor, records))),
            ]
            contenders += [
                Contender(name, "peer", partial(worker.time, operation, records)) for name, worker in peers.items()
            ]
            title = "durable small records, " + ("one at a time" if operation == "single" else f"{records} at once")
            yield from compare(ROW, title, contenders, bench.n(rounds), records)
        yield from _together(bench, folder, address)


def _together(bench: Bench, folder: Path, address: str) -> Iterator[Result]:
    """Measure records that eight processes write at the same time, each one at a time."""
    bench.say("records of eight processes")
    with ExitStack() as stack:
        logs = [folder / f"client-{number}.log" for number in range(_CLIENTS)]
        clients = [stack.enter_context(Worker(__name__, address, log=log)) for log in logs]

        def write() -> None:
            for client in clients:
                client.begin("single", _EACH)
            for client in clients:
                client.end()

        record = material.TEXT.encode() + bytes(4 * material.DIMENSION)
        floor = partial(record_floors.appending(folder / "floor-of-all.log", record), _CLIENTS * _EACH)
        limit = (Target("ratio", 0.8, at_least=True),)
        contenders = [
            Contender("ours", "ours", timed(write)),
            Contender("append and fsync", "floor", timed(floor), limit),
        ]
        title = f"durable small records, one at a time by {_CLIENTS} processes"
        yield from compare(ROW, title, contenders, bench.n(16), _CLIENTS * _EACH)


def _ours(client: kvbank.Client, operation: str) -> Callable[[int], None]:
    write, found = writer(client, "records", reader=""), material.vectors(1000)

    def single(records: int) -> None:
        for vector in found[:records]:
            write([kvbank.NewChunk(vector, text=material.TEXT)])

    def batch(records: int) -> None:
        write(kvbank.NewChunk(vector, text=material.TEXT) for vector in found[:records])

    return single if operation == "single" else batch


def _work(address: str) -> None:
    """Serve the operation of one process until its stdin closes. address: of the service."""
    with kvbank.connect(address) as client:
        serve({"single": _ours(client, "single")})


if __name__ == "__main__":
    _work(*sys.argv[1:])
