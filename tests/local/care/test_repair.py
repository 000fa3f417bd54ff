"""What `kvbank repair` mends around the chunks, and what it leaves alone."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from kvbank.v1 import service_pb2 as pb
from memory_service.care.repair import repair
from tests.local.care.folders import (
    answer,
    clean,
    database,
    execute,
    file_of,
    flip,
    kinds,
    make_unreadable,
    refusal,
    run,
    tree,
)
from tests.support.diagonal import rotated

NO_BANK = "0123456789abcdef"


def _beside_a_note(data, folder):
    shutil.copytree(file_of(data).parent, folder / "02")
    (folder / "note.txt").write_text("mine")


def _exchange_indexes(data):
    """Give one of SQLite's own indexes the entries of another one."""
    with database(data) as connection:
        connection.execute("CREATE TABLE other (a, b)")
        connection.execute("CREATE INDEX other_index ON other (a, b)")
        names = ("other_index", "ix_chunks_bank_id_chunk_id")
        statement = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        pages = [connection.execute(statement, (name,)).fetchone()[0] for name in names]
        connection.execute("PRAGMA writable_schema=ON")
        for name, page in zip(names, reversed(pages), strict=True):
            connection.execute("UPDATE sqlite_master SET rootpage = ? WHERE name = ?", (page, name))


MENDED = {
    "usage": (
        lambda data: execute(data, "UPDATE banks SET tokens = tokens + 1 WHERE name = 'b'"),
        "usage",
        "corrected",
    ),
    "written": (
        lambda data: execute(data, "UPDATE banks SET chunks_written = 9 WHERE name = 'b'"),
        "usage",
        "corrected",
    ),
    "key": (
        lambda data: execute(data, "INSERT INTO spent_keys SELECT bank_id, key, digest, 1, 1 FROM chunks LIMIT 1"),
        "key",
        "removed",
    ),
    "forgotten key": (
        lambda data: execute(data, "DELETE FROM keys WHERE chunk_id = 2"),
        "key_missing",
        "corrected",
    ),
    "expiry": (
        lambda data: execute(data, "UPDATE chunks SET ttl = 3600000000 WHERE chunk_id = 2"),
        "expiry",
        "corrected",
    ),
    "time": (lambda data: execute(data, "UPDATE chunks SET expires = 5 WHERE chunk_id = 2"), "expiry", "corrected"),
    "ids": (lambda data: execute(data, "UPDATE store SET next_chunk_id = 2"), "id", "corrected"),
    "content": (
        lambda data: execute(data, "INSERT INTO contents SELECT 77, '', '', NULL, ''"),
        "orphan_row",
        "removed",
    ),
    "row": (lambda data: execute(data, "INSERT INTO evictions SELECT 1,99,1,'',0,0,0,0,0,''"), "orphan_row", "removed"),
    "file": (
        lambda data: shutil.copy(file_of(data), file_of(data).with_name("77.safetensors")),
        "orphan_file",
        "set aside",
    ),
    "temporary": (lambda data: file_of(data).with_name("77.tmp").touch(), "orphan_file", "removed"),
    "place": (lambda data: shutil.copy(file_of(data), file_of(data, 1).parent), "orphan_file", "removed"),
    "folder": (lambda data: (data / "payloads" / NO_BANK / "00").mkdir(parents=True), "orphan_file", "removed"),
    "file in a folder": (lambda data: _beside_a_note(data, data / "payloads" / NO_BANK), "orphan_file", "set aside"),
    "indexes": (lambda data: (data / "indexes" / "nobank").mkdir(parents=True), "orphan_index", "removed"),
    "database": (_exchange_indexes, "database", "rebuilt"),
}


@pytest.mark.parametrize("name", rotated([*MENDED], 0, every=2))
def test_what_is_wrong_around_the_chunks_is_found_and_mended(filled, serving, data, name):
    damage, kind, deed = MENDED[name]
    damage(data)
    assert kinds(answer("check", data, code=1)) == [kind]
    before = tree(data, without=("-shm", "-wal", ".lock"))
    assert {done["done"] for done in answer("repair", data, "--dry-run")["done"]} == {deed}
    assert tree(data, without=("-shm", "-wal", ".lock")) == before
    assert {(done["done"], done["kind"]) for done in answer("repair", data)["done"]} == {(deed, kind)}
    clean(data)
    assert serving().retrieve(top_k=10)[1] == filled
    serving.stop()
    clean(data)


SNAPSHOTS = {
    "a flipped bit": (flip, "index_damaged", "checksum"),
    "a cut file": (lambda path: os.truncate(path, 100), "index_damaged", "too short"),
    "another store": (
        lambda path: execute(path.parents[2], "UPDATE store SET store_id = 'other'"),
        "index_damaged",
        "another store",
    ),
    "another vector": (
        lambda path: execute(
            path.parents[2],
            "UPDATE chunks SET digest = substr(digest, 1, 16)",  # a row without a checksum of its own
            f"UPDATE contents SET embedding = x'{'0000803F' * 4}' WHERE chunk_id = (SELECT max(chunk_id) FROM chunks)",
        ),
        "index_damaged",
        "another vector than in the records",
    ),
    "half written": (lambda path: path.with_name("9.tmp").touch(), "orphan_index", "owns"),
}


@pytest.mark.parametrize("name", rotated([*SNAPSHOTS], 0))
def test_snapshots_of_an_index_are_compared_and_bad_ones_removed(filled, serving, data, connect, name):
    serving()
    with connect(serving.server.address, first_key=1000) as caller:
        caller.create("many", layers=())
        vectors = np.random.default_rng(1).normal(size=(600, 4))
        ids = caller.write_together((caller.chunk(vector, layers=()) for vector in vectors), "many")
        caller.retrieve(banks=["many"], reader_digest="")
        caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="many", chunk_ids=ids[:10]))
    serving.stop()
    assert clean(data)["snapshots"] == 1
    damage, kind, detail = SNAPSHOTS[name]
    (snapshot,) = (data / "indexes").glob("*/*.segment")
    damage(snapshot)
    (problem,) = answer("check", data, code=1)["problems"]
    assert problem["kind"] == kind
    assert detail in problem["detail"]
    assert [(done["done"], done["kind"]) for done in answer("repair", data)["done"]] == [("removed", kind)]
    assert snapshot.exists() == (kind == "orphan_index")
    clean(data)
    serving()
    with connect(serving.server.address, first_key=5000) as caller:
        hits = caller.retrieve(banks=["many"], reader_digest="", top_k=700)[0].queries[0].hits
        assert sorted(hit.chunk_id for hit in hits) == ids[10:]


def test_a_disk_that_is_not_mounted_is_no_damage(filled, data):
    (data / "payloads").rename(data / "elsewhere")
    (data / "payloads").mkdir()
    assert kinds(answer("check", data, code=1)) == ["payload_mark", "payload_missing"]
    backup = data.with_name("backup")
    for command in (["repair", data], ["repair", data, "--dry-run"], ["backup", data, backup]):
        assert "the payloads of bank b are not there; is a disk not mounted?" in refusal(*command)
    assert not backup.exists()
    assert not backup.with_name("backup.partial").exists()
    (data / "payloads").rmdir()
    assert "is a disk not mounted?" in refusal("backup", data, backup)
    (data / "elsewhere").rename(data / "payloads")
    clean(data)
    run("backup", data, backup)


def test_without_its_identity_a_folder_is_not_repaired(filled, data):
    """Repairing would take every payload for an orphan where the banks are gone too."""
    execute(data, "DELETE FROM store", "DELETE FROM banks", "DELETE FROM chunks")
    before = tree(data / "payloads")
    assert "put a backup in place" in refusal("repair", data)
    assert tree(data / "payloads") == before


def test_a_file_that_cannot_be_read_is_no_damage(filled, serving, data):
    """Unreadable files are found and left, beside what is mended."""
    file, aside = file_of(data, 2), data.with_name("aside")
    shutil.copy(file, aside)
    make_unreadable(file)
    file_of(data, 3).unlink()
    for options in ([], ["--fast"]):
        found = answer("check", data, *options, code=1)
        assert [(p["kind"], p["chunk_id"]) for p in found["problems"]] == [
            ("payload_unreadable", 2),
            ("payload_missing", 3),
        ]
    for options in (["--dry-run"], []):
        repaired = answer("repair", data, *options, code=1)
        assert [(done["done"], done["chunk_id"]) for done in repaired["done"]] == [("quarantined", 3)]
        assert [(p["kind"], p["chunk_id"]) for p in repaired["left"]] == [("payload_unreadable", 2)]
    (line,) = run("repair", data, code=1).stdout.splitlines()
    assert line.startswith("left: payload_unreadable: bank b, chunk 2, its file cannot be read: ")
    assert file.parent.is_symlink()
    assert [path.name for path in data.glob("quarantine/*/*")] == ["3.json"]
    file.parent.unlink()
    file.parent.mkdir()
    aside.replace(file)
    clean(data)
    del filled[3]
    assert serving().retrieve(top_k=10)[1] == filled


def test_files_of_a_person_are_left_alone(filled, data):
    names = ("note.txt", "nested/00/5.safetensors", f"{NO_BANK}/note.txt", f"{NO_BANK}/zz/5.tmp")
    notes = [data / "payloads" / name for name in names]
    notes += [file_of(data).with_name(name) for name in ("note.txt", "5.bak", "x5.tmp")]
    for note in notes:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text("mine")
    clean(data)
    run("repair", data)
    assert all(note.exists() for note in notes)


def test_a_database_that_nothing_mends(filled, data):
    with open(data / "metadata.db", "r+b") as file:
        file.seek(4096 * 3)
        file.write(b"\xff" * 4096 * 4)
    assert kinds(answer("check", data, code=1)) == ["database"]
    assert "kvbank restore BACKUP DATA" in refusal("repair", data)
    assert "damaged" in refusal("backup", data, data.with_name("backup"))
    (data / "metadata.db").write_bytes(b"no database " * 1000)
    for command in (["check", data], ["repair", data], ["backup", data, data.with_name("other")]):
        assert "cannot be read as a database of kvbank" in refusal(*command)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_repair_that_is_killed_anywhere_is_taken_up(filled, data, tmp_path, monkeypatch, every):
    """Kills come at the system calls that change a file or make it durable: at one in `every`."""
    flip(file_of(data, 2))
    file_of(data, 3).unlink()
    file_of(data).with_name("77.tmp").touch()
    execute(data, "UPDATE banks SET tokens = tokens + 1 WHERE name = 'b'", "DELETE FROM contents WHERE chunk_id = 4")
    whole = shutil.copytree(data, tmp_path / "whole")
    steps = 0
    while True:
        shutil.rmtree(data)
        shutil.copytree(whole, data)
        left = [steps]

        def counted(call, left=left):
            def step(*arguments, **named):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return call(*arguments, **named)

            return step

        with monkeypatch.context() as patched:
            for name in ("fsync", "rename", "unlink", "mkdir"):
                patched.setattr(os, name, counted(getattr(os, name)))
            with contextlib.suppress(Killed):
                repair(data)
        if left[0] >= 0:
            break
        steps += every
        run("repair", data)
        assert answer("check", data)["totals"]["chunks"] == 2
        assert sorted(path.stem for path in (data / "quarantine").glob("*/*.json")) == ["2", "3", "4"]
        assert sorted(path.stem for path in (data / "quarantine").glob("*/*.safetensors")) == ["2", "4"]
        why = json.loads(next((data / "quarantine").glob("*/2.json")).read_text())["why"]
        assert "checksum" in why
    assert steps > 10


def test_repair_waits_for_no_server_and_disturbs_none(serving, data):
    caller = serving()
    caller.create()
    chunk_id = caller.add()
    assert refusal("repair", data) == (
        f"kvbank: {data} is in use by process {os.getpid()}; one server owns a data folder\n"
    )
    assert chunk_id in caller.retrieve()[1]


def test_repair_gives_back_whole_what_was_set_aside(serving, data, tmp_path):
    """Also what it finds itself; a chunk comes back with all that was said of it, and one that is damaged stays."""
    caller = serving()
    caller.create()
    chunks = [caller.chunk(vector, text=f"text {vector}") for vector in np.eye(4)]
    ids = [ack.chunk_id for ack in caller.write(*chunks)]
    before = [caller.stub.GetChunk(pb.GetChunkRequest(bank="b", chunk_id=i, with_embedding=True)).chunk for i in ids]
    stored = caller.retrieve(top_k=9)[1]
    serving.stop()
    execute(data, *(f"DELETE FROM {table} WHERE chunk_id != 3" for table in ("contents", "keys", "chunks")))
    execute(data, "UPDATE banks SET chunks = 1, tokens = 3, bytes = bytes / 4, chunks_written = 1")
    flip(file_of(data, 4))
    assert kinds(answer("check", data, code=1)) == ["orphan_file"]
    by_start = shutil.copytree(data, tmp_path / "by_start")
    for served in (False, True):
        if served:
            shutil.rmtree(data)
            by_start.rename(data)
            assert serving().ids() == [3]
            serving.stop()
            assert kinds(answer("check", data, code=1)) == ["set_aside"]
        expected = {1: "given back", 2: "given back", 4: "set aside"}
        for options in (["--dry-run"], []):
            done = answer("repair", data, *options)["done"]
            assert {int(Path(d["path"]).stem): d["done"] for d in done} == expected
        clean(data)
        assert run("repair", data).stdout == "nothing to mend\n"
        assert [path.name for path in data.glob("quarantine/*/*.safetensors")] == ["4.safetensors"]
        caller = serving(first_key=100)
        assert caller.retrieve(top_k=9)[1] == {i: stored[i] for i in (1, 2, 3)}
        for chunk in before[:3]:
            request = pb.GetChunkRequest(bank="b", chunk_id=chunk.chunk_id, with_embedding=True)
            found = caller.stub.GetChunk(request).chunk
            found.ClearField("retrieval_count")
            found.ClearField("last_retrieve_time")
            assert found == chunk
        assert caller.write(chunks[0])[0].replayed
        assert caller.add() > 4
        serving.stop()
