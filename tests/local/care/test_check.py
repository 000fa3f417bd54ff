"""`kvbank check`, and `repair` of chunks that are damaged."""

import json
import os
import subprocess

import grpc
import numpy as np
import pytest

import kvbank
from kvbank.v1 import service_pb2 as pb
from tests.local.care.folders import answer, clean, execute, file_of, flip, kinds, run, set_column, tree
from tests.support.diagonal import rotated


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
    """Reading leaves the log also where the reader is the last to close the database: SQLite checkpoints then, unless
    it may not write."""
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


def _swap(data):
    one, two = file_of(data, 1).read_bytes(), file_of(data, 2).read_bytes()
    file_of(data, 1).write_bytes(two)
    file_of(data, 2).write_bytes(one)


def _replaced(data, old, new):
    raw = file_of(data).read_bytes()
    assert old in raw
    file_of(data).write_bytes(raw.replace(old, new, 1))


QUARANTINED = {
    "a flipped bit": (lambda data: flip(file_of(data)), "payload_damaged", "does not match its checksum"),
    "a cut file": (lambda data: os.truncate(file_of(data), 500), "payload_damaged", "bytes instead of"),
    "an empty file": (lambda data: os.truncate(file_of(data), 0), "payload_damaged", "no readable header"),
    "a grown file": (lambda data: os.truncate(file_of(data), 5000), "payload_damaged", "bytes instead of"),
    "another shape": (lambda data: _replaced(data, b"[2,3,8]", b"[3,2,8]"), "payload_damaged", "header"),
    "another owner": (lambda data: _replaced(data, b'"chunk":"2"', b'"chunk":"3"'), "payload_damaged", "another chunk"),
    "no file": (lambda data: file_of(data).unlink(), "payload_missing", "missing"),
    "a folder instead": (lambda data: (file_of(data).unlink(), _mkdir(data)), "payload_damaged", "is a folder"),
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
    "a link": (lambda data: (file_of(data).rename(data / "moved"), _file_link(data)), "payload_damaged", "is a link"),
    **{
        f"{column}: {value}": (
            lambda data, column=column, value=value: set_column(data, column, value),
            "record",
            detail,
        )
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


def _file_link(data):
    place = next((data / "payloads").glob("*/02"))
    (place / "2.safetensors").symlink_to(data / "moved")


def _state_kind(data, kind):
    execute(data, f"UPDATE contents SET payload = json_set(payload, '$[4]', '{kind}') WHERE chunk_id = 2")


def _mkdir(data):
    (next((data / "payloads").glob("*/02")) / "2.safetensors").mkdir()


@pytest.mark.parametrize("name", rotated([*QUARANTINED], 0, every=2))
def test_a_damaged_chunk_is_found_and_quarantined(filled, data, name):
    damage, kind, detail = QUARANTINED[name]
    damage(data)
    found = answer("check", data, code=1)
    assert [(p["bank"], p["chunk_id"]) for p in found["problems"] if p["kind"] == kind] == [("b", 2)]
    assert set(kinds(found)) <= {kind, "index_damaged"}  # where the snapshot has the embedding that was
    assert detail in found["problems"][0]["detail"]
    done = answer("repair", data)
    assert (done["ok"], done["left"]) == (True, [])
    assert {d["done"] for d in done["done"] if d["kind"] == kind} == {"quarantined"}
    clean(data)
    (record,) = (data / "quarantine").glob("*/2.json")
    kept = json.loads(record.read_text())
    assert kept["chunk"]["chunk_id"] == 2
    assert detail in kept["why"]
    assert record.with_suffix(".safetensors").exists() == (kind != "payload_missing")


@pytest.mark.parametrize("name", ["a flipped bit", "no file", "no content", "start: 101"])
def test_the_others_stay_and_a_dry_run_changes_nothing(filled, serving, data, name):
    damage, kind, _ = QUARANTINED[name]
    damage(data)
    assert f"{kind}: bank b, chunk 2" in run("check", data, code=1).stdout
    before = tree(data, without=("-shm", "-wal", ".lock"))
    assert "would be quarantined" in run("repair", data, "--dry-run").stdout
    assert tree(data, without=("-shm", "-wal", ".lock")) == before
    run("repair", data)
    assert run("repair", data).stdout == "nothing to mend\n"
    caller = serving()
    del filled[2]
    assert caller.retrieve(top_k=10)[1] == filled
    usage = caller.usage()
    assert (usage.chunks, usage.chunks_quarantined, usage.chunks_deleted) == (3, 1, 1)


def test_soft_tokens_whose_kind_was_dropped_are_quarantined(serving, data):
    """Files of such chunks are as they were written, and would be served as keys and values."""
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


def test_metadata_that_were_replaced_are_as_they_were_written(filled, serving, data, refused):
    caller = serving()
    for metadata in ({"speaker": "b"}, {}, {"x" * 50: "ü"}):
        caller.stub.UpdateChunk(pb.UpdateChunkRequest(bank="b", chunk_id=2, metadata=metadata))
        clean(data)
    serving.stop()
    set_column(data, "meta", "'{}'")
    assert [p["chunk_id"] for p in answer("check", data, code=1)["problems"]] == [2]
    caller = serving()
    # Damage of the rest is not covered up.
    set_column(data, "text", "'b text'")
    with refused("CHECKSUM_MISMATCH", grpc.StatusCode.DATA_LOSS):
        caller.stub.UpdateChunk(pb.UpdateChunkRequest(bank="b", chunk_id=2, metadata={"speaker": "c"}))
    assert len(list(data.glob("quarantine/*/2.json"))) == 1


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
    flip(file_of(data, 1))
    os.truncate(file_of(data, 2), 500)
    file_of(data, 3).unlink()
    found = answer("check", data, "--fast", code=1)
    assert [(p["kind"], p["chunk_id"]) for p in found["problems"]] == [("payload_damaged", 2), ("payload_missing", 3)]
