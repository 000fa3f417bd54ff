"""What the streams hold and let go: budgets, back-pressure, answers that go wrong half-way, memory that stays flat."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvbank.v1 import service_pb2 as pb
from memory_service.api import budget
from memory_service.api.budget import SMALL, Budget
from memory_service.operations.reading import Recall
from memory_service.storage import verify
from memory_service.storage.verify import OpenFiles

MIB = 1024 * 1024
BIG = {"m": 65_536, "original_length": 65_536, "token_ids": ()}  # 8.5 MiB


def written(caller: Any, chunk: Any, data: bytes) -> int:
    """In one data frame."""
    (ack,) = caller.stub.WriteChunks(caller.frames(chunk, data))
    return ack.chunk_id


# The budget


def nobody() -> None:
    pytest.fail("nobody is to be ended")


def test_a_budget_is_given_in_order_and_one_piece_at_a_time_goes_beyond_it() -> None:
    async def run() -> list[str]:
        budget, order = Budget(8), []  # 7 for what is not small

        async def use(name: str, size: int) -> None:
            share = await budget.take(size, nobody, whole=2 * SMALL)
            order.append(name)
            await asyncio.sleep(0)
            share.give()

        first = await budget.take(6, nobody, whole=2 * SMALL)
        beyond = await budget.take(50, nobody, whole=2 * SMALL)
        tasks = [asyncio.create_task(use(name, size)) for name, size in (("large", 60), ("little", 1), ("other", 6))]
        await asyncio.sleep(0)
        assert order == []
        beyond.give()
        first.give()
        await asyncio.gather(*tasks)
        assert budget.taken == 0
        return order

    assert asyncio.run(run()) == ["large", "little", "other"]


def test_shares_that_grow_do_not_wait_for_each_other() -> None:
    """Both have begun, neither can be finished within the bound: one goes beyond it, to its end."""

    async def run() -> None:
        budget = Budget(16)
        shares = [await budget.take(7, nobody, whole=2 * SMALL) for _ in range(2)]
        growing = [asyncio.create_task(share.grow(5)) for share in shares]
        await growing[0]
        await shares[0].grow(5)
        assert not growing[1].done()
        shares[0].give()
        await growing[1]
        shares[1].give()
        assert budget.taken == 0

    asyncio.run(run())


def test_what_is_small_does_not_wait_for_what_is_large() -> None:
    async def run() -> None:
        budget = Budget(80 * SMALL)
        await budget.take(70 * SMALL, nobody)
        await budget.take(2 * SMALL, nobody)  # beyond
        waiting = asyncio.create_task(budget.take(2 * SMALL, nobody))
        await asyncio.sleep(0)
        assert not waiting.done()
        (await budget.take(SMALL, nobody)).give()
        waiting.cancel()

    asyncio.run(run())


def test_who_gives_up_waiting_holds_nothing_and_lets_the_next_one_pass() -> None:
    async def run() -> None:
        budget = Budget(16)
        beyond, first = await budget.take(20, nobody, whole=2 * SMALL), None
        waiting = asyncio.create_task(budget.take(9, nobody, whole=2 * SMALL))
        behind = asyncio.create_task(budget.take(2, nobody, whole=2 * SMALL))
        await asyncio.sleep(0)
        waiting.cancel()
        beyond.give()
        beyond.give()
        first = await behind
        assert budget.taken == 2
        first.give()
        assert budget.taken == 0

    asyncio.run(run())


def test_a_connection_that_holds_less_comes_first_and_none_holds_more_than_half() -> None:
    async def run() -> None:
        budget, order = Budget(16), []

        async def use(owner: str, size: int) -> None:
            share = await budget.take(size, nobody, whole=2 * SMALL, owner=owner)
            order.append(owner)
            share.give()

        greedy = await budget.take(7, nobody, whole=2 * SMALL, owner="greedy")
        beyond = await budget.take(8, nobody, whole=2 * SMALL, owner="beyond")
        tasks = [asyncio.create_task(use(owner, 3)) for owner in ("greedy", "greedy", "beyond", "new")]
        await asyncio.sleep(0)
        assert order == []
        beyond.give()
        await asyncio.gather(*tasks[2:])
        assert order[0] == "beyond", "both hold nothing, and it came first"
        assert not tasks[0].done() or order.index("new") < order.index("greedy")
        greedy.give()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_a_caller_who_stalls_is_ended_when_others_wait_and_not_before() -> None:
    async def run() -> None:
        budget, ended = Budget(16, stalled=0.05), asyncio.Event()
        stalled = await budget.take(7, ended.set, whole=2 * SMALL)
        ours = await budget.take(8, nobody, whole=2 * SMALL)
        ours.ours()
        assert not ended.is_set()
        waiting = asyncio.create_task(budget.take(5, nobody, whole=2 * SMALL))
        while not ended.is_set():
            stalled.progress(1)  # next to nothing
            await asyncio.sleep(0.01)
        stalled.give()
        ours.give()
        await waiting

    asyncio.run(run())


# Writing


def test_acks_come_in_order_whatever_the_sizes(caller: Any, frames: Callable[..., Any]) -> None:
    chunks = [caller.chunk(**(BIG if i % 5 == 0 else {})) for i in range(15)]
    requests = [frame for chunk, data in chunks for frame in frames(chunk, data, step=MIB)]
    acks = list(caller.stub.WriteChunks(iter(requests)))
    assert [ack.idempotency_key for ack in acks] == [chunk.idempotency_key for chunk, _ in chunks]


def test_what_came_before_a_refused_chunk_is_acknowledged(
    caller: Any, frames: Callable[..., Any], refused: Any
) -> None:
    caller.create("v", layers=())
    good = [caller.chunk(layers=(), stored_length=0) for _ in range(50)]
    bad = caller.chunk((1, 0), layers=(), stored_length=0)
    requests = [frame for chunk, data in (*good, bad, *good) for frame in frames(chunk, data, "v")]
    acks: list[Any] = []
    with refused("INVALID_FIELD", grpc.StatusCode.INVALID_ARGUMENT):
        for ack in caller.stub.WriteChunks(iter(requests)):
            acks.append(ack)
    assert [ack.idempotency_key for ack in acks] == [chunk.idempotency_key for chunk, _ in good]
    assert caller.usage("v").chunks == 50


def test_chunks_that_are_never_finished_keep_nothing(serving: Callable[..., Any], frames: Callable[..., Any]) -> None:
    """Room for two such chunks at once; forty are begun, and their callers go."""
    caller = serving(max_inflight_bytes=20 * MIB)
    caller.create()
    chunk, data = caller.chunk(**BIG)
    for _ in range(20):
        begun, received = iter(frames(chunk, data, step=MIB)), []

        def some() -> Iterator[Any]:
            for _ in range(3):
                yield next(begun)  # noqa: B023
            received.append(True)  # noqa: B023
            yield next(begun)  # noqa: B023

        call = caller.stub.WriteChunks(some())
        while not received and call.is_active():
            pass
        call.cancel()
    assert written(caller, chunk, data)


def test_writers_wait_for_the_budget_of_the_server(serving: Callable[..., Any]) -> None:
    """A budget smaller than any chunk: one at a time, and every one of them."""
    caller = serving(max_inflight_bytes=1)
    caller.create()
    chunks = [caller.chunk() for _ in range(30)]
    calls = [caller.stub.WriteChunks(iter(list(caller.frames(chunk, data)))) for chunk, data in chunks]
    ids = {ack.chunk_id for call in calls for ack in call}
    assert len(ids) == 30


def test_a_server_that_shares_nothing_takes_no_staged_file(caller: Any, refused: Any) -> None:
    chunk, _ = caller.chunk()
    staged = pb.StagedPayload(name="0" * 32, offset=4096, proof=b"n")
    header = pb.ChunkHeader(
        bank="b", reader_digest="reader-a", embedder_digest="embedder-a", chunk=chunk, staged=staged
    )
    with refused("STAGED_FILE", grpc.StatusCode.FAILED_PRECONDITION):
        list(caller.stub.WriteChunks(iter([pb.WriteChunksRequest(header=header)])))
    assert not caller.stub.GetServerInfo(pb.GetServerInfoRequest()).HasField("same_host")
    assert caller.ids() == []


def test_a_server_that_shares_nothing_names_no_files(caller: Any, refused: Any) -> None:
    chunk_id = caller.add()
    fetch = pb.FetchChunksRequest(bank="b", reader_digest="reader-a", chunk_ids=[chunk_id])
    retrieve = pb.RetrieveRequest(banks=["b"], reader_digest="reader-a", embedder_digest="embedder-a")
    with refused("NOT_SAME_HOST", grpc.StatusCode.FAILED_PRECONDITION):
        caller.stub.FetchFiles(pb.FetchFilesRequest(fetch=fetch))
    with refused("NOT_SAME_HOST", grpc.StatusCode.FAILED_PRECONDITION):
        caller.stub.RetrieveFiles(pb.RetrieveFilesRequest(retrieve=retrieve, proof=b"n"))


# Reading


def test_callers_that_do_not_read_hold_little_and_stop_nobody_else_from_writing(
    serving: Callable[..., Any],
) -> None:
    caller = serving(max_inflight_bytes=8 * MIB)
    caller.create()
    ids = [written(caller, *caller.chunk(**BIG)) for _ in range(2)]
    request = pb.FetchChunksRequest(bank="b", reader_digest="reader-a", chunk_ids=ids)
    idle = [caller.stub.FetchChunks(request) for _ in range(6)]
    begun = [next(iter(call)) for call in idle]
    assert all(first.HasField("header") for first in begun)
    assert caller.add()
    for call in idle:
        call.cancel()
    assert set(caller.fetch(*ids)) == set(ids)


def test_damage_behind_the_first_frames_ends_the_stream(
    caller: Any, payload_path: Callable[[int], Path], refused: Any
) -> None:
    chunk_id = written(caller, *caller.chunk(**BIG))
    with open(payload_path(chunk_id), "r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"\xff\xff")
    request = pb.FetchChunksRequest(bank="b", reader_digest="reader-a", chunk_ids=[chunk_id])
    answers = caller.stub.FetchChunks(request)
    assert next(answers).header.chunks
    with refused("CHECKSUM_MISMATCH", grpc.StatusCode.DATA_LOSS):
        list(answers)
    assert caller.ids() == []
    assert caller.usage().chunks_quarantined == 1


def test_a_chunk_deleted_while_it_is_sent_comes_whole(caller: Any, payload_path: Callable[[int], Path]) -> None:
    chunk, data = caller.chunk(**BIG)
    chunk_id = written(caller, chunk, data)
    path = payload_path(chunk_id)
    request = pb.FetchChunksRequest(bank="b", reader_digest="reader-a", chunk_ids=[chunk_id])
    answers = caller.stub.FetchChunks(request)
    next(answers)
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[chunk_id]))
    path.unlink(missing_ok=True)
    assert b"".join(frame.data for frame in answers) == data


def test_more_files_than_may_be_open_at_once(serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenFiles.__init__, "__defaults__", (3,))
    caller = serving()
    caller.create()
    ids = [caller.add() for _ in range(20)]
    for _ in range(3):
        assert set(caller.fetch(*ids)) == set(ids)
        assert len(caller.retrieve(top_k=20)[1]) == 20


def open_payloads(data: Path) -> int:
    """Files of chunks that this process, and so the server in it, holds open."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            found += os.readlink(f"/proc/self/fd/{name}").startswith(f"{data}/payloads/")
    return found


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end


def running(caller: Any, method: str) -> bool:
    samples = caller.stub.GetStats(pb.GetStatsRequest()).samples
    return any(s.value for s in samples if s.name == "kvbank_requests_running" and s.labels["method"] == method)


def test_a_caller_who_goes_while_files_are_opened_leaves_none_open(
    caller: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk_id = caller.add()
    opened, gone = threading.Event(), threading.Event()
    fetch = Recall.fetch

    def slow(*arguments: Any, **options: Any) -> Any:
        found = fetch(*arguments, **options)
        opened.set()
        gone.wait(10)
        return found

    monkeypatch.setattr(Recall, "fetch", slow)
    request = pb.FetchChunksRequest(bank="b", reader_digest="reader-a", chunk_ids=[chunk_id])
    call = caller.stub.FetchChunks(request)
    assert opened.wait(10)
    call.cancel()
    until(lambda: not running(caller, "FetchChunks"))
    assert open_payloads(data) == 1
    gone.set()
    until(lambda: open_payloads(data) == 0)


def test_a_file_that_is_being_read_is_not_closed_when_its_caller_goes(
    caller: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the number of its descriptor may soon be that of another file, whose bytes would pass for damage."""
    chunk_id = written(caller, *caller.chunk(**BIG))
    reads: list[int] = []
    reading, gone = threading.Event(), threading.Event()
    read_all = verify.read_all

    def slow(descriptor: int, room: memoryview, offset: int) -> int:
        reads.append(offset)
        if len(reads) == 3:  # what comes after the first two frames, which nobody takes
            reading.set()
            gone.wait(10)
        return read_all(descriptor, room, offset)

    monkeypatch.setattr(verify, "read_all", slow)
    request = pb.FetchChunksRequest(bank="b", reader_digest="reader-a", chunk_ids=[chunk_id])
    call = caller.stub.FetchChunks(request)
    assert next(iter(call)).HasField("header")
    assert reading.wait(10)
    call.cancel()
    for _ in range(20):  # the server learns of it between these
        running(caller, "FetchChunks")
        assert open_payloads(data) == 1
    gone.set()
    until(lambda: open_payloads(data) == 0)
    until(lambda: not running(caller, "FetchChunks"))
    assert caller.ids() == [chunk_id]


def test_small_chunks_share_frames(caller: Any) -> None:
    ids = [caller.add() for _ in range(40)]
    _, *frames = caller.stub.FetchChunks(pb.FetchChunksRequest(bank="b", reader_digest="reader-a", chunk_ids=ids))
    assert len(frames) == 1


# Who keeps others waiting

LARGE = {"m": 16_384, "original_length": 16_384, "token_ids": ()}  # 2.1 MiB
PACE_S = 0.05


class Trickle:
    """A write of a chunk that sends all but its last bytes, and then next to nothing."""

    def __init__(self, caller: Any, size: int | None = None, **options: Any) -> None:
        chunk, data = caller.chunk(**(LARGE | options))
        begun = data[: len(data) - 100 if size is None else size]
        self.acks: list[Any] = []
        self.sent, self._over = threading.Event(), threading.Event()
        self._call = caller.stub.WriteChunks(self._frames(next(caller.frames(chunk, data)), begun))

    def _frames(self, header: Any, begun: bytes) -> Iterator[Any]:
        yield header
        for begin in range(0, len(begun), MIB):
            yield pb.WriteChunksRequest(data=begun[begin : begin + MIB])
        self.sent.set()
        while not self._over.wait(PACE_S):
            yield pb.WriteChunksRequest(data=b"")

    def end(self) -> grpc.RpcError:
        """How the call ended."""
        with pytest.raises(grpc.RpcError) as caught:
            list(self._call)
        self._over.set()
        return caught.value

    def cancel(self) -> None:
        self._over.set()
        self._call.cancel()


def test_headers_alone_keep_nobody_waiting(caller: Any) -> None:
    """Each says that 8.5 MiB follow, more than all that may be held; not one is ended for that."""
    idle = [Trickle(caller, 0, **BIG) for _ in range(40)]
    for each in idle:
        assert each.sent.wait(30)
    chunk, data = caller.chunk(**BIG)
    assert written(caller, chunk, data)
    assert all(each._call.is_active() for each in idle)
    for each in idle:
        each.cancel()


def test_who_sends_next_to_nothing_does_not_keep_others_waiting_and_is_told(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "STALLED_S", 0.5)
    caller = serving(max_inflight_bytes=4 * MIB)
    caller.create()
    slow = [Trickle(caller) for _ in range(5)]
    assert slow[0].sent.wait(30)
    chunk, data = caller.chunk(**LARGE)
    assert written(caller, chunk, data)
    ended = [each.end() for each in slow[:1]]
    for each in slow[1:]:
        each.cancel()
    assert ended[0].code() == grpc.StatusCode.UNAVAILABLE
    assert "others waited" in str(ended[0].details())


def test_an_answer_that_nobody_takes_keeps_nobody_waiting_and_its_caller_is_told(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "STALLED_S", 0.5)
    caller = serving(max_inflight_bytes=4 * MIB)
    caller.create()
    ids = [written(caller, *caller.chunk(**BIG)) for _ in range(2)]
    request = pb.FetchChunksRequest(bank="b", reader_digest="reader-a", chunk_ids=ids)
    idle = [iter(caller.stub.FetchChunks(request)) for _ in range(4)]
    for answers in idle:
        assert next(answers).HasField("header")
    assert sum(len(frame.data) for frame in caller.stub.FetchChunks(request)) > 16 * MIB
    with pytest.raises(grpc.RpcError) as caught:
        [list(answers) for answers in idle]
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "others waited" in str(caught.value.details())


# Memory


def resident(process: int) -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def passed_through(data: Path, connect: Callable[..., Any], frames: Callable[..., Any], total: int) -> int:
    """Write `total` bytes to a server of its own, in chunks of 8.5 MiB, and fetch each; by how much it grew since the
    first 100 MiB."""
    ready = data.with_suffix(".ready")
    command = [sys.executable, "-m", "memory_service", "--data", str(data), "--listen", "127.0.0.1:0"]
    command += ["--ready-file", str(ready), "--durability", "os"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not ready.exists():
                assert process.poll() is None
            with connect(ready.read_text().strip()) as caller:
                caller.create(capacity={"chunks": 10})
                chunk, data_ = caller.chunk(**BIG)
                before = done = 0
                while done < total:
                    chunk.idempotency_key = done.to_bytes(16, "big")
                    (ack,) = caller.stub.WriteChunks(frames(chunk, data_, step=MIB))
                    for _ in caller.stub.FetchChunks(
                        pb.FetchChunksRequest(bank="b", reader_digest="reader-a", chunk_ids=[ack.chunk_id])
                    ):
                        pass
                    done += len(data_)
                    if not before and done > 100 * MIB:
                        before = resident(process.pid)
                return resident(process.pid) - before
        finally:
            process.terminate()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_memory_of_the_server_stays_flat(
    tmp_path: Path, connect: Callable[..., Any], frames: Callable[..., Any]
) -> None:
    assert passed_through(tmp_path / "data", connect, frames, 500 * MIB) < 64 * MIB


# Chunks that go together


def together(caller: Any, *chunks: Any) -> pb.WriteChunksRequest:
    """One request with the headers of several chunks."""
    headers = [next(caller.frames(chunk, b"")).header for chunk, _ in chunks]
    return pb.WriteChunksRequest(headers=pb.ChunkHeaders(headers=headers))


def acks_of(call: Any) -> Iterator[pb.WriteChunksResponse]:
    for response in call:
        yield response
        yield from response.more


def test_headers_that_come_together_are_acknowledged_in_order(caller: Any) -> None:
    caller.create("c", layers=[])
    chunks = [caller.chunk(layers=[]) for _ in range(600)]
    requests = [together(caller, *chunks[:400]), together(caller), together(caller, *chunks[400:])]
    for request in requests:
        for header in request.headers.headers:
            header.bank = "c"
    acks = list(acks_of(caller.stub.WriteChunks(iter(requests))))
    assert [ack.idempotency_key for ack in acks] == [chunk.idempotency_key for chunk, _ in chunks]
    assert [ack.chunk_id for ack in acks] == caller.ids_of_all("c")


def test_a_refusal_in_the_middle_comes_behind_the_acks_before_it(caller: Any, refused: Any) -> None:
    caller.create("c", layers=[])
    chunks = [caller.chunk(layers=[], embedding=bytes(8) if place == 3 else bytes(16)) for place in range(5)]
    request = together(caller, *chunks)
    for header in request.headers.headers:
        header.bank = "c"
    acks = []
    with refused("INVALID_FIELD", grpc.StatusCode.INVALID_ARGUMENT):
        acks.extend(acks_of(caller.stub.WriteChunks(iter([request]))))
    assert len(acks) == len(caller.ids("c")) == 3


def test_a_chunk_with_bytes_to_come_does_not_come_with_others(caller: Any, refused: Any) -> None:
    with refused("INVALID_FIELD", grpc.StatusCode.INVALID_ARGUMENT):
        list(caller.stub.WriteChunks(iter([together(caller, caller.chunk())])))
    assert refused.info.metadata["field"] == "headers"
    assert caller.ids() == []
