"""What `kvbank serve` logs: one line a record, with the request that it belongs to."""

import errno
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

import kvbank
from kvbank.v1 import service_pb2 as pb
from memory_service import repeating
from memory_service.repeating import Repeating

Serve = Callable[..., Any]


@pytest.fixture
def serve(tmp_path: Path, connect: Any) -> Serve:
    """Serve in a process of its own; yields a caller and, once it has ended, the lines that it wrote to stderr."""

    @contextmanager
    def serving(*options: str) -> Iterator[tuple[Any, str, list[str]]]:
        lines: list[str] = []
        command = [sys.executable, "-m", "memory_service", "--data", tmp_path / "data", "--listen", "127.0.0.1:0"]
        with (tmp_path / "log").open("w+") as log:
            process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=log, text=True)
            assert process.stdout is not None
            with process:
                address = process.stdout.readline().rpartition(" on ")[2].strip()
                with connect(address) as caller:
                    yield caller, address, lines
                process.terminate()
            log.seek(0)
            lines += log.read().splitlines()

    return serving


def test_json_names_the_request(serve: Serve) -> None:
    with serve("--log-format", "json", "--log-level", "debug") as (caller, address, lines):
        caller.create()
        caller.add()
        with pytest.raises(grpc.RpcError):
            caller.stub.GetBank(pb.GetBankRequest(name="nobody"), metadata=(("x-request-id", "my-id.1"),))
        with kvbank.connect(address) as client, pytest.raises(kvbank.BankNotFound) as caught:
            client.get_bank("somebody")
    records = [json.loads(line) for line in lines]
    assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)
    by_bank = {record["bank"]: record for record in records if record.get("method") == "GetBank"}
    assert by_bank["nobody"]["request_id"] == "my-id.1"
    assert by_bank["nobody"]["level"] == "DEBUG"
    assert "BANK_NOT_FOUND" in by_bank["nobody"]["message"]
    assert by_bank["somebody"]["request_id"] == caught.value.request_id != ""
    (write,) = [record for record in records if record.get("method") == "WriteChunks"]
    assert (write["bank"], write["message"][:2]) == ("b", "OK")
    assert len({record["request_id"] for record in records if "request_id" in record}) >= 4


@pytest.mark.parametrize("form", ["json", "text"])
def test_trouble_is_logged_with_its_request(serve: Serve, tmp_path: Path, form: str) -> None:
    with serve("--log-format", form) as (caller, address, lines):
        caller.create()
        chunk_id = caller.add()
        (path,) = (tmp_path / "data" / "payloads").glob(f"*/*/{chunk_id}.safetensors")
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        with kvbank.connect(address) as client, pytest.raises(kvbank.DataLoss) as caught:
            client.fetch("b", [chunk_id], reader_digest="reader-a")
    assert any("quarantined" in line for line in lines), lines
    for line in lines:
        assert caught.value.request_id in line, "from the storage thread too"
        assert "FetchChunks" in line
    if form == "json":
        assert {json.loads(line)["bank"] for line in lines} == {"b"}
        assert {json.loads(line)["level"] for line in lines} == {"WARNING", "ERROR"}


def test_an_error_of_the_storage_has_a_traceback(serve: Serve, tmp_path: Path) -> None:
    with serve("--log-format", "json") as (caller, _, lines):
        uid = caller.create().uid
        (tmp_path / "data" / "payloads" / uid).write_text("a file where a folder should be")
        with pytest.raises(grpc.RpcError) as caught:
            caller.write(caller.chunk())
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    (error,) = [record for record in map(json.loads, lines) if record["level"] == "ERROR"]
    assert (error["method"], error["bank"]) == ("WriteChunks", "b")
    assert "Traceback" in error["error"]


def test_what_repeats_is_said_once_a_second(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now, failures, log = [0.0], Repeating(), logging.getLogger("memory_service.test")
    monkeypatch.setattr(repeating, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def said(error: OSError) -> list[tuple[str, bool]]:
        caplog.clear()
        failures.error(log, error, "it failed")
        return [(record.getMessage(), bool(record.exc_info)) for record in caplog.records]

    full, broken = OSError(errno.ENOSPC, "no room", "a"), OSError(errno.EIO, "bad", "b")
    assert said(full) == said(broken) == [("it failed", True)]
    assert said(OSError(errno.ENOSPC, "no room", "another file")) == said(full) == []
    now[0] += 1
    assert said(full) == [("it failed, again: OSError: no room (2 more were not logged)", False)]
    now[0] += 60
    assert said(full) == [("it failed", True)]


def test_a_caller_cannot_forge_a_line(serve: Serve) -> None:
    forged = "x\n2026-01-01T00:00:00.000+00:00 ERROR forged: all is lost"
    with serve("--log-level", "debug") as (caller, _, lines):
        for request_id in ("two words", "x" * 65, ""):
            with pytest.raises(grpc.RpcError):
                caller.stub.GetBank(pb.GetBankRequest(name=forged), metadata=(("x-request-id", request_id),))
    assert lines
    for line in lines:
        assert " memory_service." in line.partition(": ")[0]
        assert "two words" not in line
        assert "x" * 65 not in line


def test_what_callers_do_wrong_is_no_warning(serve: Serve) -> None:
    with serve("--log-level", "warning") as (caller, _, lines):
        caller.create()
        caller.add()
        caller.retrieve()
        with pytest.raises(grpc.RpcError):
            caller.stub.GetBank(pb.GetBankRequest(name="nobody"))
    assert lines == []
