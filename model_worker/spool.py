"""Chunks that wait on disk while the memory service is away.

One safetensors file a chunk, written, synced and renamed before `put` returns, with the idempotency key it will be
delivered under. Delivery may happen twice, after a crash or by two workers over one folder; the key makes the service
store it once.
"""

import base64
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import safetensors
import safetensors.torch

import kvbank
from model_worker.errors import SpoolFull
from model_worker.tensors import to_numpy, to_torch

_SUFFIX = ".chunk"


class Spool:
    """A folder of waiting chunks, at most `max_bytes` in all."""

    def __init__(self, folder: Path | str, max_bytes: int = 1 << 30):
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._serial = 0

    def put(self, bank: str, chunk: kvbank.NewChunk) -> None:
        """Make `chunk` for `bank` durable here. Raises SpoolFull, with nothing written, when it would not fit."""
        data = _pack(bank, chunk)
        if self.size() + len(data) > self.max_bytes:
            raise SpoolFull(f"{len(self)} chunks wait in {self.folder}, its bound of {self.max_bytes} bytes is reached")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._serial += 1
        name = f"{time.time_ns():020d}-{os.getpid()}-{self._serial:06d}"
        temporary = self.folder / f"{name}.tmp"
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.folder / (name + _SUFFIX))
        _sync_folder(self.folder)

    def __iter__(self) -> Iterator[tuple[Path, str, kvbank.NewChunk]]:
        """Waiting chunks with their banks, oldest first."""
        for path in self._files():
            try:
                yield path, *_unpack(path)
            except FileNotFoundError:  # another worker delivered it
                continue

    def done(self, path: Path) -> None:
        """The chunk at `path` was acknowledged by the service."""
        path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._files())

    def size(self) -> int:
        """Bytes waiting."""
        return sum(path.stat().st_size for path in self._files() if path.exists())

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"*{_SUFFIX}"))


def _pack(bank: str, chunk: kvbank.NewChunk) -> bytes:
    producer = chunk.producer or kvbank.Producer("none")
    record = {
        "bank": bank,
        "key": base64.b64encode(chunk.idempotency_key).decode(),
        "start": chunk.start,
        "original_length": chunk.original_length,
        "token_ids": [int(i) for i in chunk.token_ids],
        "text": chunk.text,
        "metadata": dict(chunk.metadata),
        "producer": asdict(producer),
    }
    # Copies, because safetensors refuses tensors that share memory, as the offsets of all layers may.
    tensors = {name: to_torch(array).clone() for name, array in (chunk.tensors or {}).items()}
    tensors["embedding"] = to_torch(chunk.embedding)  # type: ignore[arg-type]
    return safetensors.torch.save(tensors, {"record": json.dumps(record)})


def _unpack(path: Path) -> tuple[str, kvbank.NewChunk]:
    with safetensors.safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["record"])
        tensors = {name: to_numpy(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    return record["bank"], kvbank.NewChunk(
        embedding=tensors.pop("embedding"),
        tensors=tensors,
        start=record["start"],
        original_length=record["original_length"],
        token_ids=record["token_ids"],
        text=record["text"],
        metadata=record["metadata"],
        producer=kvbank.Producer(**record["producer"]),
        idempotency_key=base64.b64decode(record["key"]),
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
