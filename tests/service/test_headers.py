"""What an answer says before its bytes is bounded before it is loaded, and made where nobody waits for it."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvbank.v1 import service_pb2 as pb
from memory_service import convert

MIB = 1024 * 1024
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
TEXT = "x" * 1_900_000


class Service:
    """A server in a process of its own."""

    def __init__(self, caller: Any, process: "subprocess.Popen[str]") -> None:
        self.caller, self.process = caller, process

    def fill(self, count: int) -> list[int]:
        """Chunks with the longest text that is taken, and nothing else."""
        self.caller.create(layers=[])
        return [self.caller.add(layers=[], text=TEXT) for _ in range(count)]

    def retrieve(self, top_k: int) -> int:
        return len(self.caller.retrieve(top_k=top_k, reader_digest="")[0].chunks)

    def peak(self) -> int:
        """The most memory that the process has ever had, in bytes."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmHWM")


@pytest.fixture
def serve(tmp_path: Path, connect: Callable[..., Any]) -> Callable[..., Any]:
    @contextmanager
    def serving(**flags: int) -> Iterator[Service]:
        ready = tmp_path / "ready"
        command = [sys.executable, "-m", "memory_service", "--data", str(tmp_path / "data"), "--listen", "127.0.0.1:0"]
        command += ["--ready-file", str(ready), "--durability", "os"]
        command += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, text=True) as process:
            try:
                while not ready.exists():
                    assert process.poll() is None
                with connect(ready.read_text().strip()) as caller:
                    yield Service(caller, process)
            finally:
                process.terminate()

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


def test_a_stop_does_not_wait_for_large_answers(serve: Any) -> None:
    with serve(grace=1) as service, ThreadPoolExecutor(12) as threads:
        service.fill(24)

        def ask_until_it_ends(_: int) -> grpc.StatusCode:
            while True:
                try:
                    service.retrieve(24)
                except grpc.RpcError as error:
                    return error.code()

        asking = [threads.submit(ask_until_it_ends, number) for number in range(12)]
        service.retrieve(24)
        service.process.terminate()
        assert service.process.wait(60) == 0
        assert all(ended.result() != grpc.StatusCode.OK for ended in asking)


def test_an_explanation_is_no_longer_than_a_message(caller: Any) -> None:
    """Where the metadata are long it names the first victims."""
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
def test_others_are_answered_while_an_answer_is_made(caller: Any, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """However long that takes."""
    assert caller.add() == 1
    begun, go_on = threading.Event(), threading.Event()
    make = convert.chunk_message

    def slow(chunk: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return make(chunk)

    monkeypatch.setattr(convert, "chunk_message", slow)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(ASKING[method], caller)
        try:
            assert begun.wait(60)
            caller.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=20)
            assert caller.usage().chunks == 1
        finally:
            go_on.set()
        asked.result()
