"""The memory service as a process of its own, as its users run it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import kvbank
from benchmarks import material
from model_worker.demo.service_process import ServiceProcess

READER, EMBEDDER = "bench-reader", "bench-embedder"
EMBEDDING = kvbank.EmbeddingSpec(EMBEDDER, material.DIMENSION)
_SAME_HOST = "KVBANK_SAME_HOST"


def spec(layers: int) -> kvbank.KVSpec:
    """Of a bank of `material.tensors`."""
    return kvbank.KVSpec(READER, range(layers), material.HEADS, material.HEAD_DIM, "fp16")


@contextmanager
def serving(folder: Path, *, same_host: bool = False) -> Iterator[ServiceProcess]:
    """A service on `folder`, durability fsync: on the loopback, or on a unix socket and allowed to name its files."""
    with tempfile.TemporaryDirectory() as short:
        process = ServiceProcess(folder)
        before = os.environ.get(_SAME_HOST)
        os.environ[_SAME_HOST] = str(same_host).lower()
        try:
            if same_host:
                process.address = f"unix:{short}/socket"
            with process:
                yield process
        finally:
            os.environ.pop(_SAME_HOST)
            if before is not None:
                os.environ[_SAME_HOST] = before


@contextmanager
def connected(folder: Path, *, same_host: bool = False) -> Iterator[kvbank.Client]:
    """A client of a service of its own."""
    with serving(folder, same_host=same_host) as process, kvbank.connect(process.address) as client:
        yield client


def writer(client: kvbank.Client, bank: str, *, reader: str = READER) -> "partial[list[kvbank.WriteResult]]":
    """`client.write_many` into a bank; `reader` is "" for one of vectors only."""
    return partial(client.write_many, bank, reader_digest=reader, embedder_digest=EMBEDDER)


def peak_memory(folder: Path) -> int:
    """Most bytes that the server of this folder ever had resident; Linux only."""
    owner = (folder / "store/kvbank.lock").read_text().split()[-1]
    status = Path(f"/proc/{owner}/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
