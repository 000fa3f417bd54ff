"""A service that is stopped, or killed, and started again under clients of all kinds: they notice the time, no more."""

import asyncio
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvbank
from tests.support.service_process import Service, ServiceHost
from tests.support.waiting import wait_until

DIGESTS = {"reader_digest": "reader", "embedder_digest": "embedder"}
DIMENSION = 16
# Of each call, for a machine that does other things meanwhile.
DEADLINE_S = 100.0
# Each client has a connection of its own, as if it were a process.
OPTIONS = {"timeout": DEADLINE_S, "stream_timeout": DEADLINE_S, "options": [("grpc.use_local_subchannel_pool", 1)]}


class Worker:
    """Writes a chunk, reads it again, searches and asks, `rounds` times by now. `wrote`: id by key."""

    def __init__(self, number: int) -> None:
        self.rounds = 0
        self.wrote: dict[bytes, int] = {}
        self.error: BaseException | None = None
        self._random = np.random.default_rng(number)

    def chunk(self) -> kvbank.NewChunk:
        """Make the next chunk."""
        keys = self._random.standard_normal((2, 64, 8)).astype(np.float32)
        tensors = {"k.0": keys, "v.0": -keys, "pos.0": np.arange(64, dtype=np.int32)}
        vector = self._random.standard_normal(DIMENSION)
        return kvbank.NewChunk(vector / np.linalg.norm(vector), tensors, text="a chunk")

    def took(self, new: kvbank.NewChunk, result: kvbank.WriteResult) -> None:
        """Note that a chunk was acknowledged."""
        assert new.idempotency_key not in self.wrote
        self.wrote[new.idempotency_key] = result.chunk_id

    def found(self, new: kvbank.NewChunk, fetched: kvbank.Chunk, retrieved: kvbank.Retrieval) -> None:
        """Check that a chunk came back as it was written, and as the nearest to itself."""
        for name, array in (new.tensors or {}).items():
            assert (fetched.tensors or {})[name].tobytes() == np.asarray(array).tobytes(), name
        assert retrieved.queries[0][0].chunk_id == fetched.chunk_id

    def work(self, address: str, over: threading.Event) -> None:
        """Work with the blocking client."""
        with kvbank.connect(address, **OPTIONS) as client:
            while not over.is_set():
                new = self.chunk()
                self.took(new, client.write("b", new, **DIGESTS))
                chunk_id = self.wrote[new.idempotency_key]
                (fetched,) = client.fetch("b", [chunk_id], reader_digest=DIGESTS["reader_digest"])
                self.found(new, fetched, client.retrieve("b", new.embedding, top_k=2, **DIGESTS))
                assert client.get_chunk("b", chunk_id).text == "a chunk"
                self.rounds += 1

    async def work_async(self, address: str, over: threading.Event) -> None:
        """Work with the asyncio client."""
        async with kvbank.connect_async(address, **OPTIONS) as client:
            while not over.is_set():
                new = self.chunk()
                self.took(new, await client.write("b", new, **DIGESTS))
                chunk_id = self.wrote[new.idempotency_key]
                (fetched,) = await client.fetch("b", [chunk_id], reader_digest=DIGESTS["reader_digest"])
                self.found(new, fetched, await client.retrieve("b", new.embedding, top_k=2, **DIGESTS))
                assert (await client.get_chunk("b", chunk_id)).text == "a chunk"
                self.rounds += 1

    def guarded(self, work: Callable[[], Any]) -> None:
        """Keeps what was raised."""
        try:
            work()
        except BaseException as error:
            self.error = error


class Crowd:
    """`count` clients of one service, half of them asynchronous, in one event loop."""

    def __init__(self, address: str, count: int) -> None:
        self.workers = [Worker(number) for number in range(count)]
        self._over = threading.Event()
        half = count // 2
        works: list[Callable[[], Any]] = [
            lambda worker=worker: worker.guarded(lambda: worker.work(address, self._over))
            for worker in self.workers[:half]
        ]
        self._threads = [
            threading.Thread(target=work) for work in (*works, lambda: asyncio.run(self._all(address, half)))
        ]
        for thread in self._threads:
            thread.start()

    async def _all(self, address: str, first: int) -> None:
        async def guarded(worker: Worker) -> None:
            try:
                await worker.work_async(address, self._over)
            except BaseException as error:
                worker.error = error

        await asyncio.gather(*map(guarded, self.workers[first:]))

    def move_on(self) -> None:
        """Wait until each client has done a whole round, begun after this."""
        goals = [worker.rounds + 2 for worker in self.workers]

        def all_did() -> bool:
            self.check()
            return all(worker.rounds >= goal for worker, goal in zip(self.workers, goals, strict=True))

        wait_until(all_did, "a client stands still", 2 * DEADLINE_S)

    def check(self) -> None:
        """Check that no client has met an error."""
        for worker in self.workers:
            if worker.error is not None:
                raise AssertionError("a client noticed") from worker.error

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture(params=[pytest.param("tcp", marks=pytest.mark.slow), "same host"])
def start(request: pytest.FixtureRequest, host: ServiceHost, tmp_path: Path) -> Iterator[Callable[[], Service]]:
    """Serve one folder at one address, each time that it is called."""
    with tempfile.TemporaryDirectory() as sockets, socket.socket() as probe:
        if request.param == "tcp":
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            probe.close()
            flags: dict[str, Any] = {"listen": f"127.0.0.1:{port}"}
        else:
            flags = {"listen": f"unix:{sockets}/s", "same_host": True}
        running: list[Service] = []

        def begin() -> Service:
            running.append(host.start(tmp_path / "data", durability="os", **flags))
            running[-1].address = flags["listen"]
            return running[-1]

        yield begin
        for service in running:
            service.kill()


@pytest.mark.parametrize("clients", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_a_restart_costs_no_client_an_error_and_no_chunk(start: Callable[[], Service], clients: int) -> None:
    service = start()
    with kvbank.connect(service.address) as client:
        kv = kvbank.KVSpec("reader", layers=[0], kv_heads=2, head_dim=8, dtype="fp32")
        client.create_bank("b", kv=kv, embedding=kvbank.EmbeddingSpec("embedder", DIMENSION))
    crowd = Crowd(service.address, clients)
    try:
        crowd.move_on()
        for kill in (False, True) if clients < 64 else (False, True, False, True):
            if kill:
                service.kill()
            else:
                assert service.stop() == 0, service.log()
            service = start()
            crowd.move_on()
    finally:
        crowd.end()
    crowd.check()
    with kvbank.connect(service.address) as client:
        stored = [(chunk.idempotency_key, chunk.chunk_id) for chunk in client.list_chunks("b")]
    assert len(stored) == len(dict(stored)), "a key is there twice"
    assert dict(stored) == {key: chunk_id for worker in crowd.workers for key, chunk_id in worker.wrote.items()}
    assert service.stop() == 0
