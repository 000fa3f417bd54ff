"""`kvbank check`, `repair`, `backup`, `restore` on folders of a real server, served and not."""

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import xxhash
from typer.testing import CliRunner

import kvbank
from kvbank import cli
from kvbank.v1 import service_pb2 as pb
from memory_service import schema
from memory_service.care.report import Kind
from memory_service.errors import StartError
from memory_service.server import LocalServer

ROOT = Path(__file__).parents[2]


def run(*arguments, code=0):
    """The command's answer; a refusal is one line on stderr."""
    result = CliRunner().invoke(cli.application(), [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    assert code != 1 or result.stderr.count("\n") <= 1
    return result


def answer(*arguments, code=0):
    return json.loads(run(*arguments, "--json", code=code).stdout)


def refusal(*arguments, code=1):
    result = run(*arguments, code=code)
    assert result.stdout == ""
    assert result.stderr.startswith("kvbank: ")
    return result.stderr


def kinds(found):
    return sorted({problem["kind"] for problem in found["problems"]})


def clean(folder):
    for options in ([], ["--fast"]):
        found = answer("check", folder, *options)
        assert found["ok"], found
        assert found["problems"] == []
    return found["totals"]


def tree(folder, *, without=()):
    """Name -> (size, time of the last change). Not by content: opening SQLite's files here would drop its locks."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(without)
    }


@contextlib.contextmanager
def database(data):
    connection = sqlite3.connect(data / "metadata.db", isolation_level=None)
    yield connection
    connection.close()


def execute(data, *statements):
    with database(data) as connection:
        for statement in statements:
            assert connection.execute(statement).rowcount != 0, statement


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where the folder of `filled` is kept, so that only the first test waits for a server."""
    return {"folder": tmp_path_factory.mktemp("filled") / "data"}


@pytest.fixture
def filled(made, serving, data):
    """A folder that was served: two banks, five chunks, a sixth deleted. The payloads' bytes by chunk."""
    if "stored" not in made:
        caller = serving()
        caller.create()
        caller.create("plain", layers=())
        for vector in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0.5, 0.5, 0, 0)):
            caller.add(vector)
        caller.add(bank="plain", layers=())
        gone = caller.add()
        caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[gone]))
        stored = caller.retrieve(top_k=10)[1]
        serving.stop()
        shutil.copytree(data, made["folder"])
        made["stored"] = stored
    else:
        shutil.copytree(made["folder"], data)
    return dict(made["stored"])


# Check


def test_a_sound_folder_is_clean_served_or_not_and_stays_as_it_is(filled, serving, data, connect):
    before = tree(data, without=("-shm", "-wal"))
    totals = clean(data)
    assert (totals["banks"], totals["chunks"], totals["payloads"]) == (2, 5, 4)
    assert totals["payload_bytes"] == sum(map(len, filled.values()))
    assert tree(data, without=("-shm", "-wal")) == before
    serving()
    with connect(serving.server.address, first_key=1000) as caller:
        chunk_id = caller.add()
        before = tree(data, without="-shm")
        assert "metadata.db-wal" in before
        assert clean(data)["chunks"] == 6
        assert tree(data, without="-shm") == before
        assert chunk_id in caller.retrieve(top_k=10)[1]
    assert "2 banks, 6 chunks, 5 payloads" in run("check", data).stdout
    assert "no problem" in run("check", data).stdout


def test_a_log_that_a_kill_left_is_read_and_not_written_back(serving, data, tmp_path):
    """Where the reader is the last to close the database, too: SQLite checkpoints then, unless it may not write."""
    caller = serving()
    caller.create()
    caller.add()
    # Not by Python: closing a file that SQLite has open in this process would drop its locks.
    subprocess.run(["cp", "-r", data, tmp_path / "left"], check=True)
    before = tree(tmp_path / "left", without="-shm")
    assert before["metadata.db-wal"][0] > 0
    assert clean(tmp_path / "left")["chunks"] == 1
    run("backup", tmp_path / "left", tmp_path / "backup")
    assert tree(tmp_path / "left", without="-shm") == before
    run("repair", tmp_path / "left")
    assert clean(tmp_path / "left")["chunks"] == clean(tmp_path / "backup")["chunks"] == 1


def _file(data, chunk_id=2):
    return next((data / "payloads").glob(f"*/*/{chunk_id}.safetensors"))


def _flip(path, place=-20):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def _swap(data):
    one, two = _file(data, 1).read_bytes(), _file(data, 2).read_bytes()
    _file(data, 1).write_bytes(two)
    _file(data, 2).write_bytes(one)


def _replaced(data, old, new):
    raw = _file(data).read_bytes()
    assert old in raw
    _file(data).write_bytes(raw.replace(old, new, 1))


def _exchange_indexes(data):
    """One of SQLite's own indexes has the entries of another one."""
    with database(data) as connection:
        connection.execute("CREATE TABLE other (a, b)")
        connection.execute("CREATE INDEX other_index ON other (a, b)")
        names = ("other_index", "ix_chunks_bank_id_chunk_id")
        statement = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        pages = [connection.execute(statement, (name,)).fetchone()[0] for name in names]
        connection.execute("PRAGMA writable_schema=ON")
        for name, page in zip(names, reversed(pages), strict=True):
            connection.execute("UPDATE sqlite_master SET rootpage = ? WHERE name = ?", (page, name))


QUARANTINED = {
    "a flipped bit": (lambda data: _flip(_file(data)), "payload_damaged", "does not match its checksum"),
    "a cut file": (lambda data: os.truncate(_file(data), 500), "payload_damaged", "bytes instead of"),
    "an empty file": (lambda data: os.truncate(_file(data), 0), "payload_damaged", "no readable header"),
    "a grown file": (lambda data: os.truncate(_file(data), 5000), "payload_damaged", "bytes instead of"),
    "another shape": (lambda data: _replaced(data, b"[2,3,8]", b"[3,2,8]"), "payload_damaged", "header"),
    "another owner": (lambda data: _replaced(data, b'"chunk":"2"', b'"chunk":"3"'), "payload_damaged", "another chunk"),
    "no file": (lambda data: _file(data).unlink(), "payload_missing", "missing"),
    "a folder instead": (lambda data: (_file(data).unlink(), _mkdir(data)), "payload_damaged", "is a folder"),
    "no content": (
        lambda data: execute(data, "DELETE FROM contents WHERE chunk_id = 2"),
        "record",
        "content is missing",
    ),
    "no descriptor": (
        lambda data: execute(data, "UPDATE contents SET payload = NULL WHERE chunk_id = 2"),
        "record",
        "its descriptor has 0 bytes",
    ),
    "a damaged descriptor": (
        lambda data: execute(data, "UPDATE contents SET payload = substr(payload, 9) WHERE chunk_id = 2"),
        "record",
        "cannot be read",
    ),
    "the descriptor of another": (
        lambda data: execute(
            data, "UPDATE contents SET payload = (SELECT payload FROM contents WHERE chunk_id = 1) WHERE chunk_id = 2"
        ),
        "record",
        "another chunk",
    ),
    "a kind that nobody knows": (lambda data: _state_kind(data, "junk"), "record", "its descriptor"),
    "the kind of another": (lambda data: _state_kind(data, "soft_tokens"), "record", "its descriptor"),
    "a short embedding": (
        lambda data: execute(data, "UPDATE contents SET embedding = x'0000803F' WHERE chunk_id = 2"),
        "record",
        "4 bytes instead of 16",
    ),
    "an embedding of NaN": (
        lambda data: execute(data, f"UPDATE contents SET embedding = x'{'0000C07F' * 4}' WHERE chunk_id = 2"),
        "record",
        "not finite",
    ),
    "damaged metadata": (
        lambda data: execute(data, "UPDATE chunks SET meta = '[]' WHERE chunk_id = 2"),
        "record",
        "metadata",
    ),
    "a link": (lambda data: (_file(data).rename(data / "moved"), _file_link(data)), "payload_damaged", "is a link"),
    **{
        f"{column}: {value}": (lambda data, column=column, value=value: _set(data, column, value), "record", detail)
        for column, value, detail in (
            ("start", "101", "not as it was written"),
            ("original_length", "6", "not as it was written"),
            ("created", "created + 1", "not as it was written"),
            ("meta", "replace(meta, 'speaker', 'speakes')", "metadata are not"),
            ("meta", "CAST(x'7b22ff223a2261227d' AS TEXT)", "cannot be read"),
            ("text", "'b text'", "not as it was written"),
            ("text", "CAST(x'ff20746578740a' AS TEXT)", "not as it was written"),
            ("token_ids", "x'0100000002000000030000000400000006000000'", "not as it was written"),
            ("embedding", "x'00000040000000000000000000000000'", "not as it was written"),
            ("payload", "replace(payload, '\"none\"', '\"nome\"')", "not as it was written"),
            ("digest", "CAST(substr(digest, 1, 31) || 'x' AS BLOB)", "not as"),
            ("digest", "zeroblob(20)", "not as it was written"),
        )
    },
}


def _set(data, column, value):
    table = "contents" if column in ("text", "token_ids", "embedding", "payload") else "chunks"
    with database(data) as connection:
        before = connection.execute(f"SELECT hex({column}) FROM {table} WHERE chunk_id = 2").fetchone()
        connection.execute(f"UPDATE {table} SET {column} = {value} WHERE chunk_id = 2")
        assert connection.execute(f"SELECT hex({column}) FROM {table} WHERE chunk_id = 2").fetchone() != before


def _file_link(data):
    place = next((data / "payloads").glob("*/02"))
    (place / "2.safetensors").symlink_to(data / "moved")


def _state_kind(data, kind):
    execute(data, f"UPDATE contents SET payload = json_set(payload, '$[4]', '{kind}') WHERE chunk_id = 2")


def _mkdir(data):
    (next((data / "payloads").iterdir()) / "02" / "2.safetensors").mkdir()


@pytest.mark.parametrize("name", QUARANTINED)
def test_a_damaged_chunk_is_found_and_quarantined_and_the_others_stay(filled, serving, data, name):
    damage, kind, detail = QUARANTINED[name]
    damage(data)
    found = answer("check", data, code=1)
    assert [(p["bank"], p["chunk_id"]) for p in found["problems"] if p["kind"] == kind] == [("b", 2)]
    assert set(kinds(found)) <= {kind, "index_damaged"}  # where the snapshot has the embedding that was
    assert detail in found["problems"][0]["detail"]
    assert f"{kind}: bank b, chunk 2" in run("check", data, code=1).stdout
    before = tree(data, without=("-shm", "-wal", ".lock"))
    assert "would be quarantined" in run("repair", data, "--dry-run").stdout
    assert tree(data, without=("-shm", "-wal", ".lock")) == before
    done = answer("repair", data)
    assert (done["ok"], done["left"]) == (True, [])
    assert {d["done"] for d in done["done"] if d["kind"] == kind} == {"quarantined"}
    clean(data)
    assert run("repair", data).stdout == "nothing to mend\n"
    (record,) = (data / "quarantine").glob("*/2.json")
    kept = json.loads(record.read_text())
    assert kept["chunk"]["chunk_id"] == 2
    assert detail in kept["why"]
    assert record.with_suffix(".safetensors").exists() == (kind != "payload_missing")
    caller = serving()
    del filled[2]
    assert caller.retrieve(top_k=10)[1] == filled
    usage = caller.usage()
    assert (usage.chunks, usage.chunks_quarantined, usage.chunks_deleted) == (3, 1, 1)


def test_soft_tokens_whose_kind_was_dropped_are_quarantined(serving, data):
    """Their file is as it was written, and would be served as keys and values."""
    serving()
    with kvbank.connect(serving.server.address) as client:
        embedding = kvbank.EmbeddingSpec("e", dimension=4)
        client.create_bank("b", kv=kvbank.KVSpec("r", (1,), 2, 8, "fp32", hidden_size=6), embedding=embedding)
        soft = (kvbank.NewChunk([1, 0, 0, 0], {"soft": np.ones((2, 6), np.float32)}) for _ in range(2))
        ids = [each.chunk_id for each in client.write_many("b", soft, reader_digest="r", embedder_digest="e")]
    serving.stop()
    assert clean(data)["payloads"] == 2
    execute(data, f"UPDATE contents SET payload = json_remove(payload, '$[4]') WHERE chunk_id = {ids[1]}")
    for options in ([], ["--fast"]):
        (problem,) = answer("check", data, *options, code=1)["problems"]
        assert (problem["kind"], problem["chunk_id"]) == ("record", ids[1])
        assert "kind" in problem["detail"]
    assert [(done["done"], done["chunk_id"]) for done in answer("repair", data)["done"]] == [("quarantined", ids[1])]
    assert clean(data)["payloads"] == 1


def test_metadata_that_were_replaced_are_as_they_were_written(filled, serving, data):
    caller = serving()
    for metadata in ({"speaker": "b"}, {}, {"x" * 50: "ü"}):
        caller.stub.UpdateChunk(pb.UpdateChunkRequest(bank="b", chunk_id=2, metadata=metadata))
        clean(data)
    serving.stop()
    _set(data, "meta", "'{}'")
    assert [p["chunk_id"] for p in answer("check", data, code=1)["problems"]] == [2]
    caller = serving()
    # Damage of the rest is not covered up.
    _set(data, "text", "'b text'")
    caller.stub.UpdateChunk(pb.UpdateChunkRequest(bank="b", chunk_id=2, metadata={"speaker": "c"}))
    assert "record" in kinds(answer("check", data, code=1))


def test_rows_of_earlier_versions_have_no_checksum_and_are_no_damage(serving, data):
    caller = serving()
    caller.create()
    chunk = caller.chunk()
    caller.write(chunk)
    serving.stop()
    execute(data, "UPDATE chunks SET digest = substr(digest, 1, 16)")
    clean(data)
    caller = serving()
    assert caller.write(chunk)[0].replayed
    caller.stub.UpdateChunk(pb.UpdateChunkRequest(bank="b", chunk_id=1, metadata={"speaker": "b"}))
    assert caller.write(chunk)[0].replayed
    clean(data)


def test_files_that_were_swapped_are_both_quarantined(filled, data):
    _swap(data)
    assert [p["chunk_id"] for p in answer("check", data, code=1)["problems"]] == [1, 2]
    answer("repair", data)
    assert clean(data)["chunks"] == 3


def test_fast_looks_at_existence_and_size(filled, data):
    _flip(_file(data, 1))
    os.truncate(_file(data, 2), 500)
    _file(data, 3).unlink()
    found = answer("check", data, "--fast", code=1)
    assert [(p["kind"], p["chunk_id"]) for p in found["problems"]] == [("payload_damaged", 2), ("payload_missing", 3)]


NO_BANK = "0123456789abcdef"


def _beside_a_note(data, folder):
    shutil.copytree(_file(data).parent, folder / "02")
    (folder / "note.txt").write_text("mine")


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
    "file": (lambda data: shutil.copy(_file(data), _file(data).with_name("77.safetensors")), "orphan_file", "removed"),
    "temporary": (lambda data: _file(data).with_name("77.tmp").touch(), "orphan_file", "removed"),
    "place": (lambda data: shutil.copy(_file(data), _file(data, 1).parent), "orphan_file", "removed"),
    "folder": (lambda data: (data / "payloads" / NO_BANK / "00").mkdir(parents=True), "orphan_file", "removed"),
    "file in a folder": (lambda data: _beside_a_note(data, data / "payloads" / NO_BANK), "orphan_file", "removed"),
    "indexes": (lambda data: (data / "indexes" / "nobank").mkdir(parents=True), "orphan_index", "removed"),
    "database": (_exchange_indexes, "database", "rebuilt"),
}


@pytest.mark.parametrize("name", MENDED)
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
    "a flipped bit": (_flip, "index_damaged", "checksum"),
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


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_snapshots_of_an_index_are_compared_and_bad_ones_removed(filled, serving, data, connect, name):
    serving()
    with connect(serving.server.address, first_key=1000) as caller:
        caller.create("many", layers=())
        vectors = np.random.default_rng(1).normal(size=(600, 4))
        acks = caller.write(*(caller.chunk(vector, layers=()) for vector in vectors), bank="many")
        caller.retrieve(banks=["many"], reader_digest="")
        gone = [ack.chunk_id for ack in acks[:10]]
        caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="many", chunk_ids=gone))
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
        assert sorted(hit.chunk_id for hit in hits) == [ack.chunk_id for ack in acks[10:]]


def test_a_disk_that_is_not_mounted_is_no_damage(filled, data):
    (data / "payloads").rename(data / "elsewhere")
    (data / "payloads").mkdir()
    assert kinds(answer("check", data, code=1)) == ["payload_missing"]
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
    """Where the banks are gone too, every payload would be taken for an orphan."""
    execute(data, "DELETE FROM store", "DELETE FROM banks", "DELETE FROM chunks")
    before = tree(data / "payloads")
    assert "put a backup in place" in refusal("repair", data)
    assert tree(data / "payloads") == before


def test_a_file_that_cannot_be_read_is_no_damage(filled, serving, data):
    """It is found and left, beside what is mended."""
    file, aside = _file(data, 2), data.with_name("aside")
    shutil.copy(file, aside)
    _make_unreadable(file)
    _file(data, 3).unlink()
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


def _make_unreadable(file):
    """Alone in its folder, which the disk then does not give."""
    shutil.rmtree(file.parent)
    file.parent.symlink_to(file.parent)


def test_files_of_a_person_are_left_alone(filled, data):
    names = ("note.txt", "nested/00/5.safetensors", f"{NO_BANK}/note.txt", f"{NO_BANK}/zz/5.tmp")
    notes = [data / "payloads" / name for name in names]
    notes += [_file(data).with_name(name) for name in ("note.txt", "5.bak", "x5.tmp")]
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


def test_a_repair_that_is_killed_anywhere_is_taken_up(filled, data, tmp_path, monkeypatch):
    """At each of the system calls that change a file or make it durable."""
    _flip(_file(data, 2))
    _file(data, 3).unlink()
    _file(data).with_name("77.tmp").touch()
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
                run("repair", data)
        if left[0] >= 0:
            break
        steps += 1
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


# Beside a running server


class Traffic:
    """Threads that write, evict, delete, retrieve and make banks come and go until the block ends."""

    def __init__(self, address, connect):
        self._address, self._connect = address, connect
        self._stop = threading.Event()
        self.rounds = 0

    def __enter__(self):
        self._threads = [threading.Thread(target=work) for work in (self._churn, self._banks)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _churn(self):
        with self._connect(self._address, first_key=10_000) as caller:
            while not self._stop.is_set():
                acks = caller.write(*(caller.chunk() for _ in range(20)))
                ids = [ack.chunk_id for ack in acks]
                caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=ids[::4]))
                caller.retrieve(top_k=5, omit_payload=True)
                self.rounds += 1

    def _banks(self):
        with self._connect(self._address, first_key=1_000_000) as caller:
            while not self._stop.is_set():
                caller.create("short")
                caller.write(*(caller.chunk() for _ in range(10)), bank="short")
                caller.stub.DeleteBank(pb.DeleteBankRequest(name="short"))


def test_check_and_backup_beside_a_busy_server_cry_no_wolf(serving, data, tmp_path, connect):
    """Chunks are written, evicted and deleted all the time; half a bank goes at once."""
    caller = serving()
    caller.create(capacity={"chunks": 150})
    backups = 0
    with Traffic(serving.server.address, connect) as traffic:
        while backups < 3 or traffic.rounds < 15:
            assert answer("check", data)["ok"]
            assert answer("check", data, "--fast")["ok"]
            made = answer("backup", data, tmp_path / f"backup{backups}")
            assert made["ok"], made
            backups += 1
    for number in range(backups):
        assert answer("check", tmp_path / f"backup{number}")["ok"]
    run("restore", tmp_path / "backup0", tmp_path / "restored")
    clean(tmp_path / "restored")
    serving.stop()
    clean(data)


def test_damage_is_found_beside_a_running_server(serving, data, payload_path):
    caller = serving()
    caller.create()
    ids = [caller.add() for _ in range(3)]
    _flip(payload_path(ids[0]))
    payload_path(ids[1]).unlink()
    found = answer("check", data, code=1)
    assert [(p["kind"], p["chunk_id"]) for p in found["problems"]] == [
        ("payload_damaged", ids[0]),
        ("payload_missing", ids[1]),
    ]


# Backup and restore


def test_a_restored_folder_gives_the_same_bits_under_another_store_id(serving, data, tmp_path):
    caller = serving()
    caller.create()
    caller.create("plain", layers=())
    chunk, content = caller.chunk((1, 0, 0, 0), pinned=True)
    first = caller.write((chunk, content))[0].chunk_id
    ids = [first, *(caller.add() for _ in range(4))]
    caller.add(bank="plain", layers=())
    before = caller.retrieve(top_k=10)[1]
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[ids[1]]))
    info = caller.stub.GetServerInfo(pb.GetServerInfoRequest())
    counted = caller.count(first)
    made = answer("backup", data, tmp_path / "backup")
    assert (made["totals"]["chunks"], made["totals"]["copied"]) == (5, 4)
    clean(tmp_path / "backup")
    serving.stop()
    restored = answer("restore", tmp_path / "backup", tmp_path / "new")
    clean(tmp_path / "new")
    with LocalServer(tmp_path / "new", min_free=0) as server:
        again = type(caller)(server.address, first_key=5000)
        assert again.stub.GetServerInfo(pb.GetServerInfoRequest()).store_id == restored["store_id"] != info.store_id
        del before[ids[1]]
        assert again.retrieve(top_k=10)[1] == before
        assert again.stub.GetChunk(pb.GetChunkRequest(bank="b", chunk_id=first)).chunk.pinned
        assert again.count(first) == counted + 1
        replay = again.write((chunk, content))[0]
        assert (replay.chunk_id, replay.replayed) == (first, True)
        assert again.add() > max(ids)
        again.channel.close()
    assert sorted(path.name for path in (tmp_path / "backup").iterdir()) == ["backup.json", "metadata.db", "payloads"]


def test_damage_stays_out_of_a_backup_and_is_said(filled, serving, data, tmp_path):
    _flip(_file(data, 2))
    _file(data, 3).unlink()
    caller = serving()
    made = answer("backup", data, tmp_path / "backup", code=1)
    assert [(p["kind"], p["chunk_id"]) for p in made["problems"]] == [("payload_damaged", 2), ("payload_missing", 3)]
    manifest = json.loads((tmp_path / "backup" / "backup.json").read_text())
    assert [left["chunk_id"] for left in manifest["left_out"]] == [2, 3]
    assert caller.ids() == [1, 2, 3, 4]
    clean(tmp_path / "backup")
    run("restore", tmp_path / "backup", tmp_path / "new")
    assert clean(tmp_path / "new")["chunks"] == 3


def test_a_damaged_backup_is_refused_or_restored_without_the_damage(filled, data, tmp_path):
    run("backup", data, tmp_path / "backup")
    _flip(_file(tmp_path / "backup", 2))
    _file(tmp_path / "backup", 3).unlink()
    listed = answer("restore", tmp_path / "backup", tmp_path / "new", code=1)
    assert [(p["kind"], p["chunk_id"]) for p in listed["problems"]] == [("payload_damaged", 2), ("payload_missing", 3)]
    assert "nothing was restored" in run("restore", tmp_path / "backup", tmp_path / "new", code=1).stdout
    assert {path.name for path in tmp_path.iterdir()} == {"data", "backup"}
    (tmp_path / "new").mkdir()
    assert len(answer("restore", tmp_path / "backup", tmp_path / "new", "--skip-damaged")["problems"]) == 2
    assert clean(tmp_path / "new")["chunks"] == 3
    _flip(tmp_path / "backup" / "metadata.db")
    assert kinds(answer("check", tmp_path / "backup", code=1))[0] in ("database", "manifest")
    for options in ([], ["--skip-damaged"]):
        assert "does not match its checksum" in refusal("restore", tmp_path / "backup", tmp_path / "other", *options)


def test_what_cannot_be_read_counts_as_no_damage_in_a_copy(filled, data, tmp_path):
    """In its usage, quarantined is what is damaged; what only could not be read is gone, like a deleted one."""

    def gone(folder):
        with database(folder) as connection:
            counts = "SELECT chunks, chunks_quarantined, chunks_deleted FROM banks WHERE name = 'b'"
            return connection.execute(counts).fetchone()

    assert gone(data) == (4, 0, 1)
    _flip(_file(data, 2))
    _make_unreadable(_file(data, 3))
    made = answer("backup", data, tmp_path / "backup", code=1)
    assert [(p["kind"], p["chunk_id"]) for p in made["problems"]] == [
        ("payload_damaged", 2),
        ("payload_unreadable", 3),
    ]
    assert gone(tmp_path / "backup") == (2, 1, 2)
    clean(tmp_path / "backup")
    _make_unreadable(_file(tmp_path / "backup", 4))
    assert kinds(answer("restore", tmp_path / "backup", tmp_path / "new", "--skip-damaged")) == ["payload_unreadable"]
    assert gone(tmp_path / "new") == (1, 1, 3)
    clean(tmp_path / "new")
    assert gone(data) == (4, 0, 1)


def test_an_older_backup_lends_its_files(filled, serving, data, tmp_path, connect):
    run("backup", data, tmp_path / "old")
    serving()
    with connect(serving.server.address, first_key=1000) as caller:
        caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[1]))
        new = caller.add()
    _flip(_file(tmp_path / "old", 2))
    made = answer("backup", data, tmp_path / "new", "--base", tmp_path / "old")
    assert (made["totals"]["linked"], made["totals"]["copied"]) == (2, 2)
    assert _file(tmp_path / "new", 3).samefile(_file(tmp_path / "old", 3))
    assert not _file(tmp_path / "new", 2).samefile(_file(tmp_path / "old", 2))
    assert _file(tmp_path / "new", new).exists()
    clean(tmp_path / "new")
    shutil.rmtree(tmp_path / "old")
    clean(tmp_path / "new")


def test_a_backup_that_was_killed_is_taken_up(serving, data, tmp_path):
    caller = serving()
    caller.create()
    ids = [ack.chunk_id for ack in caller.write(*(caller.chunk() for _ in range(400)))]
    partial = tmp_path / "backup.partial"
    command = [sys.executable, "-c", "from kvbank.cli import main; main()", "backup", data, tmp_path / "backup"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while len(list(partial.glob("payloads/*/*/*.safetensors"))) < 3:
            assert process.poll() is None
        process.kill()
    assert not (tmp_path / "backup").exists()
    there = {path.name for path in partial.glob("payloads/*/*/*.safetensors")}
    assert 0 < len(there) < len(ids)
    (partial / "backup.json.tmp").touch()  # as if it had come further
    caller.stub.DeleteChunks(
        pb.DeleteChunksRequest(bank="b", chunk_ids=[int(name.split(".")[0]) for name in there][:1])
    )
    made = answer("backup", data, tmp_path / "backup")
    assert made["totals"]["reused"] == len(there) - 1
    assert made["totals"]["reused"] + made["totals"]["copied"] == len(ids) - 1
    assert clean(tmp_path / "backup")["chunks"] == len(ids) - 1
    assert not partial.exists()
    assert not list((tmp_path / "backup").rglob("*.tmp"))


def test_a_restore_that_was_interrupted_is_taken_up(filled, data, tmp_path, monkeypatch):
    run("backup", data, tmp_path / "backup")
    link, left = os.rename, [3]

    def rename(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device", str(arguments[0]))
        link(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename)
        assert "No space left on device" in refusal("restore", tmp_path / "backup", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert answer("restore", tmp_path / "backup", tmp_path / "new")["totals"]["reused"] == 3
    clean(tmp_path / "new")
    assert not (tmp_path / "new.partial").exists()


def test_the_commands_of_the_documentation(serving, tmp_path, monkeypatch):
    care = (ROOT / "docs" / "operations.md").read_text().split("\n## Care\n")[1].split("\n## ")[0]
    caller = serving()
    caller.create()
    caller.add()
    serving.stop()
    (tmp_path / "data").rename(tmp_path / "memory")
    (tmp_path / "backups").mkdir()
    monkeypatch.chdir(tmp_path)
    for line in care.split("```")[1].strip().splitlines():
        _, *words = line.partition("#")[0].split()
        run(*(word.replace("/backups", "backups") for word in words))
    assert clean(tmp_path / "restored")["chunks"] == 1
    rows = [row.split("|")[1] for row in care.splitlines() if row.startswith("| `")]
    assert sorted(kind for row in rows for kind in row.split("`")[1::2]) == sorted(get_args(Kind))


# Wrong use


@pytest.fixture
def places(filled, data, tmp_path):
    """Names in the cases below -> paths."""
    run("backup", data, tmp_path / "backup")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "strange.partial").mkdir()
    (tmp_path / "strange.partial" / "note").write_text("mine")
    names = ("data", "backup", "file", "empty", "missing", "strange", "data/inside", "backup/inside", "missing/dest")
    return {name: tmp_path / name for name in names}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("check missing", "there is no folder"),
        ("check file", "is not a folder"),
        ("check empty", "is not a data folder of kvbank: it has no metadata.db"),
        ("repair missing", "there is no folder"),
        ("repair empty", "is not a data folder"),
        ("repair backup", "is a backup"),
        ("backup missing strange", "there is no folder"),
        ("backup empty missing", "is not a data folder"),
        ("backup data backup", "exists"),
        ("backup data file", "exists"),
        ("backup data data", "is inside of"),
        ("backup data data/inside", "is inside of"),
        ("backup data missing/dest", "there is no folder"),
        ("backup data strange", "note is not of an interrupted run"),
        ("backup data missing --base data", "is not a backup of kvbank: it has no backup.json"),
        ("backup data missing --base missing", "there is no folder"),
        ("restore missing strange", "there is no folder"),
        ("restore file missing", "is not a folder"),
        ("restore data missing", "is not a backup"),
        ("restore backup data", "exists and is not an empty folder"),
        ("restore backup file", "exists"),
        ("restore backup backup/inside", "is inside of"),
        ("restore backup missing/dest", "there is no folder"),
    ],
)
def test_wrong_input_is_one_line_and_changes_nothing(places, tmp_path, words, text):
    before = tree(tmp_path, without=("-shm", "-wal"))
    command, *rest = words.split()
    assert text in refusal(command, *(places.get(word, word) for word in rest))
    assert tree(tmp_path, without=("-shm", "-wal")) == before


@pytest.mark.parametrize("words", [[], ["a", "b", "c"], ["--no-such"]])
@pytest.mark.parametrize("command", ["check", "repair", "backup", "restore"])
def test_usage_errors_end_with_2(command, words):
    run(command, *words, code=2)
    assert "Usage: " in run(command, "--help").stdout


def test_a_backup_is_not_served(places, tmp_path):
    before = tree(places["backup"])
    with pytest.raises(StartError, match=r"is a backup; put it in place with: kvbank restore .*backup DATA"):
        LocalServer(places["backup"])
    assert tree(places["backup"]) == before


def test_without_permission(filled, data, tmp_path):
    if os.geteuid() != 0:
        data.chmod(0)
        try:
            assert "Permission denied" in refusal("check", data)
        finally:
            data.chmod(0o700)
        return
    run("check", data)  # imports what another user may not be able to read
    tmp_path.chmod(0)
    os.seteuid(65534)
    try:
        for command in (["check", data], ["repair", data], ["backup", data, "/nowhere/x"], ["restore", data, data]):
            assert "Permission denied" in refusal(*command)
    finally:
        os.seteuid(0)
        tmp_path.chmod(0o700)


@pytest.fixture
def reachable():
    """A folder that every user can reach, and nobody but root can write to what is in it."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        yield Path(place)


@contextlib.contextmanager
def without_writing(folder):
    """A folder that cannot be written to; root can always write, and is somebody else in the block."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)


def test_a_folder_that_cannot_be_written_to_is_checked_and_backed_up(filled, serving, data, reachable, connect):
    run("backup", data, reachable / "backup")  # imports what another user may not be able to read
    clean(reachable / "backup")
    serving()
    with connect(serving.server.address, first_key=1000) as caller:
        caller.add()
        # With a log that is not in the database yet, and the -shm that a kill leaves beside it; then without that.
        subprocess.run(["cp", "-r", data, reachable / "killed"], check=True)
        subprocess.run(["cp", "-r", data, reachable / "copied"], check=True)
    serving.stop()
    (reachable / "copied" / "metadata.db-shm").unlink()
    shutil.copytree(data, reachable / "stopped")
    shutil.copytree(data, reachable / "read")
    clean(reachable / "read")
    assert (reachable / "read" / "metadata.db-wal").exists()
    (reachable / "places").mkdir(0o777)
    (reachable / "places").chmod(0o777)
    for name in ("stopped", "read", "killed"):
        folder, place = reachable / name, reachable / "places" / name
        before = tree(folder)
        with without_writing(folder):
            assert clean(folder)["chunks"] == 6
            run("backup", folder, place)
            assert clean(place)["chunks"] == 6
        assert tree(folder) == before
    with without_writing(reachable / "copied"):
        for command in (["check", reachable / "copied"], ["backup", reachable / "copied", reachable / "places" / "x"]):
            assert "was not stopped cleanly: metadata.db-wal is not in the database yet" in refusal(*command)
    with without_writing(reachable / "backup"):
        clean(reachable / "backup")


def _downgrade(folder):
    """The same records in the first schema."""
    schema.upgrade(folder / "old.db", schema.revisions()[0])
    with database(folder) as new:
        new.execute("ATTACH ? AS old", (str(folder / "old.db"),))
        for table, source in (
            ("store", "store"),
            ("banks", "banks"),
            ("chunks", "chunks JOIN main.contents USING (chunk_id)"),
            ("spent_keys", "spent_keys"),
        ):
            names = ", ".join(name for _, name, *_ in new.execute(f"PRAGMA old.table_info({table})"))
            new.execute("DELETE FROM old." + table)
            new.execute(f"INSERT INTO old.{table} ({names}) SELECT {names} FROM main.{source}")
    os.replace(folder / "old.db", folder / "metadata.db")


def test_a_backup_of_an_older_schema_is_restored_and_upgraded(filled, serving, data, tmp_path):
    backup, new = tmp_path / "backup", tmp_path / "new"
    run("backup", data, backup)
    _downgrade(backup)
    assert "has the older schema 0001" in refusal("check", backup)
    manifest = json.loads((backup / "backup.json").read_text())
    manifest["schema"] = "0001"
    manifest["database"]["xxh3_64"] = xxhash.xxh3_64_hexdigest((backup / "metadata.db").read_bytes())
    (backup / "backup.json").write_text(json.dumps(manifest))
    command = f"kvbank restore --migrate {backup} {new}"
    assert f"has the older schema 0001; restore and upgrade it with: {command}" in refusal("restore", backup, new)
    run("restore", "--migrate", backup, new)
    clean(new)
    shutil.rmtree(data)
    new.rename(data)
    assert serving().retrieve(top_k=10)[1] == filled


def test_an_older_or_newer_schema(filled, data, tmp_path):
    run("backup", data, tmp_path / "backup")
    old = tmp_path / "old"
    old.mkdir()
    schema.upgrade(old / "metadata.db", schema.revisions()[0])
    for command in (["check", old], ["repair", old], ["backup", old, tmp_path / "new"]):
        text = f"{old} has the older schema 0001; upgrade it with: kvbank serve --data {old} --migrate"
        assert text in refusal(*command)
    execute(data, "UPDATE alembic_version SET version_num = '9999'")
    for command in (["check", data], ["repair", data], ["backup", data, tmp_path / "new"]):
        assert "was written by a newer kvbank (schema 9999" in refusal(*command)
    manifest = tmp_path / "backup" / "backup.json"
    text = manifest.read_text()
    assert '"schema": "0002"' in text
    manifest.write_text(text.replace('"schema": "0002"', '"schema": "9999"'))
    assert "was made by a newer kvbank (schema 9999" in refusal("restore", tmp_path / "backup", tmp_path / "new")
    manifest.write_text(text.replace('"kvbank_backup": 1', '"kvbank_backup": 2'))
    assert "was made by a newer kvbank" in refusal("restore", tmp_path / "backup", tmp_path / "new")
    manifest.write_text("{")
    assert "backup.json cannot be read" in refusal("restore", tmp_path / "backup", tmp_path / "new")
