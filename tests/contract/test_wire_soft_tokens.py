"""Chunks of soft tokens: taken, refused, searched, staged, backed up, and mixed with chunks of K-V in one bank."""

import grpc
import pytest

from kvbank.v1 import bank_pb2, chunk_pb2
from kvbank.v1 import service_pb2 as pb
from tests.support.soft_tokens import HIDDEN, soft_chunk, spec

INVALID, EXISTS = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ALREADY_EXISTS
BF16, FP16, INT32 = bank_pb2.DATA_TYPE_BF16, bank_pb2.DATA_TYPE_FP16, bank_pb2.DATA_TYPE_INT32


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


def test_what_is_no_payload_of_soft_tokens(soft, refused):
    for number, (edit, tensor) in enumerate(
        (
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
        )
    ):
        print("case", number)
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
