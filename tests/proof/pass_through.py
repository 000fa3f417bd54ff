"""Many gigabytes through a small bank: the memory of the service stays flat."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import kvbank
from tests.proof.big import DIGESTS, EMBEDDING, KV, MIB, BigChunks
from tests.proof.content import READER, vector_of
from tests.support.service_process import Service, ServiceHost

BANK = "passing"
GIB = 1 << 30
CHUNK = 4 * MIB
KEPT = 128
# What a service may take beside 1.3 times its embeddings.
ALLOWED = 300 * MIB


@dataclass
class Passed:
    """Bytes written, and read again; the resident bytes of the service: at rest, at most, at the end."""

    written: int = 0
    read: int = 0
    at_rest: int = 0
    most: int = 0
    at_end: int = 0
    wrong: int = 0

    @property
    def holds(self) -> bool:
        return self.most <= ALLOWED and not self.wrong

    def __str__(self) -> str:
        memory = ", ".join(f"{name} {getattr(self, name) // MIB} MiB" for name in ("at_rest", "most", "at_end"))
        moved = f"{self.written / GIB:.1f} GiB written, {self.read / GIB:.1f} GiB read"
        return f"{moved}; resident {memory}; wrong {self.wrong}"


def pass_through(
    host: ServiceHost, place: Path, size: int, *, tell: Callable[[Passed], None] = lambda _: None, **flags: object
) -> Passed:
    """Write `size` bytes in chunks of 4 MiB to a bank that keeps half a GiB, and read a part of it back."""
    service, report, chunks = host.start(place / "data", **flags), Passed(), BigChunks(CHUNK)
    with kvbank.connect(service.address) as client, _sampled(service, report):
        client.create_bank(BANK, kv=KV, embedding=EMBEDDING, capacity=kvbank.Capacity(chunks=KEPT))
        report.at_rest = service.resident_bytes()
        while report.written < size:
            client.write_many(BANK, (chunks.new() for _ in range(KEPT // 2)), **DIGESTS)
            report.written += KEPT // 2 * chunks.payload
            found = client.retrieve(BANK, vector_of(bytes(16)), top_k=8, **DIGESTS).chunks
            report.read += len(found) * chunks.payload
            report.wrong += sum(not chunks.same(chunk) for chunk in found.values())
            tell(report)
        ids = [chunk.chunk_id for chunk in client.list_chunks(BANK)]
        for begin in range(0, len(ids), 8):
            for chunk in client.fetch(BANK, ids[begin : begin + 8], reader_digest=READER):
                report.read += chunks.payload
                report.wrong += not chunks.same(chunk)
        report.at_end = service.resident_bytes()
    service.stop()
    return report


@contextmanager
def _sampled(service: Service, report: Passed) -> Iterator[None]:
    """Note the most memory that the service has, twenty times a second."""
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.05):
            report.most = max(report.most, service.resident_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
