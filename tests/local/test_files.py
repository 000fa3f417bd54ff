"""The files of chunks: safetensors, one for each chunk that lives, and none for those that are gone."""

import os
import sqlite3
import threading
from contextlib import closing

import grpc
import pytest
import safetensors

from kvbank.v1 import service_pb2 as pb
from memory_service.care.check import check
from memory_service.storage.local.files import marks
from memory_service.storage.local.files.layout import MARK
from tests.support.caller import lasting
from tests.support.waiting import wait_until


def test_delete_takes_everything_along(serving, data):
    caller = serving()
    first = caller.create()
    chunk_id = caller.add()
    caller.retrieve()
    caller.stub.DeleteBank(pb.DeleteBankRequest(name="b"))
    again = caller.create()
    assert again.uid != first.uid
    assert (caller.ids(), caller.retrieve()[1]) == ([], {})
    assert caller.add() > chunk_id
    serving.stop()
    assert {path.name for path in (data / "payloads").iterdir()} == {MARK, again.uid}


def test_files_are_safetensors(caller, payload_path):
    chunk, data = caller.chunk()
    chunk_id = caller.write((chunk, data))[0].chunk_id
    raw = payload_path(chunk_id).read_bytes()
    tensors = dict(safetensors.deserialize(raw))
    assert b"".join(bytes(tensors[tensor.name]["data"]) for tensor in chunk.payload.tensors) == data
    stored = caller.retrieve()[0].chunks[0].payload
    first = stored.tensors[0]
    assert raw[first.offset : first.offset + first.length] == data[: first.length]


def traces(data):
    """Return when anything below the folder of payloads was made, renamed or removed."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (data / "payloads").rglob("*")}


def test_a_repeated_write_stores_no_second_payload(caller, refused, data):
    """Folders in which a file was made, even for a moment, have another time afterwards."""
    chunk, content = caller.chunk()
    (first,) = caller.write((chunk, content))
    # Of the shards of the ids that come next too, which are then there already.
    caller.write(*(caller.chunk() for _ in range(3)))
    before, stored = traces(data), caller.sample("kvbank_stage_seconds_count", stage="store")
    (again,) = caller.write((chunk, content))
    assert (again.chunk_id, again.replayed) == (first.chunk_id, True)
    chunk.text = "other content"
    with refused("KEY_REUSED", grpc.StatusCode.ALREADY_EXISTS):
        caller.write((chunk, content))
    assert traces(data) == before
    assert caller.sample("kvbank_stage_seconds_count", stage="store") == stored == 4


def test_a_repeated_write_whose_bytes_were_damaged_on_the_way_is_refused(caller, refused):
    chunk, content = caller.chunk()
    caller.write((chunk, content))
    with refused("CHECKSUM_IN_TRANSIT", grpc.StatusCode.INVALID_ARGUMENT):
        caller.write((chunk, bytes(len(content))))


@pytest.mark.parametrize("again", ["the same", "other"])
def test_a_key_is_free_24_hours_after_its_chunk_went(serving, data, again):
    """Hours pass by moving what the database of the stopped service says of them."""
    caller = serving()
    caller.create()
    chunk, content = caller.chunk()
    first = caller.write((chunk, content))[0].chunk_id
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[first]))
    serving.stop()
    for hours, known in ((23.9, True), (0.2, False)):
        with closing(sqlite3.connect(data / "metadata.db")) as database:
            moved = database.execute("UPDATE spent_keys SET gone = gone - ?", (int(hours * 3600e6),)).rowcount
            database.commit()
        assert moved == 1
        caller = serving()
        if known:
            assert caller.write((chunk, content))[0].gone
            serving.stop()
    chunk.text = {"the same": chunk.text, "other": "other"}[again]
    ack = caller.write((chunk, content))[0]
    assert (ack.replayed, ack.gone) == (False, False)
    assert ack.chunk_id > first
    assert (caller.ids(), caller.retrieve()[1]) == ([ack.chunk_id], {ack.chunk_id: content})
    assert caller.write((chunk, content))[0].replayed
    assert check(data).problems == []
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[ack.chunk_id]))
    assert caller.write((chunk, content))[0].gone
    assert check(data).problems == []


def test_replay_survives_a_restart_and_leaves_no_file(serving, data):
    caller = serving()
    caller.create()
    chunk = caller.chunk()
    first = caller.write(chunk)[0].chunk_id
    caller = serving()
    assert caller.write(chunk)[0].chunk_id == first
    serving.stop()
    assert [path.stem for path in (data / "payloads").glob("*/*/*")] == [str(first)]


def test_files_of_victims_go(serving, data):
    caller = serving()
    caller.create("c", capacity={"chunks": 2})
    for _ in range(9):
        caller.add(bank="c")
    live = caller.ids("c")
    serving.stop()
    assert sorted(int(path.stem) for path in (data / "payloads").glob("*/*/*")) == live


def test_the_file_of_an_expired_chunk_goes(caller, payload_path, data):
    kept, gone = caller.add(), caller.add(expiry=lasting(1))
    wait_until(lambda: not list((data / "payloads").glob(f"*/*/{gone}.*")))
    assert payload_path(kept).exists()


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_what_is_in_the_place_of_a_mark_is_not_waited_for(tmp_path, kind):
    """Pipes that nothing writes to would hold up the start, and every write."""
    folder = tmp_path / "0123456789abcdef"
    folder.mkdir()
    match kind:
        case "pipe":
            os.mkfifo(folder / MARK)
        case "link":
            (folder / MARK).symlink_to(tmp_path / "elsewhere")
        case "folder":
            (folder / MARK).mkdir()
    found = []
    looking = threading.Thread(target=lambda: found.append(marks.marked(folder)), daemon=True)
    looking.start()
    looking.join(10)
    assert found == [True]
