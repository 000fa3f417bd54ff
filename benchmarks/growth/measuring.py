"""What one point of growth is made of: a bank, the calls that are timed, and what they cost the service."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median

import kvbank
from benchmarks import material
from benchmarks.service import (
    EMBEDDER,
    EMBEDDING,
    READER,
    processor_time,
    resident_memory,
    spec,
    writer,
)

# What is the same at all points, but where the axis says otherwise: the chunks of a bank, and the tokens of their K-V
# in one layer (64 KiB).
CHUNKS, TOKENS = 1000, 16
_WARM, _BLOCKS = 5, 4

Call = Callable[[], object]
Figures = dict[str, float]


def fill(client: kvbank.Client, bank: str, found: material.Vectors, tokens: int = TOKENS) -> None:
    """Make a bank with a chunk for each of the vectors [n, d]. tokens: those of the K-V of a chunk, in one layer."""
    tensors = material.tensors(1, tokens)
    client.create_bank(bank, kv=spec(1), embedding=EMBEDDING)
    writer(client, bank)(kvbank.NewChunk(vector, tensors) for vector in found)


def calls(
    client: kvbank.Client, banks: Sequence[str], found: material.Vectors, tokens: int = TOKENS
) -> dict[str, Call]:
    """Return the calls that are timed, each of which asks the next one of the banks.

    found: vectors [n, d] of chunks in each bank whose K-V are there, so that the best hit of one is its chunk.
    """
    turn, asked, new = cycle(banks), cycle(found), cycle(material.vectors(CHUNKS, seed=2))
    tensors = material.tensors(1, tokens)

    def search() -> None:
        client.retrieve(next(turn), next(asked), payload=False, embedder_digest=EMBEDDER)

    def retrieve() -> None:
        client.retrieve(next(turn), next(asked), top_k=1, reader_digest=READER, embedder_digest=EMBEDDER)

    def write() -> None:
        writer(client, next(turn))([kvbank.NewChunk(next(new), tensors)])

    return {"search": search, "retrieve": retrieve, "write": write}


def timed(folder: Path, made: Mapping[str, Call], rounds: int) -> Figures:
    """Make calls in turns, some of each kind at a time. Return the median of each kind, and the processor time that the
    service of the folder takes for one, in milliseconds. rounds: how often each call is made."""
    times: dict[str, list[float]] = {name: [] for name in made}
    used = dict.fromkeys(made, 0.0)
    for call in made.values():
        _times(call, _WARM)
    block = -(-rounds // _BLOCKS)
    for _ in range(_BLOCKS):
        for name, call in made.items():
            before = processor_time(folder)
            times[name] += _times(call, block)
            used[name] += processor_time(folder) - before
    figures: Figures = {}
    for name in made:
        figures[f"{name}, ms"] = 1000 * median(times[name])
        figures[f"{name}, processor ms"] = 1000 * used[name] / len(times[name])
    return figures


def _times(call: Call, count: int) -> list[float]:
    taken = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return taken


def kept(folder: Path) -> Figures:
    """Return what the service of a folder holds in memory, and on the disk, in MB."""
    on_disk = sum(os.lstat(path).st_blocks * 512 for path in _files(folder / "store"))
    return {"memory, MB": resident_memory(folder) / 1e6, "disk, MB": on_disk / 1e6}


def _files(folder: Path) -> Iterator[str]:
    for root, _, names in os.walk(folder):
        yield from (f"{root}/{name}" for name in names)
