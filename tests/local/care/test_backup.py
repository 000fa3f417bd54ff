"""`kvbank backup` and `restore`, also beside a busy server."""

import json
import os
import shutil
import threading
from pathlib import Path
from typing import get_args

import pytest
import xxhash

from kvbank.v1 import service_pb2 as pb
from memory_service.api.embedded import LocalServer
from memory_service.care.report import Kind
from memory_service.storage.local.records import schema
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
)

ROOT = Path(__file__).parents[3]


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


@pytest.mark.slow
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
    flip(payload_path(ids[0]))
    payload_path(ids[1]).unlink()
    found = answer("check", data, code=1)
    assert [(p["kind"], p["chunk_id"]) for p in found["problems"]] == [
        ("payload_damaged", ids[0]),
        ("payload_missing", ids[1]),
    ]


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
    flip(file_of(data, 2))
    file_of(data, 3).unlink()
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
    flip(file_of(tmp_path / "backup", 2))
    file_of(tmp_path / "backup", 3).unlink()
    listed = answer("restore", tmp_path / "backup", tmp_path / "new", code=1)
    assert [(p["kind"], p["chunk_id"]) for p in listed["problems"]] == [("payload_damaged", 2), ("payload_missing", 3)]
    assert "nothing was restored" in run("restore", tmp_path / "backup", tmp_path / "new", code=1).stdout
    assert {path.name for path in tmp_path.iterdir()} == {"data", "backup"}
    (tmp_path / "new").mkdir()
    assert len(answer("restore", tmp_path / "backup", tmp_path / "new", "--skip-damaged")["problems"]) == 2
    assert clean(tmp_path / "new")["chunks"] == 3
    records = tmp_path / "backup" / "metadata.db"
    flip(records, records.read_bytes().index(b'"reader_digest"'))
    assert "manifest" in kinds(answer("check", tmp_path / "backup", code=1))
    for options in ([], ["--skip-damaged"]):
        assert "does not match its checksum" in refusal("restore", tmp_path / "backup", tmp_path / "other", *options)


def test_what_cannot_be_read_counts_as_no_damage_in_a_copy(filled, data, tmp_path):
    """Damaged chunks count as quarantined in the usage of a copy; chunks that could not be read are gone, like deleted
    ones."""

    def gone(folder):
        with database(folder) as connection:
            counts = "SELECT chunks, chunks_quarantined, chunks_deleted FROM banks WHERE name = 'b'"
            return connection.execute(counts).fetchone()

    assert gone(data) == (4, 0, 1)
    flip(file_of(data, 2))
    make_unreadable(file_of(data, 3))
    made = answer("backup", data, tmp_path / "backup", code=1)
    assert [(p["kind"], p["chunk_id"]) for p in made["problems"]] == [
        ("payload_damaged", 2),
        ("payload_unreadable", 3),
    ]
    assert gone(tmp_path / "backup") == (2, 1, 2)
    clean(tmp_path / "backup")
    make_unreadable(file_of(tmp_path / "backup", 4))
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
    flip(file_of(tmp_path / "old", 2))
    made = answer("backup", data, tmp_path / "new", "--base", tmp_path / "old")
    assert (made["totals"]["linked"], made["totals"]["copied"]) == (2, 2)
    assert file_of(tmp_path / "new", 3).samefile(file_of(tmp_path / "old", 3))
    assert not file_of(tmp_path / "new", 2).samefile(file_of(tmp_path / "old", 2))
    assert file_of(tmp_path / "new", new).exists()
    clean(tmp_path / "new")
    shutil.rmtree(tmp_path / "old")
    clean(tmp_path / "new")


def test_a_backup_that_was_interrupted_is_taken_up(serving, data, tmp_path, monkeypatch):
    # A backup that was killed is taken up in tests/proof/care_cuts.py.
    caller = serving()
    caller.create()
    ids = [ack.chunk_id for ack in caller.write(*(caller.chunk() for _ in range(20)))]
    partial = tmp_path / "backup.partial"
    rename, left = os.rename, [3]

    def interrupted(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return rename(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", interrupted)
        run("backup", data, tmp_path / "backup", code=130)
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


def _downgrade(folder):
    """Write the same records in the first schema."""
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
    assert '"schema": "0009"' in text
    manifest.write_text(text.replace('"schema": "0009"', '"schema": "9999"'))
    assert "was made by a newer kvbank (schema 9999" in refusal("restore", tmp_path / "backup", tmp_path / "new")
    manifest.write_text(text.replace('"kvbank_backup": 1', '"kvbank_backup": 2'))
    assert "was made by a newer kvbank" in refusal("restore", tmp_path / "backup", tmp_path / "new")
    manifest.write_text("{")
    assert "backup.json cannot be read" in refusal("restore", tmp_path / "backup", tmp_path / "new")
