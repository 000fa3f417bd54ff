"""What an answer says before its bytes is bounded before it is loaded, and no other caller waits for its making."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import kvbank
from kvbank.v1 import service_pb2 as pb
from memory_service.domain.limits import Pauses
from tests.proof.deaf import Deaf
from tests.support.service_process import Service, ServiceHost
from tests.support.waiting import wait_until

MIB = 1024 * 1024
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
TEXT = "x" * 1_900_000
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


class Filled:
    """A service in a process of its own, and who calls it."""

    def __init__(self, caller: Any, service: Service) -> None:
        self.caller, self.service, self.address = caller, service, service.address

    def fill(self, count: int) -> list[int]:
        """Chunks with the longest text that is taken, and nothing else."""
        self.caller.create(layers=[])
        return [self.caller.add(layers=[], text=TEXT) for _ in range(count)]

    def retrieve(self, top_k: int) -> int:
        return len(self.caller.retrieve(top_k=top_k, reader_digest="")[0].chunks)

    def peak(self) -> int:
        """Return the most memory that the process has ever had, in bytes."""
        return self.service.peak_bytes()

    def resident(self) -> int:
        """Return the memory that the process has now, in bytes."""
        return self.service.resident_bytes()


@pytest.fixture
def serve(tmp_path: Path, connect: Callable[..., Any], services: ServiceHost) -> Callable[..., Any]:
    @contextmanager
    def serving(**flags: Any) -> Iterator[Filled]:
        service = services.start(tmp_path / "data", durability="os", **flags)
        try:
            with connect(service.address) as caller:
                yield Filled(caller, service)
        finally:
            service.kill()

    return serving


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


@needs_proc
def test_what_is_too_large_is_refused_before_it_is_loaded(serve: Any, refused: Any) -> None:
    with serve(max_message_bytes=4 * MIB) as service:
        ids = service.fill(40)
        before = service.peak()
        with refused("TOO_LARGE", EXHAUSTED):
            service.retrieve(40)
        assert refused.info.metadata["limit"] == str(4 * MIB)
        assert int(refused.info.metadata["size"]) > 4 * MIB
        with refused("TOO_LARGE", EXHAUSTED):
            list(service.caller.stub.FetchChunks(pb.FetchChunksRequest(bank="b", chunk_ids=ids)))
        assert service.peak() - before < 64 * MIB
        assert service.retrieve(2) == 2
        assert service.caller.count(ids[0]) == 1, "what was refused counts nothing"


@needs_proc
def test_large_answers_at_once_are_bounded_together(serve: Any) -> None:
    with serve(max_message_bytes=32 * MIB, max_inflight_bytes=64 * MIB) as service, ThreadPoolExecutor(12) as threads:
        service.fill(16)
        before = service.peak()
        assert list(threads.map(service.retrieve, [16] * 12)) == [16] * 12
        assert service.peak() - before < 300 * MIB


def running(caller: Any) -> int:
    """Calls under way, without the one that asks."""
    samples = caller.stub.GetStats(pb.GetStatsRequest()).samples
    return sum(int(some.value) for some in samples if some.name == "kvbank_requests_running") - 1


def came(caller: Any, method: str, count: int) -> bool:
    """Tell whether so many calls of a method run or have ended."""
    names = ("kvbank_requests_running", "kvbank_request_seconds_count")
    return sum(caller.sample(name, method=method) for name in names) >= count


QUERY = np.ones(4, "<f4").tobytes()
LONG_ANSWERS: dict[str, Callable[[int], Any]] = {
    "Retrieve": lambda _: pb.RetrieveRequest(banks=["b"], embedder_digest="embedder-a", queries=QUERY),
    "GetChunk": lambda chunk_id: pb.GetChunkRequest(bank="b", chunk_id=chunk_id),
}


@pytest.mark.slow
@needs_proc
def test_answers_that_nobody_takes_are_bounded_together(serve: Any) -> None:
    """Two callers ask for 760 MB and take nothing of it; others are answered meanwhile."""
    with serve(max_inflight_bytes=32 * MIB, listen="127.0.0.1:0") as service:
        (chunk_id,) = service.fill(1)
        assert service.caller.usage().chunks == 1
        for method, request in LONG_ANSWERS.items():
            before = service.resident()
            with ExitStack() as callers:
                for _ in range(2):
                    address = callers.enter_context(Deaf(service.address)).address
                    channel = callers.enter_context(grpc.insecure_channel(address, options=OWN_CONNECTION))
                    # As a stream: an answer that is not a stream is taken before anybody asks for it.
                    ask = channel.unary_stream(f"/kvbank.v1.MemoryService/{method}")
                    callers.enter_context(cancelled([ask(request(chunk_id).SerializeToString()) for _ in range(200)]))
                # All came; on a slow machine the first have been ended, since their callers took nothing for 20 s.
                wait_until(partial(came, service.caller, method, 390), seconds=240)
                assert service.peak() - before < 160 * MIB, method
            wait_until(lambda: not running(service.caller))
            assert service.resident() - before < 128 * MIB, method


@contextmanager
def cancelled(calls: list[Any]) -> Iterator[None]:
    yield
    for call in calls:
        call.cancel()


def test_a_large_answer_is_searched_once_and_loaded_once(serve: Any) -> None:
    with serve(same_host=True) as service:
        service.fill(4)
        with kvbank.connect(service.address) as client:
            for one in ("over the stream", "directly"):
                before = passed(service.caller)
                if one == "directly":
                    found = client.retrieve("b", [1, 0, 0, 0], top_k=4, embedder_digest="embedder-a")
                    assert [len(chunk.text) for chunk in found.chunks.values()] == [len(TEXT)] * 4
                else:
                    assert service.retrieve(4) == 4
                now = passed(service.caller)
                assert {stage: now[stage] - before[stage] for stage in now} == {"search": 1, "load": 1}, one


def passed(caller: Any) -> dict[str, int]:
    """Count how often answers have been searched and loaded."""
    samples = caller.stub.GetStats(pb.GetStatsRequest()).samples
    stages = {some.labels["stage"]: some.value for some in samples if some.name == "kvbank_stage_seconds_count"}
    return {stage: int(stages[stage]) for stage in ("search", "load")}


def test_a_stop_does_not_wait_for_large_answers(serve: Any) -> None:
    with serve(grace=1) as service, ThreadPoolExecutor(6) as threads:
        service.fill(24)

        def ask_until_it_ends(_: int) -> grpc.StatusCode:
            while True:
                try:
                    service.retrieve(24)
                except grpc.RpcError as error:
                    return error.code()

        asking = [threads.submit(ask_until_it_ends, number) for number in range(6)]
        service.retrieve(24)
        assert service.service.stop() == 0
        assert all(ended.result() != grpc.StatusCode.OK for ended in asking)


def test_an_explanation_is_no_longer_than_a_message(caller: Any) -> None:
    """Explanations name the first victims where the metadata are long."""
    caller.create("c", layers=[], capacity={"chunks": 400})
    chunks = [caller.chunk(layers=[]) for _ in range(400)]
    for chunk, _ in chunks:
        chunk.metadata["note"] = "x" * 30_000
    ids = [ack.chunk_id for ack in caller.write(*chunks, bank="c")]
    answer = caller.stub.ExplainEviction(pb.ExplainEvictionRequest(bank="c", need=400))
    assert answer.explanation.startswith("400 of 400 chunks would go")
    assert 3 * MIB < answer.ByteSize() < 8 * MIB
    named = [victim.chunk_id for victim in answer.victims]
    assert named == ids[: len(named)]


ASKING: dict[str, Callable[[Any], object]] = {
    "Retrieve": lambda caller: caller.retrieve(),
    "FetchChunks": lambda caller: caller.fetch(1),
    "GetChunk": lambda caller: caller.count(1),
    "ListChunks": lambda caller: caller.ids(),
}


@pytest.mark.parametrize("method", ASKING)
def test_others_are_answered_while_an_answer_is_made(serving: Callable[..., Any], method: str) -> None:
    """However long that takes."""
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert go_on.wait(30)

    caller = serving(pauses=Pauses(at={"answer": wait}))
    caller.create()
    assert caller.add() == 1
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(ASKING[method], caller)
        try:
            assert begun.wait(60)
            caller.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=20)
            assert caller.usage().chunks == 1
        finally:
            go_on.set()
        asked.result()
