"""A noisy tenant, in a process of its own: it writes chunks from several connections, at a rate that is more than its
quota, and heeds no refusal. Arguments: address, key, writes a second, connections."""

import itertools
import secrets
import sys
import threading
import time
from collections import Counter

import grpc

from benchmarks import material
from benchmarks.lines import serve
from benchmarks.service import EMBEDDER
from kvbank.v1 import chunk_pb2, service_pb2_grpc
from kvbank.v1 import service_pb2 as pb

BANK = "noisy"


class Noise:
    """Writes while it is `on`, each write a stream of one chunk, and counts the writes by the code of their end."""

    def __init__(self, address: str, key: str, rate: float, connections: int) -> None:
        self._address, self._metadata, self._pause = address, [("api-key", key)], connections / rate
        self._on, self._counts = threading.Event(), Counter[str]()
        self._vector = material.vectors(1)[0].tobytes()
        for _ in range(connections):
            threading.Thread(target=self._write, daemon=True).start()

    def begin(self) -> None:
        """Write from now on."""
        self._on.set()

    def end(self) -> dict[str, int]:
        """Write no more, and return how the writes have ended since the start of the process."""
        self._on.clear()
        return dict(self._counts)

    def _write(self) -> None:
        channel = grpc.insecure_channel(self._address, options=[("grpc.use_local_subchannel_pool", 1)])
        stub = service_pb2_grpc.MemoryServiceStub(channel)
        due = time.monotonic()
        for _ in itertools.count():
            self._on.wait()
            due = max(due + self._pause, time.monotonic() - 1)
            time.sleep(max(due - time.monotonic(), 0))
            try:
                list(stub.WriteChunks(iter([self._frame()]), metadata=self._metadata))
                self._counts["OK"] += 1
            except grpc.RpcError as error:
                self._counts[error.code().name] += 1

    def _frame(self) -> pb.WriteChunksRequest:
        chunk = chunk_pb2.Chunk(
            idempotency_key=secrets.token_bytes(16),
            original_length=1,
            stored_length=1,
            text=material.TEXT,
            embedding=self._vector,
        )
        return pb.WriteChunksRequest(header=pb.ChunkHeader(bank=BANK, embedder_digest=EMBEDDER, chunk=chunk))


def main(address: str, key: str, rate: str, connections: str) -> None:
    """Begin and end the noise as asked, until stdin closes."""
    noise = Noise(address, key, float(rate), int(connections))
    serve({"begin": noise.begin, "end": noise.end})


if __name__ == "__main__":
    main(*sys.argv[1:])
