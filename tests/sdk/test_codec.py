"""Requests, answers and frames, without a service."""

from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest
import xxhash
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

import kvbank
from kvbank._calls import bank_messages, chunk_messages, enums, reading
from kvbank._calls import tensors as _tensors
from kvbank._calls.writing import WriteSession
from kvbank.v1 import bank_pb2, chunk_pb2, service_pb2, session_pb2
from kvbank.wire import frames

SEED = 77


def stored(chunk_id: int, tensors: dict[str, np.ndarray]) -> tuple[chunk_pb2.Chunk, bytes]:
    """Return a chunk as the service announces it, and the bytes that it sends."""
    message = chunk_pb2.Chunk(chunk_id=chunk_id)
    message.payload.seed = SEED
    sent = b""
    for name, array in tensors.items():
        descriptor, view = _tensors.describe(name, array)
        descriptor.checksum = xxhash.xxh3_64_intdigest(view, seed=SEED)
        message.payload.tensors.append(descriptor)
        sent += bytes(view)
    return message, sent


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.int32])
def test_a_tensor_survives_any_frames(dtype: type) -> None:
    tensors = {
        "k.0": np.arange(24).reshape(2, 3, 4).astype(dtype),
        "empty": np.empty((2, 0, 4), dtype),
        "v.0": np.arange(24).reshape(2, 3, 4).astype(dtype).transpose(2, 1, 0),
    }
    message, sent = stored(5, tensors)
    for step in (1, 7, len(sent)):
        reader = _tensors.PayloadReader([message])
        for start in range(0, len(sent), step):
            reader.feed(sent[start : start + step])
        reader.finish()
        for name, array in tensors.items():
            assert np.array_equal(reader.tensors[5][name], array)
            assert reader.tensors[5][name].dtype == array.dtype


def test_damaged_missing_and_surplus_bytes_are_data_loss() -> None:
    message, sent = stored(5, {"k.0": np.ones((1, 2, 2), np.float32)})
    damaged = bytes([sent[0] ^ 1]) + sent[1:]
    with pytest.raises(kvbank.DataLoss, match="checksum") as caught:
        _tensors.PayloadReader([message]).feed(damaged)
    assert caught.value.metadata == {"chunk_id": "5", "tensor": "k.0"}
    reader = _tensors.PayloadReader([message])
    reader.feed(sent[:-1])
    with pytest.raises(kvbank.DataLoss, match="ended early"):
        reader.finish()
    with pytest.raises(kvbank.DataLoss, match="more bytes"):
        _tensors.PayloadReader([message]).feed(sent + b"x")


def test_a_descriptor_that_contradicts_itself_is_data_loss() -> None:
    message, sent = stored(5, {"k.0": np.ones((1, 2, 2), np.float32)})
    message.payload.tensors[0].shape[0] = 3
    with pytest.raises(kvbank.DataLoss, match="contradicts"):
        _tensors.PayloadReader([message]).feed(sent)


@given(st.lists(st.integers(0, 3 * frames.FRAME_BYTES // 2), max_size=4))
def test_frames_hold_all_bytes_in_order(lengths: list[int]) -> None:
    buffers = [memoryview(bytes([number]) * length) for number, length in enumerate(lengths)]
    pieces = [service_pb2.WriteChunksRequest.FromString(frame).data for frame in _tensors.frames(buffers)]
    assert b"".join(pieces) == b"".join(buffers)
    assert all(len(piece) == frames.FRAME_BYTES for piece in pieces[:-1])
    assert all(pieces)


@given(st.lists(st.binary(max_size=300), max_size=3))
def test_data_frames_are_those_of_protobuf(parts: list[bytes]) -> None:
    message = service_pb2.RetrieveResponse(data=b"".join(parts))
    assert frames.encode(parts) == message.SerializeToString()
    assert bytes(frames.deserializer(service_pb2.RetrieveResponse)(frames.encode(parts))) == message.data
    if message.data:
        frame = frames.Frame(len(message.data))
        frame.room[:] = message.data
        assert frame.encoded() == message.SerializeToString()


def test_other_encodings_of_a_message_are_read_too() -> None:
    read = frames.deserializer(service_pb2.RetrieveResponse)
    assert bytes(read(b"\x12\x01a\x12\x02bc")) == b"bc"  # the last of a repeated field counts
    assert bytes(read(b"\x12\x82\x00bc")) == b"bc"  # a length with a byte too many
    assert bytes(read(b"\x12\x02bc\x98\x06\x01")) == b"bc"  # a field that we do not know
    header = service_pb2.RetrieveResponse(header=service_pb2.RetrieveHeader(store_id="s"))
    assert read(header.SerializeToString()) == header
    with pytest.raises(DecodeError):
        read(b"\x12\x05bc")


@pytest.mark.parametrize(
    ("chunk", "reason"),
    [
        (kvbank.NewChunk([1.0, float("nan")]), "NOT_FINITE"),
        (kvbank.NewChunk([[1.0]]), "INVALID_FIELD"),
        (kvbank.NewChunk([]), "INVALID_FIELD"),
        (kvbank.NewChunk("words"), "INVALID_FIELD"),
        (kvbank.NewChunk([1.0], {"k.0": np.ones((1, 1, 1))}), "TENSOR_MISMATCH"),
        (kvbank.NewChunk([1.0], {"k.0": np.ones((1, 1, 1), ">f4")}), "TENSOR_MISMATCH"),
        (kvbank.NewChunk([1.0], {"k.0": [[[1.0]]]}), "TENSOR_MISMATCH"),  # type: ignore[dict-item]
    ],
)
def test_misuse_is_told_before_anything_is_sent(chunk: kvbank.NewChunk, reason: str) -> None:
    with pytest.raises(kvbank.InvalidArgument) as caught:
        chunk_messages.header("bank", chunk, "", "")
    assert caught.value.reason == reason
    assert isinstance(caught.value, ValueError)


def test_lengths_come_from_the_tensors() -> None:
    tensors = {"k.1": np.ones((2, 5, 4), np.float32), "k.3": np.ones((2, 7, 4), np.float32)}
    header, _ = chunk_messages.header("bank", kvbank.NewChunk([1.0], tensors), "", "")
    assert header.chunk.stored_length == 7
    assert header.chunk.original_length == 7
    header, _ = chunk_messages.header("bank", kvbank.NewChunk([1.0], tensors, token_ids=range(20)), "", "")
    assert header.chunk.original_length == 20


def test_a_capacity_bounds_one_thing() -> None:
    for limits in ({}, {"chunks": 1, "tokens": 1}):
        with pytest.raises(kvbank.InvalidArgument, match="exactly one"):
            kvbank.Capacity(**limits)


def test_unknown_words_are_told_with_the_known_ones() -> None:
    with pytest.raises(kvbank.InvalidArgument, match="frequency, recency_half, reject, lru"):
        bank_messages.update("bank", policy=kvbank.Policy("newest"))


@pytest.mark.parametrize("enum", enums.LITERALS, ids=lambda enum: enum.DESCRIPTOR.name)
def test_every_word_has_its_number_and_every_number_its_word(enum: Any) -> None:
    numbers, words = enums.numbers(enum), get_args(enums.LITERALS[enum])
    assert tuple(numbers) == words
    assert [enums.word(enum, number) for number in numbers.values()] == list(words)
    assert len(set(numbers.values())) == len(words)
    assert set(enum.values()) - set(numbers.values()) <= {0}, "only a value that is not stated has no word"
    assert enums.word(enum, 99) == "99", "a newer server's"


def test_every_enum_that_a_message_of_a_caller_has_is_in_the_table() -> None:
    """Leave out the reasons of evictions, which a server states alone."""
    files = (bank_pb2, chunk_pb2, service_pb2, session_pb2)
    declared = {descriptor for file in files for descriptor in file.DESCRIPTOR.enum_types_by_name.values()}
    assert {enum.DESCRIPTOR for enum in enums.LITERALS} == declared - {service_pb2.EvictionReason.DESCRIPTOR}


def test_a_session_keeps_to_the_bound_and_sends_again_what_was_not_acknowledged() -> None:
    chunks = [kvbank.NewChunk([float(i)], {"k.0": np.ones((1, 64, 4), np.float32)}) for i in range(1, 6)]
    session = WriteSession("bank", chunks, "", "", bound=2_500)
    sent = []
    while session.peek() is not None and session.has_room():
        sent.append(session.advance().key)
    assert sent == [chunk.idempotency_key for chunk in chunks[:2]]
    session.acknowledge(service_pb2.WriteChunksResponse(idempotency_key=sent[0], chunk_id=9))
    assert [upload.key for upload in session.pending] == sent[1:]
    assert session.has_room()
    assert not session.finished()
    with pytest.raises(kvbank.Internal, match="out of order"):
        session.acknowledge(service_pb2.WriteChunksResponse(idempotency_key=sent[0]))


def test_an_answer_without_its_header_is_not_an_empty_one() -> None:
    with pytest.raises(kvbank.Internal, match="no header"):
        reading.Answer().finish()


def test_a_chunk_over_the_bound_goes_alone() -> None:
    session = WriteSession("bank", [kvbank.NewChunk([1.0] * 100)] * 2, "", "", bound=10)
    assert session.peek() is not None
    assert session.has_room()
    session.advance()
    assert session.peek() is not None
    assert not session.has_room()
