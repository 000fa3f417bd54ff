"""Folders whose names are bytes, and processes that go to another folder."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import kvbank
from memory_service.api.embedded import LocalServer
from memory_service.care.backup import backup
from memory_service.care.check import check
from memory_service.care.restore import restore
from tests.support.synced import wait_until_synced

KV = kvbank.KVSpec("r", layers=(1,), kv_heads=2, head_dim=8, dtype="fp32")
EMBEDDING = kvbank.EmbeddingSpec("e", dimension=4)
DIGESTS = {"reader_digest": "r", "embedder_digest": "e"}


def chunk() -> kvbank.NewChunk:
    key_values = np.ones((2, 1, 8), np.float32)
    tensors = {"k.1": key_values, "v.1": key_values, "pos.1": np.zeros(1, np.int32)}
    return kvbank.NewChunk([1, 0, 0, 0], tensors, text="a text", metadata={"of": "a test"})


def test_a_process_that_goes_to_another_folder_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go where there is a folder of the same name, too."""
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        with kvbank.connect("./memory") as client:
            client.create_bank("b", kv=KV, embedding=EMBEDDING)
    monkeypatch.chdir(tmp_path / "here")
    with kvbank.connect("./memory") as client:
        ids = [client.write("b", chunk(), **DIGESTS).chunk_id]
        monkeypatch.chdir(tmp_path / "there")
        ids.append(client.write("b", chunk(), **DIGESTS).chunk_id)
        assert len(client.fetch("b", ids, reader_digest="r")) == 2
        (path,) = (tmp_path / "here").glob(f"memory/payloads/*/*/{ids[0]}.safetensors")
        wait_until_synced(path.parents[3])
        path.write_bytes(b"damaged")
        with pytest.raises(kvbank.DataLoss):
            client.fetch("b", ids[:1], reader_digest="r")
    monkeypatch.chdir(tmp_path / "here")
    with kvbank.connect("./memory") as client:
        assert [found.chunk_id for found in client.fetch("b", ids[1:], reader_digest="r")] == ids[1:]
    assert len(list((tmp_path / "here").glob("memory/quarantine/*/*.json"))) == 1
    assert not list((tmp_path / "there").glob("memory/payloads/*/*/*"))
    assert not list((tmp_path / "there").glob("memory/quarantine/*"))


def test_a_socket_of_a_relative_path_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with LocalServer("data", listen="unix:./s") as server:
        monkeypatch.chdir("/")
        with kvbank.connect(server.address) as client:
            client.create_bank("b", kv=KV, embedding=EMBEDDING)
    assert (tmp_path / "data" / "metadata.db").exists()


@pytest.mark.parametrize("name", [b"m\xe9moire", b"50%25", b"a b", "\u8a18\u61b6".encode()])
def test_names_are_bytes(tmp_path: Path, name: bytes) -> None:
    """Name the folder, and the one in which its socket lies; the same-host path takes such names too."""
    data = tmp_path / os.fsdecode(name)
    data.mkdir(0o700)  # open to others, it would be named in the log, in bytes that are no text
    for same_host in (False, True):
        with (
            LocalServer(data, listen=f"unix:{data}/s", same_host=same_host) as server,
            kvbank.connect(server.address) as client,
        ):
            client.create_bank("b", kv=KV, embedding=EMBEDDING, exist_ok=True)
            written = client.write("b", chunk(), **DIGESTS)
            assert client.retrieve("b", [1, 0, 0, 0], top_k=9, **DIGESTS).chunks[written.chunk_id].text == "a text"
    with kvbank.connect(data) as client:
        assert len(client.retrieve("b", [1, 0, 0, 0], top_k=9, **DIGESTS).chunks) == 2
    assert check(data).problems == []
    assert backup(data, tmp_path / "backup").problems == []
    assert restore(tmp_path / "backup", tmp_path / os.fsdecode(name + b"2"))[0]


def test_a_chunk_that_was_staged_is_given_back_too(tmp_path: Path) -> None:
    """Look for the copy of its record in the file that the client made."""
    from memory_service.care.repair import repair

    embedding = kvbank.EmbeddingSpec("e", dimension=1536)
    vector = np.random.default_rng(1).normal(size=1536).astype(np.float32)
    with kvbank.connect(tmp_path / "data") as client:
        client.create_bank("b", kv=KV, embedding=embedding)
        new = kvbank.NewChunk(vector, chunk().tensors, text="\u8a18" * 2000, token_ids=[7])
        chunk_id = client.write("b", new, **DIGESTS).chunk_id
    with closing(sqlite3.connect(tmp_path / "data" / "metadata.db", isolation_level=None)) as database:
        for table in ("chunks", "contents", "keys"):
            database.execute(f"DELETE FROM {table}")
        database.execute("UPDATE banks SET chunks = 0, tokens = 0, bytes = 0, chunks_written = 0")
    assert [deed for deed, _ in repair(tmp_path / "data").done] == ["given back"]
    with kvbank.connect(tmp_path / "data") as client:
        (found,) = client.fetch("b", [chunk_id], reader_digest="r")
        assert (found.text, list(found.token_ids)) == (new.text, [7])
        assert client.retrieve("b", vector, **DIGESTS).queries[0][0].chunk_id == chunk_id
