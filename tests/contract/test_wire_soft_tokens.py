"""Chunks of soft tokens: taken, refused, searched, staged, backed up, and mixed with chunks of K-V in one bank."""

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
import xxhash

import kvbank
from kvbank.commands import application
from kvbank.v1 import bank_pb2, chunk_pb2
from kvbank.v1 import service_pb2 as pb
from memory_service.api.embedded import LocalServer
from memory_service.care.backup import backup
from memory_service.care.check import check
from memory_service.care.restore import restore
from tests.support import command
from tests.support.caller import stored_bytes

INVALID, EXISTS = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ALREADY_EXISTS
HIDDEN, READER, EMBEDDER = 6, "reader-a", "embedder-a"
BF16, FP16, INT32 = bank_pb2.DATA_TYPE_BF16, bank_pb2.DATA_TYPE_FP16, bank_pb2.DATA_TYPE_INT32
SPEC = {"reader_digest": READER, "layers": (1, 3), "kv_heads": 2, "head_dim": 8}


def spec(hidden_size: int = HIDDEN) -> bank_pb2.KvSpec:
    return bank_pb2.KvSpec(**SPEC, dtype=BF16, hidden_size=hidden_size)


def described(name: str, dtype: int, shape: tuple[int, ...], data: bytes) -> chunk_pb2.TensorDescriptor:
    checksum = xxhash.xxh3_64_intdigest(data)
    return chunk_pb2.TensorDescriptor(name=name, dtype=dtype, shape=shape, length=len(data), checksum=checksum)


@pytest.fixture
def soft(serving):
    """A server whose bank "b" takes soft tokens."""
    made = serving()
    made.create(kv=spec())
    return made


def soft_chunk(caller, n=2, *, hidden=HIDDEN, vector=(1, 0, 0, 0), seed=0, **fields):
    """A chunk of `n` soft tokens, for the caller's helpers."""
    chunk, _ = caller.chunk(vector, layers=[], stored_length=n)
    data = np.random.default_rng(seed).bytes(2 * n * hidden)
    chunk.payload.kind = chunk_pb2.PAYLOAD_KIND_SOFT_TOKENS
    chunk.payload.tensors.append(described("soft", BF16, (n, hidden), data))
    chunk.payload.producer.CopyFrom(
        chunk_pb2.Producer(method="icae:adapter=a", version="1", adapter_digest="ad", measured_loss=0.25)
    )
    for name, value in fields.items():
        setattr(chunk, name, value)
    return chunk, data


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


def test_soft_tokens_travel_whole_whatever_layers_are_asked_for(soft):
    new = [soft_chunk(soft), soft.chunk((0.9, 0, 0, 0))]
    ids = [ack.chunk_id for ack in soft.write(*new)]
    half = len(new[1][1]) // 2
    expected = {ids[0]: new[0][1], ids[1]: new[1][1][half:]}
    header, parts = soft.retrieve(layers=[3])
    assert parts == expected == soft.fetch(*ids, layers=[3])
    assert [tensor.name for tensor in header.chunks[0].payload.tensors] == ["soft"]


def test_held_soft_tokens_are_not_sent_again_and_a_repeated_write_is_known(soft):
    new = soft_chunk(soft)
    [first] = soft.write(new)
    [again] = soft.write(new)
    assert (again.chunk_id, again.replayed) == (first.chunk_id, True)
    header, _ = soft.retrieve()
    held = [pb.HeldChunk(chunk_id=first.chunk_id, checksum=header.chunks[0].payload.checksum)]
    assert soft.retrieve(store_id=header.store_id, held=held)[1] == {}


@pytest.mark.parametrize(
    ("edit", "tensor"),
    [
        (lambda payload: setattr(payload.tensors[0], "name", "slots"), "slots"),
        (lambda payload: setattr(payload.tensors[0], "dtype", FP16), "soft"),
        (lambda payload: payload.tensors[0].shape.__setitem__(1, HIDDEN + 1), "soft"),
        (lambda payload: payload.tensors[0].shape.__setitem__(0, 6), "soft"),
        (lambda payload: payload.tensors[0].shape.__setitem__(0, 0), "soft"),
        (lambda payload: payload.tensors[0].shape.append(1), "soft"),
        (lambda payload: payload.tensors[0].ClearField("shape"), "soft"),
        (lambda payload: setattr(payload.tensors[0], "length", 4), "soft"),
        (lambda payload: payload.tensors.add().CopyFrom(payload.tensors[0]), "soft"),
        (lambda payload: payload.tensors.add(name="pos.1", dtype=INT32, shape=[2], length=8), "pos.1"),
        (lambda payload: setattr(payload, "kind", chunk_pb2.PAYLOAD_KIND_LAYER_KV), "k.1"),
    ],
)
def test_what_is_no_payload_of_soft_tokens(soft, refused, edit, tensor):
    chunk, data = soft_chunk(soft)
    edit(chunk.payload)
    with refused("TENSOR_MISMATCH", INVALID):
        soft.write((chunk, data))
    assert refused.info.metadata["tensor"] == tensor
    assert soft.ids() == []


def test_the_hidden_size_is_the_banks(soft, refused):
    with refused("TENSOR_MISMATCH", INVALID):
        soft.write(soft_chunk(soft, hidden=HIDDEN - 1))
    assert "must be bf16 [2, 6]" in refused.message
    keys = soft.chunk()
    keys[0].payload.kind = chunk_pb2.PAYLOAD_KIND_SOFT_TOKENS
    with refused("TENSOR_MISMATCH", INVALID):
        soft.write(keys)


@pytest.mark.parametrize("stored_length", [1, 3])
def test_the_stored_length_is_the_number_of_soft_tokens(soft, refused, stored_length):
    with refused("INVALID_FIELD", INVALID):
        soft.write(soft_chunk(soft, stored_length=stored_length))
    assert refused.info.metadata["field"] == "chunk.stored_length"


@pytest.mark.parametrize("kind", [chunk_pb2.PAYLOAD_KIND_UNSPECIFIED, 99])
def test_a_kind_that_is_not_known(soft, refused, kind):
    chunk, data = soft_chunk(soft)
    chunk.payload.kind = kind
    with refused("INVALID_FIELD", INVALID):
        soft.write((chunk, data))
    assert refused.info.metadata["field"] == "chunk.payload.kind"


def test_damage_in_transit_and_on_the_disk(soft, refused, payload_path):
    chunk, data = soft_chunk(soft)
    with refused("CHECKSUM_IN_TRANSIT", INVALID):
        soft.write((chunk, data[:-1] + bytes([data[-1] ^ 1])))
    [ack] = soft.write((chunk, data))
    path = payload_path(ack.chunk_id)
    path.write_bytes(path.read_bytes()[:-1] + bytes([data[-1] ^ 1]))
    with refused("CHECKSUM_MISMATCH", grpc.StatusCode.DATA_LOSS):
        soft.retrieve()
    assert soft.ids() == []


def test_a_bank_without_a_hidden_size_takes_none(caller, refused):
    with refused("TENSOR_MISMATCH", INVALID):
        caller.write(soft_chunk(caller))
    assert "without a hidden size" in refused.message
    assert caller.add()


def test_which_hidden_sizes_a_bank_may_have(soft, refused):
    for kv in (spec(-1), bank_pb2.KvSpec(hidden_size=4)):
        with refused("INVALID_FIELD", INVALID):
            soft.create("new", kv=kv)
        assert refused.info.metadata["field"] == "bank.kv.hidden_size"
    assert soft.create(kv=spec(0)).kv.hidden_size == HIDDEN  # not stated: as it is
    with refused("BANK_EXISTS", EXISTS):
        soft.create(kv=spec(HIDDEN + 1))
    soft.create("older", kv=spec(0))
    with refused("BANK_EXISTS", EXISTS):
        soft.create("older", kv=spec())
    new = [soft_chunk(soft), soft.chunk((0.9, 0, 0, 0))]
    parts = dict(zip([soft.write(new[0])[0].chunk_id, soft.write(new[1], bank="older")[0].chunk_id], new, strict=True))
    assert soft.retrieve(banks=["b", "older"])[1] == {chunk_id: data for chunk_id, (_, data) in parts.items()}


def test_a_folder_of_before_there_were_soft_tokens(serving, data, refused):
    """Neither its banks nor its chunks say anything of them; what is written now is read after a restart."""
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
    with refused("TENSOR_MISMATCH", INVALID):
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
    random = np.random.default_rng(5)
    array = random.standard_normal((3, HIDDEN)).astype(ml_dtypes.bfloat16)
    new = kvbank.NewChunk([1, 0, 0, 0], {"soft": array}, token_ids=range(12), producer=kvbank.Producer("icae"))
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
    assert (found.original_length, found.stored_length) == (12, 3)
    assert found.tensors is not None
    assert found.tensors.keys() == {"soft"}
    assert found.tensors["soft"].dtype == array.dtype
    assert found.tensors["soft"].tobytes() == array.tobytes()
    assert known.layout == (kvbank.TensorInfo("soft", "bf16", (3, HIDDEN), array.nbytes),)
    used = ("staged", "file") if same_host else ("stream", "stream")
    assert paths["kvbank_payload_received_bytes_total", used[0]] == array.nbytes
    assert paths["kvbank_payload_sent_bytes_total", used[1]] == array.nbytes


def test_a_bank_for_them_is_made_on_the_command_line(serving, soft):
    words = f"bank create new --embedder {EMBEDDER} --dimension 4 --memory {serving.server.address} --reader {READER}"
    words += f" --layers 1 --kv-heads 2 --head-dim 8 --hidden-size {HIDDEN}"
    made = command.run(application(), *words.split())
    assert made.exit_code == 0, made.stderr
    assert f"soft tokens of {HIDDEN}" in made.stdout
    assert soft.write(soft_chunk(soft), bank="new")
