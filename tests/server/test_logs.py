"""What `kvbank serve` logs: one line a record, with the request that it belongs to."""

import errno
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy
from grpc._cython.cygrpc import ExecuteBatchError
from sqlalchemy.exc import DBAPIError

import kvbank
from kvbank.v1 import service_pb2 as pb
from memory_service.observe import logs
from memory_service.observe.seldom import Repeating
from memory_service.storage.local.records import schema
from tests.support.service_process import ServiceHost
from tests.support.synced import wait_until_synced

Serve = Callable[..., Any]


@pytest.fixture
def serve(tmp_path: Path, connect: Any, services: ServiceHost) -> Serve:
    """Serve in a process of its own; yields a caller and, once it has ended, the lines that it wrote to stderr."""

    @contextmanager
    def serving(**flags: str) -> Iterator[tuple[Any, str, list[str]]]:
        lines: list[str] = []
        service = services.start(tmp_path / "data", listen="127.0.0.1:0", **flags)
        try:
            with connect(service.address) as caller:
                yield caller, service.address, lines
        finally:
            service.stop()
        serves, *rest = service.log().splitlines()
        assert serves.startswith("kvbank ")
        lines += rest

    return serving


def test_json_names_the_request(serve: Serve) -> None:
    with serve(log_format="json", log_level="debug") as (caller, address, lines):
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


def test_a_record_names_the_tenant_of_its_caller(serve: Serve) -> None:
    with serve(log_format="json", log_level="debug") as (_, address, lines):
        with kvbank.connect(address) as owner:
            with pytest.raises(kvbank.BankNotFound):
                owner.get_bank("of the owner")
            operator = owner.access.create_key("operator").secret
        with kvbank.connect(address, api_key=operator) as client:
            client.access.create_tenant("red")
            key = client.access.create_key("read", tenant="red").secret
        with kvbank.connect(address, api_key=key) as client, pytest.raises(kvbank.BankNotFound):
            client.get_bank("of red")
    records = [json.loads(line) for line in lines]
    tenants = {record["bank"]: record.get("tenant") for record in records if record.get("method") == "GetBank"}
    assert tenants == {"of the owner": None, "of red": "red"}


@pytest.mark.parametrize("form", ["json", "text"])
def test_trouble_is_logged_with_its_request(serve: Serve, tmp_path: Path, form: str) -> None:
    with serve(log_format=form) as (caller, address, lines):
        caller.create()
        chunk_id = caller.add()
        (path,) = (tmp_path / "data" / "payloads").glob(f"*/*/{chunk_id}.safetensors")
        wait_until_synced(tmp_path / "data")
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
    with serve(log_format="json") as (caller, _, lines):
        uid = caller.create().uid
        for shard in range(256):
            (tmp_path / "data" / "payloads" / uid / f"{shard:02x}").write_text("a file where a folder should be")
        with pytest.raises(grpc.RpcError) as caught:
            caller.write(caller.chunk())
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    (error,) = [record for record in map(json.loads, lines) if record["level"] == "ERROR"]
    assert (error["method"], error["bank"]) == ("WriteChunks", "b")
    assert "Traceback" in error["error"]


def test_what_repeats_is_said_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    now, log = [0.0], logging.getLogger("memory_service.test")
    failures = Repeating(clock=lambda: now[0])

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
    with serve(log_level="debug") as (caller, _, lines):
        for request_id in ("two words", "x" * 65, ""):
            with pytest.raises(grpc.RpcError):
                caller.stub.GetBank(pb.GetBankRequest(name=forged), metadata=(("x-request-id", request_id),))
    assert lines
    for line in lines:
        assert " memory_service." in line.partition(": ")[0]
        assert "two words" not in line
        assert "x" * 65 not in line


def test_what_callers_do_wrong_is_no_warning(serve: Serve) -> None:
    with serve(log_level="warning") as (caller, _, lines):
        caller.create()
        caller.add()
        caller.retrieve()
        with pytest.raises(grpc.RpcError):
            caller.stub.GetBank(pb.GetBankRequest(name="nobody"))
    assert lines == []


def test_many_banks_are_counted_and_not_repeated(serve: Serve) -> None:
    with serve(log_format="json", log_level="debug") as (caller, _, lines), pytest.raises(grpc.RpcError):
        caller.retrieve(banks=[f"bank-{i}" for i in range(50)])
    (record,) = [record for record in map(json.loads, lines) if record.get("method") == "Retrieve"]
    assert record["bank"] == "bank-0,bank-1,bank-2 and 47 more"


@pytest.mark.parametrize("form", [logs.TextFormatter, logs.JsonFormatter])
def test_a_record_is_bounded_and_no_terminal_obeys_it(form: Callable[[], logging.Formatter]) -> None:
    try:
        raise ValueError("\x1b[31m" + "words of a caller " * 100_000)
    except ValueError:
        found = sys.exc_info()
    record = logging.LogRecord("n", logging.ERROR, "p", 1, "\x1b[2J\u2028 %s the end", ("x" * 10**6,), found)
    line = form().format(record)
    assert len(line) < 30_000
    assert line.isascii()
    assert "\x1b" not in line
    assert "the end" in line
    assert "Traceback" in line


def test_a_statement_that_fails_does_not_repeat_its_values(tmp_path: Path) -> None:
    engine = schema.engine(tmp_path / "metadata.db", synchronous="NORMAL", writer=True)
    with engine.connect() as connection, pytest.raises(DBAPIError) as caught:
        connection.execute(sqlalchemy.text("select * from nothing where text = :text"), {"text": "a secret"})
    engine.dispose()
    assert "nothing" in str(caught.value)
    assert "a secret" not in str(caught.value)


def test_a_caller_who_left_is_no_error_of_grpc(caplog: pytest.LogCaptureFixture) -> None:
    """Lines that gRPC logs where it could not send the end of an answer are left out; its other errors are still
    said."""
    logs.leave_out_callers_who_left()
    log = logging.getLogger("grpc._cython.cygrpc")
    for error in (ExecuteBatchError("Failed grpc_call_start_batch"), RuntimeError("a defect")):
        try:
            raise error
        except Exception:
            log.exception("raised by servicer method")
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [RuntimeError]


_ENDS = """
import os, sys, grpc
channel = grpc.insecure_channel(sys.argv[1])
next(channel.unary_stream("/kvbank.v1.MemoryService/FetchChunks")(bytes.fromhex(sys.argv[2])))
os._exit(0)
"""


def test_callers_who_leave_are_not_worth_a_line(serve: Serve) -> None:
    with serve(log_level="warning") as (caller, address, lines):
        caller.create()
        chunk, data = caller.chunk(m=65_536, original_length=65_536, token_ids=())
        (ack,) = caller.stub.WriteChunks(caller.frames(chunk, data))
        request = pb.FetchChunksRequest(bank="b", reader_digest="reader-a", chunk_ids=[ack.chunk_id])
        for i in range(20):
            answers = caller.stub.FetchChunks(request, timeout=None if i % 2 else 0.002 * i + 0.001)
            with suppress(grpc.RpcError):
                next(answers)
            answers.cancel()
        # And a process that ends in the middle of one.
        words = [sys.executable, "-c", _ENDS, address, request.SerializeToString().hex()]
        subprocess.run(words, check=True, timeout=60)
        caller.ids()
    assert lines == []
