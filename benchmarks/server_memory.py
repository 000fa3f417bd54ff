"""The row `server_memory` of the benchmarks: the peak of the server's memory, beside the size of the embeddings that it
holds, while payloads of many times that size go in and out."""

import os
from collections.abc import Iterator
from itertools import islice

import kvbank
from benchmarks import material
from benchmarks.bench import Bench
from benchmarks.pair import Result, Target
from benchmarks.service import EMBEDDER, EMBEDDING, READER, peak_memory, serving, spec, writer

ROW = "server_memory"


def run(bench: Bench) -> Iterator[Result]:
    """Measure the peak of resident memory, in MB: first with the embeddings alone, then with the payloads too."""
    vectors, payloads = (10_000, 256) if bench.quick else (100_000, 2048)
    folder = bench.scratch(ROW)
    try:
        with serving(folder) as process, kvbank.connect(process.address) as client:
            bench.say(f"write {vectors:,} small chunks")
            client.create_bank("records", kv=None, embedding=EMBEDDING)
            found = material.vectors(vectors)
            writer(client, "records", reader="")(map(kvbank.NewChunk, found))
            client.retrieve("records", found[0], payload=False, embedder_digest=EMBEDDER)
            yield _result(f"peak memory, {vectors:,} embeddings", vectors, peak_memory(folder))
            bench.say(f"write and read {payloads:,} chunks of 1 MiB")
            client.create_bank("chunks", kv=spec(1), embedding=EMBEDDING)
            tensors = material.tensors(1)
            written = writer(client, "chunks")(kvbank.NewChunk(vector, tensors) for vector in found[:payloads])
            ids = iter([result.chunk_id for result in written])
            while some := list(islice(ids, 32)):
                client.fetch("chunks", some, reader_digest=READER)
            title = f"peak memory, {vectors:,} embeddings, {payloads:,} MiB of payloads in and out"
            yield _result(title, vectors + payloads, peak_memory(folder))
    finally:
        bench.clear(folder)


def _result(title: str, embeddings: int, peak: int) -> Result:
    size = embeddings * 4 * material.DIMENSION / 1e6
    targets = (Target("ours", 1.3 * size + 300),)
    load = os.getloadavg()[0]
    return Result(ROW, title, peak / 1e6, "the embeddings", "floor", size, "MB", 1, load, targets)
