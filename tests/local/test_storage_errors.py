"""A disk that fails or is full: what callers are told, and that no half of a write is left."""

import errno
import os
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from sqlalchemy.exc import OperationalError

from kvbank.v1 import service_pb2 as pb
from memory_service.api.messages.status import to_service_error
from memory_service.domain.limits import Pauses
from memory_service.storage.local.records import failures
from tests.support.store import new_bank
from tests.support.waiting import wait_until

EXHAUSTED, UNAVAILABLE = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE


def test_chunks_without_tensors_are_held_back_too(serving, frames):
    """Streams of headers alone fill the window like any other; the caller's next headers wait in the caller."""
    window, size = 1024 * 1024, 200_000
    caller = serving(max_unacknowledged_bytes=window)
    caller.create(layers=())
    hold, sent = threading.Event(), []

    def taken():
        return caller.sample("kvbank_in_flight_bytes")

    def chunks():
        for number in range(300):
            sent.append(number)
            yield from frames(*caller.chunk(layers=(), text="x" * size))

    serving.server.banks.store.in_order(new_bank(), hold.wait)
    stream = caller.stub.WriteChunks(chunks())
    wait_until(lambda: taken() > window - 2 * size)
    # The service reads what comes between two calls, and would take more with each of these.
    assert max(taken() for _ in range(100)) <= window
    held_back = len(sent)
    hold.set()
    assert len(list(stream)) == 300
    assert held_back < 100


def test_disk_full_refuses_writes_only(serving, refused):
    caller = serving()
    caller.create()
    chunk_id = caller.add()
    caller = serving(min_free=1 << 60)
    growing = {
        "a chunk": caller.add,
        "a bank": lambda: caller.create("c"),
        "metadata of a bank": lambda: caller.update(metadata={"a": "b"}),
        "metadata of a chunk": lambda: caller.stub.UpdateChunk(
            pb.UpdateChunkRequest(bank="b", chunk_id=chunk_id, metadata={"a": "b"})
        ),
    }
    for what, grow in growing.items():
        with refused("DISK_FULL", EXHAUSTED):
            print(what)
            grow()
    assert caller.create().name == "b"
    caller.update(capacity={"chunks": 1})
    assert list(caller.retrieve()[1]) == [chunk_id]
    assert caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[chunk_id])).deleted == 1


def disks(monkeypatch, **free):
    """Let so many bytes be free, in the folder `payloads` and in any other."""

    def statvfs(folder):
        return SimpleNamespace(f_frsize=1, f_bavail=free["payloads" if Path(folder).name == "payloads" else "records"])

    monkeypatch.setattr(os, "statvfs", statvfs)


@pytest.mark.parametrize("full", ["payloads", "records"])
def test_each_disk_is_asked_for_what_goes_there(serving, refused, monkeypatch, data, other_disk, full):
    """Payloads lie on a disk of their own, behind a link."""
    data.mkdir()
    (data / "payloads").symlink_to(other_disk)
    caller = serving(min_free=1000)
    caller.create()
    caller.create("v", layers=[])
    disks(monkeypatch, **{"payloads": 10**9, "records": 10**9, full: 1100})
    with refused("DISK_FULL", EXHAUSTED):
        caller.add(text="a" * 200)
    assert (refused.info.metadata["free"], refused.info.metadata["min_free"]) == ("1100", "1000")
    if full == "payloads":
        caller.add(bank="v", layers=[], text="a" * 200)
    serving.stop()


def test_writers_at_the_same_time_do_not_count_on_the_same_bytes(serving, monkeypatch):
    """Room is left for two chunks of eight."""
    looked, all_looked = [], threading.Event()

    def reserved():
        looked.append(1)
        if len(looked) == len(chunks):
            all_looked.set()

    pauses = Pauses(at={"space reserved": reserved, "object stored": lambda: all_looked.wait(60)})
    caller = serving(min_free=1000, storage_threads=8, pauses=pauses)
    caller.create()
    chunks = [caller.chunk(m=5) for _ in range(8)]
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_frsize=1, f_bavail=1400 + 2 * len(chunks[0][1])))
    with ThreadPoolExecutor(8) as threads:
        written = [threads.submit(caller.write, chunk) for chunk in chunks]
    assert all_looked.is_set()
    assert sum(write.exception() is None for write in written) == 2 == caller.usage().chunks


@pytest.mark.parametrize(
    ("number", "reason", "code"), [(errno.ENOSPC, "DISK_FULL", EXHAUSTED), (errno.EIO, "STORAGE_ERROR", UNAVAILABLE)]
)
def test_storage_fails(serving, refused, number, reason, code):
    def fail() -> None:
        raise OSError(number, "injected")

    caller = serving(pauses=Pauses(at=(points := {"object stored": fail})))
    caller.create()
    with refused(reason, code):
        caller.add()
    points.clear()
    caller.add()


def test_full_disk_leaves_no_half_chunk(caller, refused, data, monkeypatch):
    def fail(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "injected")

    caller.add()
    before = sorted((data / "payloads").rglob("*.*"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", fail)
        with refused("DISK_FULL", EXHAUSTED):
            caller.add()
    assert sorted((data / "payloads").rglob("*.*")) == before


def test_defects_do_not_leak(serving, refused, caplog):
    def fail() -> None:
        raise RuntimeError("secret")

    caller = serving(pauses=Pauses(at=(points := {"object stored": fail})))
    caller.create()
    with refused("INTERNAL", grpc.StatusCode.INTERNAL):
        caller.add()
    assert "secret" not in refused.message
    assert refused.info.metadata["request_id"] in caplog.text
    assert "secret" in caplog.text
    points.clear()
    caller.add()


def test_database_errors_are_storage_errors():
    failures.register()
    full = sqlite3.OperationalError("full")
    full.sqlite_errorcode, full.sqlite_errorname = 13, "SQLITE_FULL"
    assert to_service_error(OperationalError("", {}, full)).reason == "DISK_FULL"
    broken = sqlite3.OperationalError("io")
    broken.sqlite_errorcode, broken.sqlite_errorname = 10, "SQLITE_IOERR"
    assert to_service_error(OperationalError("", {}, broken)).reason == "STORAGE_ERROR"
