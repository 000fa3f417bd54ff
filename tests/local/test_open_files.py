"""Files that are open while they are sent: damaged, deleted, too many, and left by their callers."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc

from kvbank.v1 import service_pb2 as pb
from memory_service.domain.limits import Limits, Pauses
from tests.support.caller import BIG


def test_damage_behind_the_first_frames_ends_the_stream(
    caller: Any, payload_path: Callable[[int], Path], refused: Any
) -> None:
    chunk_id = caller.write_at_once(*caller.chunk(**BIG))
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
    chunk_id = caller.write_at_once(chunk, data)
    path = payload_path(chunk_id)
    request = pb.FetchChunksRequest(bank="b", reader_digest="reader-a", chunk_ids=[chunk_id])
    answers = caller.stub.FetchChunks(request)
    next(answers)
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[chunk_id]))
    path.unlink(missing_ok=True)
    assert b"".join(frame.data for frame in answers) == data


def test_more_files_than_may_be_open_at_once(serving: Callable[..., Any]) -> None:
    caller = serving(limits=Limits(open_files=3))
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


def test_a_caller_who_goes_while_files_are_opened_leaves_none_open(serving: Callable[..., Any], data: Path) -> None:
    opened, gone = threading.Event(), threading.Event()

    def wait() -> None:
        opened.set()
        gone.wait(10)

    caller = serving(pauses=Pauses(at={"answer opened": wait}))
    caller.create()
    chunk_id = caller.add()
    request = pb.FetchChunksRequest(bank="b", reader_digest="reader-a", chunk_ids=[chunk_id])
    call = caller.stub.FetchChunks(request)
    assert opened.wait(10)
    call.cancel()
    until(lambda: not running(caller, "FetchChunks"))
    assert open_payloads(data) == 1
    gone.set()
    until(lambda: open_payloads(data) == 0)


def test_a_file_that_is_being_read_is_not_closed_when_its_caller_goes(serving: Callable[..., Any], data: Path) -> None:
    """Else the number of its descriptor may soon be that of another file, whose bytes would pass for damage."""
    reads: list[None] = []
    reading, gone = threading.Event(), threading.Event()

    def wait() -> None:
        reads.append(None)
        if len(reads) == 3:  # what comes after the first two frames, which nobody takes
            reading.set()
            gone.wait(10)

    caller = serving(pauses=Pauses(at={"bytes read": wait}))
    caller.create()
    chunk_id = caller.write_at_once(*caller.chunk(**BIG))
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


def test_a_caller_who_goes_in_the_middle_of_an_answer_leaves_no_file_open(caller: Any, data: Path) -> None:
    ids = [caller.write_at_once(*caller.chunk(**BIG)) for _ in range(2)]
    answers = caller.stub.FetchChunks(pb.FetchChunksRequest(bank="b", reader_digest="reader-a", chunk_ids=ids))
    next(answers)
    assert open_payloads(data)
    answers.cancel()
    until(lambda: not open_payloads(data))


def test_an_answer_that_fits_in_no_message_leaves_no_file_open(
    serving: Callable[..., Any], data: Path, refused: Any
) -> None:
    """Characters are counted before the files are opened, and bytes when the header is made."""
    caller = serving(max_message_bytes=4 << 20)
    caller.create()
    ids = [caller.add(text="\N{SNOWMAN}" * 650_000) for _ in range(3)]
    for ask in (lambda: caller.fetch(*ids), caller.retrieve):
        with refused("TOO_LARGE", grpc.StatusCode.RESOURCE_EXHAUSTED):
            ask()
        until(lambda: not open_payloads(data))
