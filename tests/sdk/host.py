"""A server on this machine that shares its folder, with a client and a bank."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

import kvbank
from kvbank.wire import proof
from memory_service.api.embedded import LocalServer
from memory_service.domain.limits import Limits


class Host:
    """A server that shares its folder, a client, and the bank "b"."""

    def __init__(
        self, data: Path, kv: kvbank.KVSpec | None, embedding: kvbank.EmbeddingSpec, digests: dict[str, str]
    ) -> None:
        self.data, self.digests = data, digests
        # The path of a socket is short, that of pytest's folders is not.
        self._sockets = tempfile.TemporaryDirectory()
        self.address = f"unix:{self._sockets.name}/s"
        self.start()
        self.client = kvbank.connect(self.address)
        self.client.create_bank("b", kv=kv, embedding=embedding)

    def start(self) -> None:
        # No bytes come with a header, so that small chunks go by files too.
        options: dict[str, Any] = {"same_host": True, "durability": "os", "limits": Limits(inline_bytes=0)}
        self.server = LocalServer(self.data, self.address, **options)

    def stop(self) -> None:
        self.server.stop()

    def close(self) -> None:
        self.client.close()
        self.stop()
        self._sockets.cleanup()

    def write(self, *chunks: kvbank.NewChunk) -> list[int]:
        return self.write_all(chunks)

    def write_all(self, chunks: Iterable[kvbank.NewChunk]) -> list[int]:
        return [result.chunk_id for result in self.client.write_many("b", chunks, **self.digests)]

    def fetch(self, *chunk_ids: int, **options: Any) -> list[kvbank.Chunk]:
        return self.client.fetch("b", chunk_ids, reader_digest=self.digests["reader_digest"], **options)

    def retrieve(self, vector: np.ndarray, **options: Any) -> kvbank.Retrieval:
        return self.client.retrieve("b", vector, **self.digests, **options)

    def file(self, chunk_id: int) -> Path:
        return next((self.data / "payloads").glob(f"*/*/{chunk_id}.safetensors"))

    def sent(self, path: str) -> float:
        """Payload bytes that were answered so."""
        return self._sample("kvbank_payload_sent_bytes_total", path)

    def received(self, path: str) -> float:
        return self._sample("kvbank_payload_received_bytes_total", path)

    def _sample(self, name: str, path: str) -> float:
        samples = self.client.stats().samples
        return sum(each.value for each in samples if each.name == name and each.labels["path"] == path)

    def proof(self) -> bytes:
        """Return the bytes by which a client shows that it may read the folder."""
        return proof.of_client((self.data / "same-host.nonce").read_bytes())

    def staged(self) -> list[Path]:
        return list((self.data / "staging").iterdir())


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)
