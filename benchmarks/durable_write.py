"""The row `durable_write` of the benchmarks: 4 processes write chunks of 1 MiB durably, once staged on the same host
and once streamed."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import numpy as np

import kvbank
from benchmarks import material
from benchmarks.bench import Bench
from benchmarks.lines import Worker, serve
from benchmarks.pair import Contender, Result, Target, compare
from benchmarks.service import EMBEDDING, serving, spec, writer

ROW = "durable_write"
_WRITERS, _CHUNKS = 4, 8


def run(bench: Bench) -> Iterator[Result]:
    """Time rounds in which each writer writes 8 chunks: the floor's one file after the other, the service's pipelined
    in one call."""
    folder = bench.scratch(ROW)
    with ExitStack() as stack:
        stack.callback(bench.clear, folder)
        raw = folder / "raw"
        raw.mkdir()
        staged = stack.enter_context(serving(_made(folder / "staged"), same_host=True)).address
        streamed = stack.enter_context(serving(_made(folder / "streamed"))).address
        for address in (staged, streamed):
            with kvbank.connect(address) as client:
                client.create_bank("chunks", kv=spec(1), embedding=EMBEDDING)
        writers = [
            stack.enter_context(Worker(__name__, staged, streamed, str(raw), str(number), log=folder / f"{number}.log"))
            for number in range(_WRITERS)
        ]
        contenders = [
            Contender("staged", "ours", lambda: _all(writers, "staged")),
            Contender("streamed", "ours", lambda: _all(writers, "streamed"), judged=False),
            Contender("write, fsync, rename", "floor", lambda: _all(writers, "raw"), (Target("ratio", 1.3),)),
            Contender("write, fsync, rename, fsync of the folder", "floor", lambda: _all(writers, "raw_and_folder")),
        ]
        bench.say("write")
        title = f"durable write of {_WRITERS} x {_CHUNKS} MiB by {_WRITERS} processes"
        yield from compare(ROW, title, contenders, bench.n(24))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _all(writers: list[Worker], operation: str) -> float:
    begin = time.perf_counter()
    for worker in writers:
        worker.begin(operation)
    for worker in writers:
        worker.end()
    return time.perf_counter() - begin


def _work(staged: str, streamed: str, folder: str, number: str) -> None:
    """Serve the operations of one writer process until its stdin closes. staged, streamed: addresses of two services.
    folder: where the floor writes its files. number: which writer it is."""
    vectors = material.vectors(100, seed=int(number))
    made = [material.tensors(1, seed=100 * int(number) + index) for index in range(_CHUNKS)]
    blocks = [b"".join(np.ascontiguousarray(tensor).tobytes() for tensor in tensors.values()) for tensors in made]
    serial = count()

    def ours(client: kvbank.Client) -> Callable[[], None]:
        write = writer(client, "chunks")

        def round_() -> None:
            write(kvbank.NewChunk(vectors[next(serial) % 100], tensors) for tensors in made)

        return round_

    def raw(and_folder: bool = False) -> None:
        for block in blocks:
            _write_file(f"{folder}/{number}-{next(serial)}", block)
            if and_folder:
                _sync_folder(folder)

    with kvbank.connect(staged) as near, kvbank.connect(streamed) as far:
        serve({"staged": ours(near), "streamed": ours(far), "raw": raw, "raw_and_folder": lambda: raw(True)})


def _write_file(path: str, block: bytes) -> None:
    with open(f"{path}.tmp", "wb", buffering=0) as file:
        file.write(block)
        os.fsync(file.fileno())
    os.rename(f"{path}.tmp", path)


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


if __name__ == "__main__":
    _work(*sys.argv[1:])
