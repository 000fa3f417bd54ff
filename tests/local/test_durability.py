"""Damage, crashes, restarts, schemas: nothing acknowledged is lost, nothing wrong is served."""

import contextlib
import json
import os
import shutil
import socket
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from sqlalchemy import create_engine, inspect

from kvbank.v1 import service_pb2 as pb
from memory_service.api.embedded import LocalServer
from memory_service.care.backup import backup
from memory_service.care.check import check
from memory_service.care.restore import restore
from memory_service.domain.errors import StartError
from memory_service.domain.limits import Pauses
from memory_service.domain.model import Payload, Producer
from memory_service.storage.local.files.layout import MARK
from memory_service.storage.local.files.objects import LocalObjects
from memory_service.storage.local.records import schema
from tests.support.diagonal import rotated
from tests.support.store import new_bank
from tests.support.waiting import wait_until

DATA_LOSS = grpc.StatusCode.DATA_LOSS


def of_services() -> set[threading.Thread]:
    """Return the threads of services of this process: gRPC, and servers of other tests, begin and end some of their own
    meanwhile."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("kvbank")}


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-20] ^= 1
    path.write_bytes(raw)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize("damage", [_flip, _cut, Path.unlink])
def test_damage_is_never_served(caller, refused, payload_path, data, damage):
    bad, good = caller.add((1, 0, 0, 0)), caller.add((0.5, 0, 0, 0))
    path = payload_path(bad)
    damage(path)
    with refused("CHECKSUM_MISMATCH", DATA_LOSS):
        caller.retrieve()
    assert refused.info.metadata["chunk_id"] == str(bad)
    assert list(caller.retrieve()[1]) == [good]
    assert caller.ids() == [good]
    assert caller.usage().chunks_quarantined == 1
    kept = [found.stem for found in (data / "quarantine").rglob("*.safetensors")]
    assert kept == ([] if damage is Path.unlink else [str(bad)])


def test_what_was_known_of_a_damaged_chunk_is_kept_beside_its_file(caller, refused, payload_path, data):
    chunk_id = caller.add()
    _flip(payload_path(chunk_id))
    with refused("CHECKSUM_MISMATCH", DATA_LOSS):
        caller.retrieve()
    (note,) = (data / "quarantine").rglob("*.json")
    said = json.loads(note.read_text())
    assert note.with_suffix(".safetensors").exists()
    assert (said["chunk"]["chunk_id"], said["chunk"]["start"]) == (chunk_id, 100)
    assert json.loads(said["chunk"]["meta"]) == {"speaker": "a"}
    assert said["content"]["text"] == "a text"
    assert "none" in said["content"]["payload"]


@pytest.mark.parametrize("missing", ["payloads", "payloads/????????????????"])
def test_a_disk_that_is_not_there_is_no_damage(caller, refused, data, missing):
    chunk_id = caller.add()
    (folder,) = data.glob(missing)
    folder.rename(data / "elsewhere")
    for call in (caller.retrieve, lambda: caller.fetch(chunk_id)):
        with refused("STORAGE_ERROR", grpc.StatusCode.UNAVAILABLE):
            call()
    assert caller.usage().chunks_quarantined == 0
    (data / "elsewhere").rename(folder)
    assert list(caller.retrieve()[1]) == [chunk_id]


def test_swapped_files_are_noticed(caller, refused, payload_path):
    first, second = caller.add(), caller.add()
    one, two = payload_path(first), payload_path(second)
    one_bytes, two_bytes = one.read_bytes(), two.read_bytes()
    assert len(one_bytes) == len(two_bytes)
    one.write_bytes(two_bytes)
    two.write_bytes(one_bytes)
    for chunk_id in (first, second):
        with refused("CHECKSUM_MISMATCH", DATA_LOSS):
            caller.fetch(chunk_id)
    assert caller.ids() == []


def test_the_same_bytes_in_another_chunk_have_other_checksums(caller):
    """Checksums are seeded so that a file of equal tensors that belongs to another chunk fails too."""
    chunk, data = caller.chunk()
    caller.write((chunk, data))
    chunk.idempotency_key = bytes(16)
    caller.write((chunk, data))
    first, second = (found.payload.checksum for found in caller.retrieve()[0].chunks)
    assert first != second


def test_only_the_asked_layers_are_judged(caller, refused, payload_path):
    chunk_id = caller.add()
    _flip(payload_path(chunk_id))  # in layer 3
    assert list(caller.fetch(chunk_id, layers=[1])) == [chunk_id]
    with refused("CHECKSUM_MISMATCH", DATA_LOSS):
        caller.fetch(chunk_id)


def test_orphans_are_set_aside_at_start(serving, data):
    caller = serving()
    caller.create()
    chunk_id = caller.add()
    serving.stop()
    (file,) = (data / "payloads").glob("*/*/*.safetensors")
    shutil.copy(file, file.with_name("7.safetensors"))
    shutil.copy(file, file.with_name("8.tmp"))
    gone = data / "payloads" / "0123456789abcdef"
    shutil.copytree(file.parent, gone / "01", ignore=shutil.ignore_patterns("7.*"))
    assert list(serving().retrieve()[1]) == [chunk_id]
    serving.stop()
    assert [path for path in (data / "payloads").glob("*/*/*") if path.is_file()] == [file]
    assert not gone.exists()
    aside = {str(path.relative_to(data / "quarantine")) for path in data.glob("quarantine/*/*.safetensors")}
    assert aside == {f"{file.parts[-3]}/7.safetensors", f"{gone.name}/{chunk_id}.safetensors"}
    notes = [json.loads(path.read_text()) for path in data.glob("quarantine/*/*.json")]
    assert {(note["bank"], note["chunk_id"]) for note in notes} == {(file.parts[-3], 7), (gone.name, chunk_id)}
    assert all("no record names it" in note["why"] for note in notes)


def test_what_the_service_has_not_made_is_left_alone(serving, data):
    """Foreign files lie beside the payloads of a bank that is there, of a deleted one, and of one that no record
    names."""
    caller = serving()
    caller.create()
    caller.create("short")
    caller.add()
    caller.add(bank="short")
    serving.stop()
    kept, short = (data / "payloads").glob("*/*/*.safetensors")
    gone = shutil.copytree(kept.parents[1], data / "payloads" / "0123456789abcdef")
    notes = [
        folder / name
        for folder in (kept.parent, short.parent, next(path for path in gone.iterdir() if path.is_dir()))
        for name in ("note.txt", "5.bak", "safetensors", "5.safetensors.old", "x5.safetensors", "-5.safetensors")
    ]
    notes += [data / "payloads" / name for name in ("note.txt", "nested/00/5.safetensors", "0123456789ABCDEF/00/5.tmp")]
    notes += [gone / "zz" / "5.safetensors", kept.parents[1] / "old" / "5.safetensors"]
    for note in notes:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text("of a person")
    (data / "payloads" / "empty").mkdir()
    caller = serving()
    caller.stub.DeleteBank(pb.DeleteBankRequest(name="short"))
    serving.stop()
    left = {path for path in (data / "payloads").rglob("*") if path.is_file() and path.name != MARK}
    assert left in ({*notes, kept}, {*notes, short})
    assert (data / "payloads" / "empty").is_dir()


def _forget_store(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("DELETE FROM store")
        connection.commit()


LOST_RECORDS = {
    "no database": Path.unlink,
    "an empty file": lambda path: os.truncate(path, 0),
    "an empty database": lambda path: (path.unlink(), sqlite3.connect(path).execute("VACUUM").connection.close()),
    "a fresh database": lambda path: (path.unlink(), schema.create(path)),
    "no identity": _forget_store,
}


@pytest.mark.parametrize("name", LOST_RECORDS)
def test_a_start_without_records_deletes_no_payload(serving, data, name):
    caller = serving()
    caller.create()
    chunk_id = caller.add()
    serving.stop()
    kept = data.with_name("kept.db")
    shutil.copy(data / "metadata.db", kept)
    LOST_RECORDS[name](data / "metadata.db")
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*") if "payloads" in path.parts}
    threads = of_services()
    for migrate in (False, True):
        with pytest.raises(StartError, match=f"{data} has payloads.* but no records.*restore.*move") as refusal:
            LocalServer(data, migrate=migrate)
        assert "\n" not in str(refusal.value)
    assert of_services() <= threads
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*") if "payloads" in path.parts} == before
    os.replace(kept, data / "metadata.db")
    assert list(serving().retrieve()[1]) == [chunk_id]
    serving.stop()
    # The other way out that the refusal names.
    (data / "metadata.db").unlink()
    (data / "payloads").rename(data.with_name("elsewhere"))
    serving().create()


def test_payloads_of_deleted_banks_go_although_no_bank_is_left(serving, data):
    """Deletions that were cut off are named by a row; without that row it is not known whose the payloads were."""
    caller = serving()
    caller.create()
    caller.add()
    serving.stop()
    (folder,) = (data / "payloads").glob("????????????????")
    kept = shutil.copytree(folder, data.with_name("kept"))
    caller = serving()
    caller.stub.DeleteBank(pb.DeleteBankRequest(name="b"))

    def left():
        """Count the banks that are still being deleted, which goes on behind the answer."""
        with contextlib.closing(sqlite3.connect(data / "metadata.db")) as connection:
            return connection.execute("SELECT count(*) FROM gone_banks").fetchone()[0]

    wait_until(lambda: left() == 0)
    serving.stop()
    for known in (True, False):
        with contextlib.closing(sqlite3.connect(data / "metadata.db")) as connection:
            connection.execute("INSERT INTO gone_banks SELECT 7, ? WHERE ?", (folder.name, known))
            connection.commit()
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        assert list(serving().stub.ListBanks(pb.ListBanksRequest()).banks) == []
        wait_until(lambda: left() == 0)
        serving.stop()
        assert [path.name for path in (data / "payloads").iterdir()] == [MARK]
        assert len(list(data.glob("quarantine/*/*.safetensors"))) == (not known)


@pytest.mark.parametrize("name", rotated(["a?b", "a%20b", "ü #", "a&mode=memory", "a'b;c"], 0, every=2))
def test_any_name_of_a_folder_will_do(tmp_path, connect, name):
    data = tmp_path / name
    for chunks in (1, 2):
        with LocalServer(data) as server, connect(server.address, first_key=chunks) as caller:
            caller.create()
            caller.add()
            assert caller.usage().chunks == chunks
    assert set(tmp_path.iterdir()) == {data}
    assert check(data).problems == []
    assert backup(data, tmp_path / "backup").problems == []
    assert restore(tmp_path / "backup", tmp_path / f"{name} 2")[0]
    assert check(tmp_path / f"{name} 2").totals["chunks"] == 2
    schema.upgrade(data.with_name(f"{name} 3"), schema.revisions()[0])
    schema.upgrade(data.with_name(f"{name} 3"))


def test_the_sweep_spares_a_bank_that_is_made_meanwhile(tmp_path):
    """Folders of such a bank are on the disk when the sweep looks, and the bank's row came after the sweep had asked
    for the rows."""
    (gone := tmp_path / "payloads" / "0123456789abcdef" / "00").mkdir(parents=True)
    (gone / "7.safetensors").touch()
    payloads = LocalObjects(tmp_path, durable=False)
    payloads.folders.mark_root()
    new = tmp_path / "payloads" / "fedcba9876543210" / "00" / "2048.safetensors"
    payloads.folders.begin("aaaabbbbccccdddd")

    def rows():
        new.parent.mkdir(parents=True)
        new.touch()
        return {}

    assert list(payloads.folders.unowned(rows, below=1025)) == [("0123456789abcdef", 7, gone / "7.safetensors")]
    assert new.exists()
    assert payloads.there("aaaabbbbccccdddd")


def test_every_new_folder_is_durable_in_its_parent_before_the_row(tmp_path, monkeypatch):
    """Also one that another thread has made and not synced yet: its entry is not durable because it is there."""
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(Path(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)))
    data = tmp_path / "new" / "data"
    server = LocalServer(data)
    assert {tmp_path, tmp_path / "new", data} <= set(synced)
    server.stop()
    shard = data / "payloads" / "uid" / "01"
    payloads = LocalObjects(data, durable=True)
    payloads.folders.begin("uid")
    assert {data / "payloads" / "uid" / MARK, data / "payloads" / "uid", data / "payloads"} <= set(synced)
    shard.mkdir()
    synced.clear()
    payloads.put("uid", 1, Payload((), Producer()), b"", lambda _: {})
    assert synced[-1] == shard
    assert {shard.parent, data / "payloads", shard / "1.tmp"} <= set(synced)


def test_a_committed_chunk_keeps_its_file_whatever_fails_after(serving):
    at = {}
    caller = serving(pauses=Pauses(at=at))
    caller.create()
    caller.add()
    caller.retrieve()  # loads the index
    at["index told"] = lambda: 1 / 0
    chunk_id = caller.add()
    at.clear()
    assert chunk_id in caller.retrieve()[1]
    caller = serving()
    assert chunk_id in caller.retrieve()[1]


def test_a_bank_that_is_deleted_twice_and_made_anew_stays(serving, refused):
    """Two calls look the bank up, a third makes it again before the second deletes it."""
    caller = serving(pauses=Pauses(at=(points := {})))
    caller.create()
    banks, hold, submitted = serving.server.banks, threading.Event(), threading.Semaphore(0)
    banks.store.in_order(new_bank(), hold.wait)
    points["submitted"] = submitted.release
    with ThreadPoolExecutor(3) as threads:
        tasks = []
        try:
            for task in (lambda: banks.delete("default", "b"), caller.create, lambda: banks.delete("default", "b")):
                tasks.append(threads.submit(task))
                assert submitted.acquire(timeout=60)
        finally:
            hold.set()
    first, second, third = tasks
    first.result()
    assert second.result().name == "b"
    assert third.exception().reason == "BANK_NOT_FOUND"
    assert caller.add() in caller.ids()


def test_second_server_is_refused(serving, data):
    serving()
    with pytest.raises(StartError, match=r"is in use by process \d+"):
        LocalServer(data)


def test_not_a_folder_or_database(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StartError, match="cannot use"):
        LocalServer(tmp_path / "file")
    (tmp_path / "metadata.db").write_text("no database " * 100)
    with pytest.raises(StartError, match="not a database"):
        LocalServer(tmp_path)
    (tmp_path / "metadata.db").unlink()
    (tmp_path / "metadata.db").mkdir()
    with pytest.raises(StartError, match="cannot be read"):
        LocalServer(tmp_path)


@pytest.mark.timeout(30)
def test_a_database_that_cannot_be_written(serving, data):
    serving()
    serving.stop()
    (data / "metadata.db-wal").mkdir()
    with pytest.raises(StartError, match=f"{data}"):
        LocalServer(data)
    (data / "metadata.db-wal").rmdir()
    LocalServer(data).stop()


@pytest.mark.parametrize(("column", "value"), [("spec", "{"), ("capacity", "[]"), ("policy", "null")])
def test_a_start_that_fails_after_the_database_was_opened_leaves_nothing_running(serving, data, column, value):
    caller = serving()
    caller.create()
    chunk_id = caller.add()
    serving.stop()
    before = of_services()
    with contextlib.closing(sqlite3.connect(data / "metadata.db")) as connection:
        (good,) = connection.execute(f"SELECT {column} FROM banks").fetchone()
        connection.execute(f"UPDATE banks SET {column} = ?", (value,))
        connection.commit()
    with pytest.raises(StartError, match=f"{data} have a damaged bank; see: kvbank check {data}$"):
        LocalServer(data)
    assert of_services() <= before
    assert not list(data.glob("metadata.db-*"))
    assert [problem.kind for problem in check(data).problems] == ["bank"]
    with contextlib.closing(sqlite3.connect(data / "metadata.db")) as connection:
        connection.execute(f"UPDATE banks SET {column} = ?", (good,))
        connection.commit()
    assert list(serving().retrieve()[1]) == [chunk_id]


def test_address_in_use_and_open_address(serving, tmp_path):
    serving()
    with pytest.raises(StartError, match="cannot listen"):
        LocalServer(tmp_path / "other", listen=serving.server.address)
    with pytest.raises(StartError, match="--insecure"):
        LocalServer(tmp_path / "other", listen="0.0.0.0:0")
    LocalServer(tmp_path / "other", listen="0.0.0.0:0", insecure=True).stop()


def test_a_start_that_fails_leaves_nothing_behind(tmp_path):
    """Nonce, socket, threads, port and lock are all free for the next start."""
    data, listen = tmp_path / "data", f"unix:{tmp_path}/s"
    LocalServer(data, listen, same_host=True).stop()
    before = of_services()

    def refused(match, listen=listen, **settings):
        with pytest.raises(StartError, match=match):
            LocalServer(data, listen, **settings)
        assert of_services() <= before
        assert not (data / "same-host.nonce").exists()
        assert not (tmp_path / "s").exists()

    (data / "metadata.db").rename(data / "aside")
    (data / "metadata.db").mkdir()
    refused("cannot be read", same_host=True)
    (data / "metadata.db").rmdir()
    (data / "aside").rename(data / "metadata.db")
    (data / "direct.sock").mkdir()
    refused(r"cannot listen on .*direct\.sock", same_host=True)
    (data / "direct.sock").rmdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    refused(f"cannot listen on {address}", address, metrics_listen=address)
    LocalServer(data, address).stop()
    LocalServer(data, listen, same_host=True, metrics_listen=address).stop()


def test_unix_socket(tmp_path):
    with LocalServer(tmp_path / "data", listen=f"unix:{tmp_path}/socket") as server:
        channel = grpc.insecure_channel(server.address)
        answer = channel.unary_unary("/kvbank.v1.MemoryService/GetServerInfo")(b"")
        assert len(pb.GetServerInfoResponse.FromString(answer).store_id) == 32
        channel.close()


NEXT = '''"""One more column."""
import sqlalchemy as sa
from alembic import op
revision, down_revision = "0010", "0009"


def upgrade() -> None:
    with op.batch_alter_table("banks") as batch:
        batch.add_column(sa.Column("note", sa.String()))
'''


@pytest.fixture
def next_schema(tmp_path):
    """Add one version to the migrations."""
    folder = shutil.copytree(schema.migrations(), tmp_path / "migrations")
    (folder / "versions" / "0010_next.py").write_text(NEXT)
    return folder


def test_older_and_newer_schema(serving, data, next_schema, monkeypatch):
    caller = serving()
    caller.create()
    chunk_id = caller.add()
    serving.stop()
    with monkeypatch.context() as patched:
        patched.setattr(schema, "migrations", lambda: next_schema)
        with pytest.raises(StartError, match=f"older schema 0009.*kvbank serve --data {data} --migrate"):
            serving()
        assert list(serving(migrate=True).retrieve()[1]) == [chunk_id]
        assert list(serving().retrieve()[1]) == [chunk_id]
        serving.stop()
    with pytest.raises(StartError, match="newer kvbank"):
        serving(migrate=True)


def test_a_fresh_database_equals_a_migrated_one(tmp_path):
    def shape(path):
        engine = create_engine(f"sqlite:///{path}")
        found = inspect(engine)
        tables = {
            table: (
                [(column["name"], str(column["type"]), column["nullable"]) for column in found.get_columns(table)],
                found.get_pk_constraint(table),
                found.get_foreign_keys(table),
                sorted((index["name"], index["column_names"]) for index in found.get_indexes(table)),
                sorted((index["name"], index["column_names"]) for index in found.get_unique_constraints(table)),
            )
            for table in found.get_table_names()
        }
        with engine.connect() as connection:
            version = connection.exec_driver_sql("SELECT * FROM alembic_version").all()
            autoincrement = "SELECT name FROM sqlite_master WHERE sql LIKE '%AUTOINCREMENT%' ORDER BY name"
            counted = connection.exec_driver_sql(autoincrement).all()
        engine.dispose()
        return tables, version, counted

    schema.upgrade(tmp_path / "migrated.db")
    schema.create(tmp_path / "fresh.db")
    fresh = shape(tmp_path / "fresh.db")
    assert fresh == shape(tmp_path / "migrated.db")
    assert len(fresh[0]) == 21
    assert len(fresh[2]) == 2


def test_clean_stop_leaves_one_database_file(serving, data):
    caller = serving()
    caller.create()
    caller.add()
    serving.stop()
    assert not list(data.glob("metadata.db-*"))
    connection = sqlite3.connect(data / "metadata.db")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
