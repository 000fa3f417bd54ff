"""Soft tokens in files and backups, over the same host, and at the command line."""

import json
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
import safetensors

import kvbank
from kvbank.v1 import chunk_pb2
from kvbank.v1 import service_pb2 as pb
from memory_service.api.embedded import LocalServer
from memory_service.care.backup import backup
from memory_service.care.check import check
from memory_service.care.restore import restore
from tests.support import command
from tests.support.caller import EMBEDDER, READER, stored_bytes
from tests.support.soft_tokens import HIDDEN, SPEC, soft_chunk, spec


def test_a_bank_mixes_soft_tokens_and_keys_and_values(soft, payload_path):
    new = [soft_chunk(soft, 2), soft.chunk((0.9, 0, 0, 0)), soft_chunk(soft, 5, vector=(0.8, 0, 0, 0), seed=1)]
    ids = [ack.chunk_id for ack in soft.write(*new)]
    header, parts = soft.retrieve()
    assert parts == {chunk_id: data for chunk_id, (_, data) in zip(ids, new, strict=True)} == soft.fetch(*ids)
    kinds = [chunk_pb2.PAYLOAD_KIND_SOFT_TOKENS, chunk_pb2.PAYLOAD_KIND_LAYER_KV, chunk_pb2.PAYLOAD_KIND_SOFT_TOKENS]
    assert [chunk.payload.kind for chunk in header.chunks] == kinds
    assert header.chunks[0].payload.producer == new[0][0].payload.producer
    assert [(t.name, list(t.shape)) for t in header.chunks[2].payload.tensors] == [("soft", [5, HIDDEN])]
    assert [chunk.payload.kind for chunk in soft.stub.ListChunks(pb.ListChunksRequest(bank="b")).chunks] == kinds
    usage = soft.usage()
    assert (usage.chunks, usage.tokens, usage.bytes) == (3, 2 + 3 + 5, sum(stored_bytes(*each) for each in new))
    ((name, stored),) = safetensors.deserialize(payload_path(ids[2]).read_bytes())
    assert (name, stored["dtype"], stored["shape"], bytes(stored["data"])) == ("soft", "BF16", [5, HIDDEN], new[2][1])


def test_damage_in_transit_and_on_the_disk(soft, refused, payload_path):
    chunk, data = soft_chunk(soft)
    with refused("CHECKSUM_IN_TRANSIT", grpc.StatusCode.INVALID_ARGUMENT):
        soft.write((chunk, data[:-1] + bytes([data[-1] ^ 1])))
    [ack] = soft.write((chunk, data))
    path = payload_path(ack.chunk_id)
    path.write_bytes(path.read_bytes()[:-1] + bytes([data[-1] ^ 1]))
    with refused("CHECKSUM_MISMATCH", grpc.StatusCode.DATA_LOSS):
        soft.retrieve()
    assert soft.ids() == []


def test_a_folder_of_before_there_were_soft_tokens(serving, data, refused):
    """Banks and chunks of such a folder say nothing of soft tokens; what is written now is read after a restart."""
    caller = serving()
    caller.create()
    keys = caller.chunk()
    [old] = caller.write(keys)
    serving.stop()
    with closing(sqlite3.connect(data / "metadata.db")) as database:
        kv = json.loads(database.execute("SELECT spec FROM banks").fetchone()[0])
        kv["kv"].pop("hidden_size", None)  # left out where it is 0
        database.execute("UPDATE banks SET spec = ?", (json.dumps(kv),))
        database.commit()
        # As they were: neither a kind nor the checksum of the header, and rows without checksums.
        database.execute("UPDATE chunks SET digest = substr(digest, 1, 16)")
        described = json.loads(database.execute("SELECT payload FROM contents").fetchone()[0])[:4]
        database.execute("UPDATE contents SET payload = ?", (json.dumps(described),))
        database.commit()
    caller = serving()
    assert caller.retrieve()[1] == {old.chunk_id: keys[1]}
    with refused("TENSOR_MISMATCH", grpc.StatusCode.INVALID_ARGUMENT):
        caller.write(soft_chunk(caller, idempotency_key=b"a key not used.."))
    caller.create("new", kv=spec())
    new = soft_chunk(caller, idempotency_key=b"a key not used..")
    [ack] = caller.write(new, bank="new")
    caller = serving()
    header, parts = caller.retrieve(banks=["new"])
    assert parts == {ack.chunk_id: new[1]}
    assert header.chunks[0].payload.kind == chunk_pb2.PAYLOAD_KIND_SOFT_TOKENS


def test_a_backup_has_them_too(serving, data, tmp_path):
    caller = serving()
    caller.create(kv=spec())
    new = [soft_chunk(caller), caller.chunk((0.9, 0, 0, 0))]
    ids = [ack.chunk_id for ack in caller.write(*new)]
    backup(data, tmp_path / "backup")
    serving.stop()
    restore(tmp_path / "backup", tmp_path / "restored")
    assert check(tmp_path / "restored").problems == []
    with kvbank.connect(tmp_path / "restored") as client:
        chunks = client.fetch("b", ids, reader_digest=READER)
    assert [chunk.kind for chunk in chunks] == ["soft_tokens", "layer_kv"]
    assert chunks[0].tensors["soft"].tobytes() == new[0][1]


@pytest.mark.parametrize("same_host", [False, True])
def test_the_sdk_writes_and_reads_them(tmp_path: Path, same_host: bool) -> None:
    """Over the socket, and staged and read as files."""
    random, slots = np.random.default_rng(5), 2000  # more bytes than a header brings along
    array = random.standard_normal((slots, HIDDEN)).astype(ml_dtypes.bfloat16)
    new = kvbank.NewChunk([1, 0, 0, 0], {"soft": array}, token_ids=range(8000), producer=kvbank.Producer("icae"))
    assert new.kind == "soft_tokens"
    digests = {"reader_digest": READER, "embedder_digest": EMBEDDER}
    with tempfile.TemporaryDirectory() as sockets:
        address = f"unix:{sockets}/s" if same_host else "127.0.0.1:0"
        server = LocalServer(tmp_path / "data", address, same_host=same_host, durability="os")
        try:
            with kvbank.connect(server.address) as client:
                kv = kvbank.KVSpec(**SPEC, hidden_size=HIDDEN)
                bank = client.create_bank("b", kv=kv, embedding=kvbank.EmbeddingSpec(EMBEDDER, 4))
                assert bank.kv == kv
                chunk_id = client.write("b", new, **digests).chunk_id
                found = client.retrieve("b", [1, 0, 0, 0], layers=[3], **digests).chunks[chunk_id]
                known = client.get_chunk("b", chunk_id)
                with pytest.raises(kvbank.InvalidArgument, match="must be bf16"):
                    client.write("b", kvbank.NewChunk([1, 0, 0, 0], {"soft": array[:, 1:]}), **digests)
                nested: Any = array.tolist()
                with pytest.raises(kvbank.InvalidArgument, match="expected an array"):
                    client.write("b", kvbank.NewChunk([1, 0, 0, 0], {"soft": nested}), **digests)
                samples = client.stats().samples
                paths = {
                    (each.name, each.labels["path"]): each.value for each in samples if "kvbank_payload_" in each.name
                }
        finally:
            server.stop()
    assert (found.kind, known.kind, known.tensors) == ("soft_tokens", "soft_tokens", None)
    assert (found.original_length, found.stored_length) == (8000, slots)
    assert found.tensors is not None
    assert found.tensors.keys() == {"soft"}
    assert found.tensors["soft"].dtype == array.dtype
    assert found.tensors["soft"].tobytes() == array.tobytes()
    assert known.layout == (kvbank.TensorInfo("soft", "bf16", (slots, HIDDEN), array.nbytes),)
    used = ("staged", "file") if same_host else ("stream", "stream")
    assert paths["kvbank_payload_received_bytes_total", used[0]] == array.nbytes
    assert paths["kvbank_payload_sent_bytes_total", used[1]] == array.nbytes


def test_a_bank_for_them_is_made_on_the_command_line(serving, soft):
    words = f"bank create new --embedder {EMBEDDER} --dimension 4 --memory {serving.server.address} --reader {READER}"
    words += f" --layers 1 --kv-heads 2 --head-dim 8 --hidden-size {HIDDEN}"
    made = command.run(command.application(), *words.split())
    assert made.exit_code == 0, made.stderr
    assert f"soft tokens of {HIDDEN}" in made.stdout
    assert soft.write(soft_chunk(soft), bank="new")
