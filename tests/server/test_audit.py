"""Every call is in the audit log where the operator asks for one, and the service never suffers from the log."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvbank.v1 import service_pb2 as pb
from memory_service.domain.errors import StartError
from memory_service.observe.audit import AuditLog
from memory_service.observe.request import Request
from memory_service.observe.troubles import Troubles
from tests.support.caller import AXES, Caller

Serving = Callable[..., Caller]


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_call_has_a_line_without_its_content(serving: Serving, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    caller = serving(audit_log=str(path))
    caller.create("notes")
    caller.add(AXES[0], bank="notes", text="a secret of somebody")
    caller.retrieve(AXES[0], banks=["notes"], top_k=1)
    with pytest.raises(grpc.RpcError):
        caller.retrieve(AXES[0], banks=["other"], top_k=1)
    with pytest.raises(grpc.RpcError):
        caller.stub.GetBank(pb.GetBankRequest(name='"\n' + "x" * 300))
    with pytest.raises(grpc.RpcError):
        caller.channel.unary_unary("/kvbank.v1.MemoryService/Nonsense\t")(b"")
    serving.stop()  # type: ignore[attr-defined]
    assert path.stat().st_mode & 0o777 == 0o600
    assert "secret" not in path.read_text()
    found = lines(path)
    assert [(each["method"], each.get("bank"), each["result"], each.get("reason")) for each in found] == [
        ("CreateBank", "notes", "OK", None),
        ("WriteChunks", "notes", "OK", None),
        ("Retrieve", "notes", "OK", None),
        ("Retrieve", "other", "NOT_FOUND", "BANK_NOT_FOUND"),
        ("GetBank", '"\n' + "x" * 198, "NOT_FOUND", "BANK_NOT_FOUND"),
        ("/kvbank.v1.MemoryService/Nonsense\t", None, "UNIMPLEMENTED", None),
    ]
    assert all(each["peer"].startswith("ipv4:127.0.0.1:") for each in found[:5])


def test_a_full_file_gives_way_to_the_next(serving: Serving, tmp_path: Path) -> None:
    path, calls = tmp_path / "audit.jsonl", 800
    caller = serving(audit_log=str(path), audit_log_bytes=64 * 1024, audit_log_files=2)
    for number in range(calls):
        caller.stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=[("x-request-id", f"{number:064}")])
    serving.stop()  # type: ignore[attr-defined]
    files = [path.with_name(f"{path.name}.{number}") for number in (2, 1)]
    kept = [each for file in (*files, path) for each in lines(file)]
    assert [int(each["request_id"]) for each in kept] == [*range(calls)][-len(kept) :]
    assert len(kept) > calls // 2
    assert all(file.stat().st_size <= 64 * 1024 and file.stat().st_mode & 0o777 == 0o600 for file in (*files, path))
    assert len(list(tmp_path.glob("audit.jsonl*"))) == 3


def test_a_log_that_cannot_be_written_is_said_once_and_calls_go_on(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    caller = serving(audit_log="/dev/full")
    for _ in range(5):
        caller.stub.GetServerInfo(pb.GetServerInfoRequest())
    serving.stop()  # type: ignore[attr-defined]
    said = [record.getMessage() for record in caplog.records if record.name.endswith("troubles")]
    assert [text for text in said if text.startswith("audit")] == [
        "audit: the audit log /dev/full cannot be written; lines of it are lost"
    ]


def test_a_folder_is_no_audit_log(serving: Serving, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"cannot write the audit log .*: Is a directory"):
        serving(audit_log=str(tmp_path))


def test_lines_beyond_those_that_may_wait_are_lost_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    troubles = Troubles()
    audit = AuditLog(troubles, most_waiting=1)
    audit.begin(tmp_path / "log", 1 << 20, 1)
    with caplog.at_level(logging.WARNING):
        for number in range(10_000):
            audit.called(Request(str(number), "GetBank"), "OK", 0.001)
    audit.end()
    written = lines(tmp_path / "log")
    assert 0 < len(written) < 10_000
    assert any("lines of it are lost" in record.getMessage() for record in caplog.records)
