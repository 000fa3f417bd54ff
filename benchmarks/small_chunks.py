"""The row `small_chunks` of the benchmarks: `write_many` of chunks with 4 KiB of K-V, durable, over TCP and by a client
on the same machine. What is compared is a file a chunk and its rows with the same bytes appended to one file, which is
synced after each chunk, and inserted into SQLite in one commit."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial

import kvbank
from benchmarks import material, record_floors
from benchmarks.bench import Bench
from benchmarks.pair import Contender, Result, Target, compare, timed
from benchmarks.service import EMBEDDING, connected, spec, writer

ROW = "small_chunks"
_CHUNKS = 500


def run(bench: Bench) -> Iterator[Result]:
    """Measure chunks per second, each round of 500 in one call."""
    folder, tensors = bench.scratch(ROW), material.tensors(1, tokens=1)
    embedding = bytes(4 * material.DIMENSION)
    data = b"".join(tensor.tobytes() for tensor in tensors.values()) + embedding
    targets = (Target("ours", 3000.0, at_least=True),)
    with ExitStack() as stack:
        stack.callback(bench.clear, folder)
        contenders = []
        for name, same_host in (("over TCP", False), ("on the same machine", True)):
            (place := folder / name.split()[-1]).mkdir()
            client = stack.enter_context(connected(place, same_host=same_host))
            client.create_bank("chunks", kv=spec(1), embedding=EMBEDDING)
            contenders.append(Contender(name, "ours", timed(_writing(client, tensors)), targets))
        database = stack.enter_context(closing(record_floors.opened(folder / "floor.db")))
        append = record_floors.appending(folder / "floor.log", material.TEXT.encode() + data)
        insert = record_floors.inserting(database, material.TEXT, data)
        contenders.append(Contender("append and fsync", "floor", timed(partial(append, _CHUNKS))))
        contenders.append(Contender("SQLite, one commit for all", "floor", timed(partial(insert, _CHUNKS))))
        bench.say("small chunks")
        title = f"durable chunks of 4 KiB of K-V, {_CHUNKS} at once"
        yield from compare(ROW, title, contenders, bench.n(16), _CHUNKS, "chunks/s")


def _writing(client: kvbank.Client, tensors: dict[str, object]) -> Callable[[], None]:
    write, found = writer(client, "chunks"), material.vectors(_CHUNKS)

    def some() -> None:
        write(kvbank.NewChunk(vector, tensors, text=material.TEXT) for vector in found)

    return some
