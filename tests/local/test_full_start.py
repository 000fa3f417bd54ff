"""A start on a disk without a free byte: what is there can be read and deleted."""

import os
import shutil
import sqlite3
import subprocess
from contextlib import closing, suppress

import pytest

import kvbank
from kvbank.files.opening import free_bytes
from kvbank.v1 import service_pb2 as pb
from memory_service.api.embedded import LocalServer
from memory_service.domain.errors import StartError
from memory_service.storage.local.files import ballast


@pytest.fixture
def small(data):
    data.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(data)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a small disk cannot be mounted")
    yield data
    subprocess.run(["umount", "-l", str(data)], check=True)


def _fill(data):
    with suppress(OSError), open(data / "of somebody else", "ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert free_bytes(data) == 0


@pytest.mark.parametrize("killed", [False, True])
def test_a_start_on_a_full_disk_reads_and_deletes(serving, small, killed, tmp_path, refused):
    caller = serving(min_free=0)
    caller.create()
    ids = [caller.add() for _ in range(3)]
    if killed:
        subprocess.run(["cp", "-r", small, tmp_path / "killed"], check=True)
    serving.stop()
    if killed:
        for path in small.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        subprocess.run(["cp", "-r", f"{tmp_path}/killed/.", small], check=True)
    for _ in range(2):
        _fill(small)
        caller = serving(min_free=0)
        assert list(caller.retrieve(top_k=9)[1]) == ids
        assert caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=ids[:1])).deleted == 1
        del ids[0]
        assert caller.ids() == ids
        serving.stop()
        os.unlink(small / "of somebody else")
        serving(min_free=0)
        serving.stop()
        assert (small / ballast.NAME).exists()


def test_a_start_that_has_no_byte_says_so(serving, small):
    serving(min_free=0).create()
    serving.stop()
    (small / ballast.NAME).unlink()
    _fill(small)
    with pytest.raises(StartError, match=f"^cannot open {small}: its disk is full \\(0 bytes are free\\); make room"):
        LocalServer(small)


def test_a_stop_on_a_full_disk_leaves_the_log_beside_the_database(serving, small, caplog):
    """Stopping ends as any other stop does, though the database has no room for what the log says."""
    caller = serving(min_free=0)
    caller.create()
    ids = [caller.add() for _ in range(30)]
    _fill(small)
    serving.stop()
    assert "the log of the database stays beside it: database or disk is full" in caplog.text
    os.unlink(small / "of somebody else")
    assert serving(min_free=0).ids() == ids


def test_an_upgrade_without_room_to_write_the_records_anew_says_so(serving, data, small, tmp_path, caplog):
    with LocalServer(tmp_path / "older") as older, kvbank.connect(older.address) as client:
        kvbank.TextMemory(client, "notes").add(["a text"])
    with closing(sqlite3.connect(tmp_path / "older" / "metadata.db")) as database:
        for table in ("forgetting_ids", "unsynced"):
            database.execute(f"DROP TABLE {table}")
        database.execute("CREATE INDEX ix_api_keys_tenant ON api_keys (tenant)")
        for index in ("ix_api_keys_tenant_created_key_id", "ix_api_keys_created_key_id"):
            database.execute(f"DROP INDEX {index}")
        database.execute("UPDATE alembic_version SET version_num = '0006'")
        database.execute("CREATE TABLE other AS SELECT randomblob(5 << 20)")
        database.commit()
    shutil.copytree(tmp_path / "older", small, dirs_exist_ok=True)
    caller = serving(min_free=0, migrate=True)
    assert [chunk.text for chunk in caller.stub.ListChunks(pb.ListChunksRequest(bank="notes")).chunks] == ["a text"]
    [said] = [text for text in caplog.messages if "written anew" in text]
    assert "database or disk is full" in said
    assert said.endswith(f"free 6 MiB, stop the service, and run: sqlite3 {data}/metadata.db VACUUM")
