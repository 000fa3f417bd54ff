"""The memory service as a separate process, as its users run it, with a client and banks for the benchmarks."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import kvbank
from benchmarks import material
from model_worker.evaluate.service_process import ServiceProcess

READER, EMBEDDER = "bench-reader", "bench-embedder"
EMBEDDING = kvbank.EmbeddingSpec(EMBEDDER, material.DIMENSION)
_SAME_HOST = "KVBANK_SAME_HOST"


def spec(layers: int) -> kvbank.KVSpec:
    """Return the K-V spec of a bank for `material.tensors` with this number of layers."""
    return kvbank.KVSpec(READER, range(layers), material.HEADS, material.HEAD_DIM, "fp16")


@contextmanager
def serving(folder: Path, *, same_host: bool = False) -> Iterator[ServiceProcess]:
    """Run a service on `folder` with durability fsync and yield its process. same_host: it listens on a unix socket and
    may name its files to clients; otherwise it listens on the loopback."""
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
    """Run a service as `serving` does, and yield a client of it."""
    with serving(folder, same_host=same_host) as process, kvbank.connect(process.address) as client:
        yield client


def writer(client: kvbank.Client, bank: str, *, reader: str = READER) -> "partial[list[kvbank.WriteResult]]":
    """Return `client.write_many` for one bank. reader: the digest of the reader, "" for a bank of vectors only."""
    return partial(client.write_many, bank, reader_digest=reader, embedder_digest=EMBEDDER)


def peak_memory(folder: Path) -> int:
    """Return the most bytes that the server of this folder ever had resident; Linux only."""
    return _memory(folder, "VmHWM")


def resident_memory(folder: Path) -> int:
    """Return the bytes that the server of this folder has resident; Linux only."""
    return _memory(folder, "VmRSS")


def processor_time(folder: Path) -> float:
    """Return the seconds of processor time that the server of this folder has used; Linux only."""
    # The clock of another process, as `clock_getcpuclockid` of the C library makes it of its id.
    return time.clock_gettime(~_process_id(folder) << 3 | 2)


def _memory(folder: Path, field: str) -> int:
    status = Path(f"/proc/{_process_id(folder)}/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def _process_id(folder: Path) -> int:
    return int((folder / "store/kvbank.lock").read_text().split()[-1])
