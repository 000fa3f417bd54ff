"""The memory service against the file system, FAISS and a bare gRPC stream."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import faiss
import grpc
import numpy as np

import kvbank
from benchmarks import raw_stream
from benchmarks.pair import Result, compare
from model_worker.service_process import ServiceProcess

_DIGEST, _DIMENSION, _MIB = "bench", 384, 1 << 20
_SPEC = kvbank.KVSpec(_DIGEST, [0], kv_heads=8, head_dim=64, dtype="fp32")
_TOKENS = _MIB // (2 * 8 * 64 * 4)


def run(progress: Callable[[str], None]) -> Iterator[Result]:
    """Durable writes, retrieval with 8 MiB of K-V, and search alone."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ServiceProcess(Path(folder)) as service,
        kvbank.connect(service.address) as client,
    ):
        progress("write")
        yield _writes(client, Path(folder))
        progress("retrieve")
        yield _retrieval(client)
        progress("search")
        yield _search(client)


def _chunk(rng: np.random.Generator) -> kvbank.NewChunk:
    keys = rng.standard_normal((8, _TOKENS, 64), dtype=np.float32)
    tensors = {"k.0": keys, "v.0": keys, "pos.0": np.arange(_TOKENS, dtype=np.int32)}
    return kvbank.NewChunk(_unit(rng), tensors)


def _unit(rng: np.random.Generator) -> np.ndarray:
    vector = rng.standard_normal(_DIMENSION, dtype=np.float32)
    return vector / np.linalg.norm(vector)


def _writes(client: kvbank.Client, folder: Path) -> Result:
    rng, count = np.random.default_rng(0), 60
    chunks = iter([_chunk(rng) for _ in range(count + 1)])
    client.create_bank("writes", kv=_SPEC, embedding=kvbank.EmbeddingSpec(_DIGEST, _DIMENSION))
    raw = folder / "raw"
    raw.mkdir()
    data, serial = bytes(_MIB), iter(range(1_000_000))

    def ours() -> None:
        client.write("writes", next(chunks), reader_digest=_DIGEST, embedder_digest=_DIGEST)

    def floor() -> None:
        path = raw / f"{next(serial)}"
        with path.with_suffix(".tmp").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        path.with_suffix(".tmp").rename(path)
        descriptor = os.open(raw, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    return compare(
        "durable write of a 1 MiB chunk, streamed, one writer", ours, floor, "write, fsync, rename, fsync", count
    )


def _retrieval(client: kvbank.Client) -> Result:
    rng = np.random.default_rng(1)
    client.create_bank("reads", kv=_SPEC, embedding=kvbank.EmbeddingSpec(_DIGEST, _DIMENSION))
    client.write_many("reads", (_chunk(rng) for _ in range(64)), reader_digest=_DIGEST, embedder_digest=_DIGEST)
    with _raw_stream() as call:

        def ours() -> None:
            client.retrieve("reads", _unit(rng), top_k=8, reader_digest=_DIGEST, embedder_digest=_DIGEST)

        def floor() -> None:
            for _ in call(b"8"):
                pass

        return compare(
            "retrieve 8 chunks of 1 MiB, loopback TCP, verified twice", ours, floor, "bare gRPC stream, 8 MiB", 40
        )


@contextmanager
def _raw_stream() -> Iterator[grpc.UnaryStreamMultiCallable]:
    command = [sys.executable, "-m", raw_stream.__name__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        port = int(process.stdout.readline())
        options = [("grpc.max_receive_message_length", 64 << 20)]
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            yield channel.unary_stream(raw_stream.METHOD)
        process.stdin.close()


def _search(client: kvbank.Client) -> Result:
    rng = np.random.default_rng(2)
    vectors = rng.standard_normal((5_000, _DIMENSION), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    client.create_bank("vectors", kv=None, embedding=kvbank.EmbeddingSpec(_DIGEST, _DIMENSION))
    client.write_many("vectors", map(kvbank.NewChunk, vectors), reader_digest="", embedder_digest=_DIGEST)
    index = faiss.IndexFlatIP(_DIMENSION)
    index.add(vectors)

    def ours() -> None:
        client.retrieve("vectors", _unit(rng), top_k=8, payload=False, embedder_digest=_DIGEST)

    def floor() -> None:
        index.search(_unit(rng)[None], 8)

    return compare("search 5,000 chunks, d=384, over the wire", ours, floor, "FAISS flat, in process", 200)
