"""Disks that are away and records that are lost: nothing acknowledged is deleted, no id comes twice."""

import json
import logging
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import grpc
import numpy as np
import pytest

from kvbank.v1 import service_pb2 as pb
from memory_service.api.embedded import LocalServer
from memory_service.care.repair import repair
from memory_service.domain.errors import StartError
from memory_service.storage.local.files.layout import MARK
from memory_service.storage.local.records import schema
from tests.support.diagonal import diagonal, rotated
from tests.support.waiting import wait_until

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def files(data):
    return {int(path.stem) for path in data.glob("payloads/*/*/*.safetensors")}


def killed(data, place):
    """Copy the folder as a kill leaves it. Python does not copy it: closing a file that SQLite has open in this process
    would drop its locks."""
    subprocess.run(["cp", "-r", data, place], check=True)


def replace(data, place):
    shutil.rmtree(data)
    place.rename(data)


# A disk that is away


@pytest.mark.parametrize(
    ("away", "left"), diagonal(["payloads", "payloads/????????????????"], ["nothing", "an empty folder"])
)
def test_a_disk_that_is_away_for_a_life_costs_no_chunk(serving, refused, data, away, left):
    caller = serving()
    caller.create()
    ids = [ack.chunk_id for ack in caller.write(*(caller.chunk() for _ in range(20)))]
    serving.stop()
    (folder,) = data.glob(away)
    folder.rename(data.with_name("disk"))
    if left != "nothing":
        folder.mkdir()
    caller = serving()
    calls = [caller.retrieve, lambda: caller.fetch(ids[0]), caller.add, lambda: caller.add(pinned=True)]
    if away == "payloads":
        calls.append(lambda: caller.create("new"))
    for _ in range(2):
        for call in calls:
            with refused("STORAGE_ERROR", UNAVAILABLE):
                call()
    assert "is a disk not mounted?" in refused.message
    usage = caller.usage()
    assert (usage.chunks, usage.chunks_quarantined) == (20, 0)
    serving.stop()
    shutil.rmtree(folder, ignore_errors=True)
    data.with_name("disk").rename(folder)
    caller = serving()
    assert caller.ids() == ids
    assert len(caller.retrieve(top_k=100)[1]) == 20
    serving.stop()
    assert files(data) == set(ids)


def test_an_empty_bank_whose_disk_is_away_is_no_other_place(serving, refused, data):
    """Payloads that were written there would be below the disk when it comes back."""
    serving().create()
    serving.stop()
    (data / "payloads").rename(data.with_name("disk"))
    caller = serving()
    with refused("STORAGE_ERROR", UNAVAILABLE):
        caller.add()
    serving.stop()
    shutil.rmtree(data / "payloads")
    data.with_name("disk").rename(data / "payloads")
    assert serving().add()


def test_folders_of_earlier_versions_are_marked_where_they_show_that_they_are_the_banks(serving, refused, data):
    """Folders are not marked where the disk is away at the first start already."""
    caller = serving()
    caller.create()
    caller.create("empty")
    ids = [caller.add() for _ in range(3)]
    serving.stop()
    for mark in data.rglob(MARK):
        mark.unlink()
    (data / "chunk-ids").unlink()
    (data / "payloads").rename(data.with_name("disk"))
    caller = serving()
    for call in (caller.add, caller.retrieve):
        with refused("STORAGE_ERROR", UNAVAILABLE):
            call()
    serving.stop()
    shutil.rmtree(data / "payloads")
    data.with_name("disk").rename(data / "payloads")
    caller = serving(first_key=100)
    assert list(caller.retrieve(top_k=9)[1]) == ids
    assert caller.add() > ids[-1]
    assert caller.add(bank="empty") > ids[-1]
    assert len(list(data.rglob(MARK))) == 3


def test_folders_of_two_banks_that_have_changed_places_cost_no_chunk(serving, refused, data):
    """Reads, writes, a start and the deletion of one of the banks all leave the chunks."""
    caller = serving()
    uids = {name: caller.create(name).uid for name in ("b", "c")}
    ids = {name: [caller.add(bank=name) for _ in range(5)] for name in uids}
    serving.stop()

    def swap():
        first, second = (data / "payloads" / uid for uid in uids.values())
        first.rename(data / "aside")
        second.rename(first)
        (data / "aside").rename(second)

    swap()
    for _ in range(2):
        caller = serving(first_key=100)
        for call in (caller.retrieve, caller.add):
            with refused("STORAGE_ERROR", UNAVAILABLE):
                call()
        serving.stop()
    caller = serving()
    caller.stub.DeleteBank(pb.DeleteBankRequest(name="c"))
    serving.stop()
    assert files(data) == {*ids["b"], *ids["c"]}
    swap()
    caller = serving()
    assert sorted(caller.retrieve(top_k=100)[1]) == ids["b"]
    serving.stop()
    assert files(data) == set(ids["b"])


def test_the_disk_of_another_data_folder_is_left_as_it_is(serving, refused, data, tmp_path):
    """Also where its chunks have ids of chunks that were deleted here."""
    caller = serving()
    caller.create()
    there = [caller.add() for _ in range(3)]
    serving.stop()
    data.rename(tmp_path / "other")
    caller = serving()
    caller.create()
    ids = [caller.add() for _ in range(3)]
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=ids[:1]))
    serving.stop()
    (data / "payloads").rename(tmp_path / "own")
    (tmp_path / "other" / "payloads").rename(data / "payloads")
    caller = serving()
    with refused("STORAGE_ERROR", UNAVAILABLE):
        caller.fetch(ids[1])
    serving.stop()
    assert files(data) == set(there)
    (data / "payloads").rename(tmp_path / "other" / "payloads")
    (tmp_path / "own").rename(data / "payloads")
    assert list(serving().retrieve(top_k=9)[1]) == ids[1:]


def test_what_is_quarantined_because_it_was_away_is_not_deleted_when_it_is_back(serving, refused, data, payload_path):
    caller = serving()
    caller.create()
    chunk_id = caller.add()
    path = payload_path(chunk_id)
    path.rename(data / "aside")
    with refused("CHECKSUM_MISMATCH", grpc.StatusCode.DATA_LOSS):
        caller.fetch(chunk_id)
    serving.stop()
    (data / "aside").rename(path)
    content = path.read_bytes()
    serving()
    serving.stop()
    (kept,) = data.glob(f"quarantine/*/{chunk_id}.safetensors")
    assert kept.read_bytes() == content
    assert json.loads(kept.with_suffix(".json").read_text())["chunk"]["chunk_id"] == chunk_id


def test_payloads_on_a_disk_of_their_own_are_quarantined_too(serving, refused, data, payload_path, other_disk):
    """Renaming a file from one file system to another is impossible."""
    caller = serving()
    caller.create()
    bad, good = caller.add((1, 0, 0, 0)), caller.add((0.5, 0, 0, 0))
    serving.stop()
    shutil.move(data / "payloads", other_disk / "payloads")
    (data / "payloads").symlink_to(other_disk / "payloads")
    caller = serving()
    path = payload_path(bad)
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 4
    path.write_bytes(raw)
    with refused("CHECKSUM_MISMATCH", grpc.StatusCode.DATA_LOSS):
        caller.fetch(bad)
    assert list(caller.retrieve()[1]) == [good]
    (kept,) = data.glob("quarantine/*/*.safetensors")
    assert kept.read_bytes() == raw
    assert files(data) == {good}


# Records that are lost


@pytest.mark.parametrize("place", rotated([100, "middle"], 1, every=2))
def test_a_flipped_bit_of_the_log_gives_no_id_twice_and_deletes_no_payload(serving, data, tmp_path, place, caplog):
    caller = serving()
    caller.create()
    first = [ack.chunk_id for ack in caller.write(*(caller.chunk() for _ in range(30)))]
    serving.stop()
    caller = serving(first_key=100)
    before = [ack.chunk_id for ack in caller.write(*(caller.chunk() for _ in range(30)))]
    store_id = caller.stub.GetServerInfo(pb.GetServerInfoRequest()).store_id
    killed(data, tmp_path / "killed")
    serving.stop()
    replace(data, tmp_path / "killed")
    log = data / "metadata.db-wal"
    raw = bytearray(log.read_bytes())
    raw[len(raw) // 2 if place == "middle" else place] ^= 1
    log.write_bytes(raw)
    with caplog.at_level(logging.ERROR):
        caller = serving(first_key=200)
    lost = set(before) - set(caller.ids())
    assert len(lost) == 30 or place == "middle"
    after = [ack.chunk_id for ack in caller.write(*(caller.chunk() for _ in range(20)))]
    assert min(after) > max(first + before)
    if place == 100:
        assert caller.stub.GetServerInfo(pb.GetServerInfoRequest()).store_id != store_id
        assert "they have lost what was written last" in caplog.text
    serving.stop()
    aside = {int(path.stem) for path in data.glob("quarantine/*/*.safetensors")}
    assert aside == lost
    assert files(data) == {*first, *before, *after} - lost


def test_vectors_of_lost_records_answer_no_search(serving, data, tmp_path):
    """Vectors are those of a snapshot that was written before the kill, under ids that are not given again."""
    random = np.random.default_rng(1)
    caller = serving(index_idle=0.2)
    caller.create("plain", layers=())
    caller.write(*(caller.chunk(vector, layers=()) for vector in random.normal(size=(10, 4))), bank="plain")
    serving.stop()
    caller = serving(first_key=100, index_idle=0.2)
    lost = caller.write(*(caller.chunk(vector, layers=()) for vector in random.normal(size=(700, 4))), bank="plain")
    search = {"banks": ["plain"], "reader_digest": "", "top_k": 1}
    caller.retrieve(**search)
    wait_until(lambda: list(data.glob("indexes/*/*.segment")), "no snapshot is written")
    killed(data, tmp_path / "killed")
    serving.stop()
    replace(data, tmp_path / "killed")
    log = data / "metadata.db-wal"
    raw = bytearray(log.read_bytes())
    raw[100] ^= 1
    log.write_bytes(raw)
    caller = serving(first_key=1000)
    # Some were in the database already, by a checkpoint.
    left = caller.ids_of_all("plain")
    assert 10 <= len(left) < 710
    vectors = random.normal(size=(10, 4))
    new = caller.write(*(caller.chunk(vector, layers=()) for vector in vectors), bank="plain")
    assert min(ack.chunk_id for ack in new) > max(ack.chunk_id for ack in lost)
    expected = {ack.chunk_id: float(vector @ vector) for vector, ack in zip(vectors, new, strict=True)}
    for vector, ack in zip(vectors, new, strict=True):
        found = caller.retrieve(vector, **(search | {"top_k": 1000}))[0].queries[0].hits
        assert sorted(hit.chunk_id for hit in found) == sorted([*left, *expected])
        scores = {hit.chunk_id: hit.score for hit in found}
        assert scores[ack.chunk_id] == pytest.approx(expected[ack.chunk_id], rel=1e-5)


RESERVATIONS = {
    "no file": Path.unlink,
    "a flipped bit": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "an empty file": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("name", RESERVATIONS)
def test_an_older_database_gives_no_id_twice(serving, data, name):
    """Also where the file of reservations is lost or damaged with it."""
    caller = serving()
    caller.create()
    serving.stop()
    old = shutil.copy(data / "metadata.db", data.with_name("old.db"))
    caller = serving(first_key=100)
    given = [caller.add() for _ in range(3)]
    serving.stop()
    shutil.copy(old, data / "metadata.db")
    RESERVATIONS[name](data / "chunk-ids")
    caller = serving(first_key=200)
    assert caller.add() > given[-1]
    serving.stop()
    assert {int(path.stem) for path in data.glob("quarantine/*/*.safetensors")} == set(given)


def test_what_the_records_explain_is_removed(serving, data, payload_path):
    """Explained are a chunk that was deleted, one that was evicted, and a write that was cut off and repeated under its
    key."""
    caller = serving()
    caller.create(capacity={"chunks": 6})
    deleted, cut = caller.add(), caller.chunk()
    again = caller.write(cut)[0].chunk_id
    paths = {deleted: payload_path(deleted), again: payload_path(again)}
    kept = {path: path.read_bytes() for path in paths.values()}
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[deleted, again]))
    serving.stop()
    with closing(sqlite3.connect(data / "metadata.db")) as connection:
        # As if the chunk had never been written, but for its file.
        connection.execute("DELETE FROM spent_keys WHERE chunk_id = ?", (again,))
        connection.execute("DELETE FROM keys WHERE chunk_id = ?", (again,))
        connection.commit()
    for path, content in kept.items():
        path.write_bytes(content)
    caller = serving()
    # The second start sees that the write was repeated; the first cannot.
    wait_until(lambda: list(data.glob(f"quarantine/*/{again}.safetensors")), "the file is not set aside")
    new = caller.write(cut)[0]
    assert not new.replayed
    serving.stop()
    serving()
    serving.stop()
    assert list(data.glob("quarantine/*/*")) == []
    assert files(data) == {new.chunk_id}


@pytest.mark.parametrize("where", ["sqlite_master", "banks", "alembic_version"])
def test_a_start_over_text_that_is_not_utf_8_ends_in_one_line(serving, data, where):
    serving().create()
    serving.stop()
    raw = bytearray((data / "metadata.db").read_bytes())
    words = {"sqlite_master": b"CREATE TABLE chunks", "banks": b'"reader_digest"', "alembic_version": b"0001"}
    word = words[where] if where != "alembic_version" else schema.revisions()[-1].encode()
    place = raw.index(word)
    while place >= 0:
        raw[place + 2] ^= 0x80
        place = raw.find(word)
    (data / "metadata.db").write_bytes(raw)
    with pytest.raises(StartError) as refusal:
        LocalServer(data)
    assert "\n" not in str(refusal.value)


def test_a_key_that_was_used_for_something_else_since_explains_nothing(serving, data, payload_path, tmp_path):
    """Records of an acknowledged chunk are lost, and the caller uses the chunk's key for another text."""
    caller = serving()
    caller.create()
    serving.stop()
    old = shutil.copy(data / "metadata.db", tmp_path / "old.db")
    caller = serving()
    chunk, tensors = caller.chunk()
    lost = caller.write((chunk, tensors))[0].chunk_id
    serving.stop()
    shutil.copy(old, data / "metadata.db")
    caller = serving()
    wait_until(lambda: list(data.glob(f"quarantine/*/{lost}.safetensors")), "the file is not set aside")
    chunk.text = "another text"
    new = caller.write((chunk, tensors))[0].chunk_id
    for _ in range(2):
        caller = serving()
        serving.stop()
        assert len(list(data.glob(f"quarantine/*/{lost}.safetensors"))) == 1
    repair(data)
    assert len(list(data.glob(f"quarantine/*/{lost}.safetensors"))) == 1
    assert list(serving().retrieve(top_k=9)[1]) == [new]
