"""A tenant that has hundreds of things waiting makes another wait for one of them, and what bounds all callers leaves
room for each tenant."""

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.request import urlopen

import grpc
import numpy as np
import pytest

import kvbank
from kvbank.v1 import service_pb2 as pb
from kvbank.v1 import service_pb2_grpc
from memory_service.domain.limits import Pauses
from tests.proof.once import reason_of
from tests.support.caller import EMBEDDER, READER, frames_of
from tests.support.waiting import wait_until

OWN = [("grpc.use_local_subchannel_pool", 1)]
# The chunks that a noisy tenant has waiting.
MANY = 40


class Two:
    """A server with two tenants, "noisy" and "quiet", each with a bank "b"."""

    def __init__(self, serving: Callable[..., Any], dimension: int = 4, **settings: Any) -> None:
        self.caller = serving(metrics_listen="127.0.0.1:0", **settings)
        self.server = serving.server  # type: ignore[attr-defined]
        with kvbank.connect(self.server.address) as owner:
            operator = owner.access.create_key("operator").secret
        self.keys = {}
        with kvbank.connect(self.server.address, api_key=operator) as client:
            for name in ("noisy", "quiet"):
                client.access.create_tenant(name)
                self.keys[name] = client.access.create_key("admin", tenant=name).secret
        for key in self.keys.values():
            with kvbank.connect(self.server.address, api_key=key) as client:
                kv = kvbank.KVSpec("reader-a", (1, 3), 2, 8, "bf16")
                client.create_bank("b", kv=kv, embedding=kvbank.EmbeddingSpec("embedder-a", dimension))

    def metadata(self, tenant: str) -> list[tuple[str, str]]:
        return [("api-key", self.keys[tenant])]

    def write(self, tenant: str, count: int, ended: Callable[[str], object]) -> threading.Thread:
        """Write chunks with K-V in one stream, and return when all have come in, with the thread that reads the acks;
        `ended` gets the tenant for each."""
        chunks = [self.caller.chunk() for _ in range(count)]
        frames = [frame for chunk, data in chunks for frame in frames_of(chunk, data, "b")]
        coming = sum(frame.header.ByteSize() + len(frame.data) for frame in frames) + self.in_flight()
        stub = service_pb2_grpc.MemoryServiceStub(self.caller.channel)
        acks = stub.WriteChunks(iter(frames), metadata=self.metadata(tenant))
        reading = threading.Thread(target=lambda: [ended(tenant) for _ in acks], daemon=True)
        reading.start()
        wait_until(lambda: self.in_flight() == coming)
        return reading

    def in_flight(self) -> float:
        """Return the bytes of writes that were taken and not written yet."""
        with urlopen(f"http://{self.server.metrics_address}/metrics", timeout=60) as page:
            lines = page.read().decode().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("kvbank_in_flight_bytes "))


def test_a_small_chunk_does_not_wait_for_larger_ones_behind_it(serving: Any) -> None:
    may = threading.Event()
    caller = serving(durability="os", pauses=Pauses(at={"object stored": lambda: may.wait(60)}))
    caller.create()
    caller.create("v", layers=())
    small, _ = caller.chunk(layers=())
    headers = [pb.ChunkHeader(bank="v", embedder_digest=EMBEDDER, chunk=small)]
    for _ in range(2):
        chunk, data = caller.chunk()
        header = pb.ChunkHeader(bank="b", reader_digest=READER, embedder_digest=EMBEDDER, chunk=chunk, data=data)
        headers.append(header)
    acks = caller.stub.WriteChunks(iter([pb.WriteChunksRequest(headers={"headers": headers})]), timeout=30)
    first = next(acks)
    may.set()
    assert first.idempotency_key == small.idempotency_key
    assert len(list(acks)) + len(first.more) > 0


def test_the_bytes_of_a_quiet_tenants_chunk_pass_those_of_a_noisy_one(serving: Any) -> None:
    """Let writes go on one by one, with one thread for all of them, once both tenants have theirs waiting."""
    may, acks = threading.Semaphore(0), queue.Queue[str]()
    one_by_one = Pauses(at={"object stored": lambda: may.acquire(timeout=60)})
    two = Two(serving, storage_threads=1, pauses=one_by_one)
    reading = [two.write("noisy", MANY, acks.put), two.write("quiet", 1, acks.put)]
    may.release(3)
    assert sorted(acks.get(timeout=60) for _ in range(3)) == ["noisy", "noisy", "quiet"]
    may.release(MANY)
    assert Counter(acks.get(timeout=60) for _ in range(MANY - 2)) == {"noisy": MANY - 2}
    for thread in reading:
        thread.join()


@pytest.fixture
def connected() -> Iterator[Callable[[str], Any]]:
    """Stubs, each over a connection of its own."""
    with ExitStack() as channels:
        yield lambda address: service_pb2_grpc.MemoryServiceStub(
            channels.enter_context(grpc.insecure_channel(address, options=OWN))
        )


def test_a_tenant_leaves_a_quarter_of_all_calls_to_others(serving: Any, connected: Callable[[str], Any]) -> None:
    two, hold = Two(serving, max_calls=8), threading.Event()
    noisy, quiet = map(two.metadata, two.keys)

    def nothing() -> Iterator[pb.WriteChunksRequest]:
        hold.wait(60)
        yield from ()

    open_calls = [connected(two.server.address).WriteChunks(nothing(), metadata=noisy) for _ in range(7)]
    ended = queue.Queue[Any]()
    for call in open_calls:
        call.add_done_callback(ended.put)
    refused = ended.get(timeout=60)
    assert (refused.code(), reason_of(refused)) == (grpc.StatusCode.UNAVAILABLE, "NOT_SERVING")
    assert "6 calls under way" in refused.details()
    for _ in range(3):
        assert two.caller.stub.GetBank(pb.GetBankRequest(name="b"), metadata=quiet).bank.name == "b"
    with pytest.raises(grpc.RpcError) as caught:
        two.caller.stub.GetBank(pb.GetBankRequest(name="b"), metadata=noisy)
    assert reason_of(caught.value) == "NOT_SERVING"
    hold.set()
    for call in open_calls:
        if call is not refused:
            assert list(call) == []
    with kvbank.connect(two.server.address, api_key=two.keys["noisy"]) as client:
        assert client.get_bank("b").usage.chunks == 0


def test_the_requests_of_one_tenant_leave_memory_for_those_of_another(serving: Any) -> None:
    """Hold searches of one tenant up until they take three quarters of the bytes that there are for requests."""
    mib = 1 << 20
    begun, hold = threading.Semaphore(0), threading.Event()

    def answer() -> None:
        if not hold.is_set():
            begun.release()
            hold.wait(60)

    two = Two(serving, dimension=4096, max_inflight_bytes=8 * mib, pauses=Pauses(at={"answer": answer}))
    queries = np.ones(2 * mib // 4, "<f4").tobytes()
    request = pb.RetrieveRequest(banks=["b"], reader_digest="reader-a", embedder_digest="embedder-a", queries=queries)
    searches = [two.caller.stub.Retrieve(request, metadata=two.metadata("noisy")) for _ in range(2)]
    for search in searches:
        assert begun.acquire(timeout=60), search.exception()
    noisy, quiet = (two.caller.stub.Retrieve(request, metadata=two.metadata(name)) for name in two.keys)
    with pytest.raises(grpc.RpcError) as caught:
        next(noisy)
    assert reason_of(caught.value) == "NOT_SERVING"
    assert begun.acquire(timeout=60)  # the quiet tenant's
    hold.set()
    for search in (*searches, quiet):
        search.cancel()
