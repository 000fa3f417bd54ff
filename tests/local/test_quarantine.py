"""A damaged chunk that several callers meet at once, or that goes while one meets it."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from kvbank.v1 import service_pb2 as pb
from tests.support.waiting import wait_until

CALLERS, ROUNDS = 4, 30


def _refusal(caller, chunk_id, begin):
    """Return reason and text of the refusal; all callers ask in the same moment."""
    begin.wait()
    try:
        caller.fetch(chunk_id)
    except grpc.RpcError as error:
        info = error_details_pb2.ErrorInfo()
        rpc_status.from_call(error).details[0].Unpack(info)
        return info.reason, error.details()
    return "served", ""


def test_callers_who_meet_a_damaged_chunk_at_once_are_all_told_so(caller, serving, connect, payload_path, data, caplog):
    """Callers are not told of a storage that failed; those who come when the chunk has gone are told that."""
    chunk_ids = [ack.chunk_id for ack in caller.write(*(caller.chunk() for _ in range(ROUNDS)))]
    refusals = []
    with ExitStack() as stack, ThreadPoolExecutor(CALLERS) as threads:
        callers = [stack.enter_context(connect(serving.server.address)) for _ in range(CALLERS)]
        for chunk_id in chunk_ids:
            path = payload_path(chunk_id)
            path.write_bytes(path.read_bytes()[:-4] + b"xxxx")
            begin = threading.Barrier(CALLERS)
            refusals += threads.map(lambda caller, i=chunk_id, begin=begin: _refusal(caller, i, begin), callers)
    late = [text for reason, text in refusals if reason == "CHUNK_NOT_FOUND"]
    told = [reason for reason, text in refusals if text not in late]
    assert set(told) == {"CHECKSUM_MISMATCH"}, refusals
    assert len(told) > 2 * ROUNDS  # they did meet
    assert caller.usage().chunks_quarantined == ROUNDS
    assert caller.ids() == []
    kept = sorted(int(path.stem) for path in data.glob("quarantine/*/*.safetensors"))
    notes = {int(path.stem): json.loads(path.read_text()) for path in data.glob("quarantine/*/*.json")}
    assert kept == sorted(notes) == chunk_ids
    assert {note["why"] for note in notes.values()} == {"stored bytes are damaged"}
    assert list(data.glob("quarantine/*/*.tmp")) == []
    assert len([text for text in caplog.messages if text.endswith("is damaged and quarantined")]) == ROUNDS


def test_a_damaged_chunk_whose_file_goes_while_it_is_put_aside(caller, payload_path, monkeypatch, caplog):
    """Callers are told of the damage, and neither of a storage that failed nor of a quarantine."""
    chunk_id = caller.add()
    path, rename = payload_path(chunk_id), os.rename
    path.write_bytes(path.read_bytes()[:-4] + b"xxxx")

    def late(source, target):
        if Path(source) == path:
            caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[chunk_id]))
            wait_until(lambda: not path.exists(), "the file stays")
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert _refusal(caller, chunk_id, threading.Barrier(1))[0] == "CHECKSUM_MISMATCH"
    usage = caller.usage()
    assert (usage.chunks, usage.chunks_deleted, usage.chunks_quarantined) == (0, 1, 0)
    assert "quarantined" not in caplog.text
