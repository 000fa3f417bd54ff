"""A noisy tenant, in a process of its own: it calls over several connections, one call after the other on each, at up
to a rate that is more than its quota, and heeds no refusal. Arguments: address, key, calls a second, connections."""

import secrets
import sys
import threading
import time
from collections import Counter
from typing import Any

import grpc

from benchmarks import material
from benchmarks.lines import serve
from benchmarks.service import EMBEDDER
from kvbank.v1 import chunk_pb2
from kvbank.v1 import service_pb2 as pb

BANK = "noisy"


class Noise:
    """Calls while it is `on`, and counts the calls by the code of their end."""

    def __init__(self, address: str, key: str, rate: float, connections: int) -> None:
        self._address, self._metadata, self._pause = address, [("api-key", key)], connections / rate
        self._on, self._method, self._counts = threading.Event(), "", Counter[str]()
        self._vector = material.vectors(1)[0].tobytes()
        self._under_way: set[Any] = set()
        for _ in range(connections):
            threading.Thread(target=self._call, daemon=True).start()

    def begin(self, method: str, answered: int) -> None:
        """Call from now on, and return once so many calls were answered. method: WriteChunks, with one chunk in each
        stream, or GetBank."""
        self._method = method
        self._on.set()
        while sum(list(self._counts.values())) < answered:  # a list, because the threads add to it
            time.sleep(0.001)

    def end(self) -> dict[str, int]:
        """Call no more, cancel what is under way, and return how the calls have ended since the last `end`."""
        self._on.clear()
        while self._under_way:  # a thread may have been about to begin one more
            for call in list(self._under_way):
                call.cancel()
            time.sleep(0.001)
        counts, self._counts = self._counts, Counter()
        return dict(counts)

    def _call(self) -> None:
        channel = grpc.insecure_channel(self._address, options=[("grpc.use_local_subchannel_pool", 1)])
        due = 0.0
        while self._on.wait():
            due = max(due + self._pause, time.monotonic() - 1)
            time.sleep(max(due - time.monotonic(), 0))
            # A stream with one message each way is, on the wire, a call of one message, which costs its client less.
            method = channel.unary_unary(f"/kvbank.v1.MemoryService/{self._method}")
            call = method.future(self._message(), metadata=self._metadata)
            self._under_way.add(call)
            self._counts[call.code().name] += 1
            self._under_way.discard(call)

    def _message(self) -> bytes:
        if self._method == "GetBank":
            return pb.GetBankRequest(name=BANK).SerializeToString()
        chunk = chunk_pb2.Chunk(
            idempotency_key=secrets.token_bytes(16),
            original_length=1,
            stored_length=1,
            text=material.TEXT,
            embedding=self._vector,
        )
        header = pb.ChunkHeader(bank=BANK, embedder_digest=EMBEDDER, chunk=chunk)
        return pb.WriteChunksRequest(header=header).SerializeToString()


def main(address: str, key: str, rate: str, connections: str) -> None:
    """Begin and end the noise as asked, until stdin closes."""
    noise = Noise(address, key, float(rate), int(connections))
    serve({"begin": noise.begin, "end": noise.end})


if __name__ == "__main__":
    main(*sys.argv[1:])
