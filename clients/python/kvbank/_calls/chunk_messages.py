"""Messages of chunks are made here: the header of a chunk to write, updates, and `Chunk` out of answers."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from kvbank import _models as m
from kvbank._arguments import each, instance, int32, text
from kvbank._calls import metadata as _metadata
from kvbank._calls import tensors as _tensors
from kvbank._calls.answers import read_time, understood
from kvbank._calls.bank_messages import expiry, read_expiry
from kvbank._calls.enums import numbers, word
from kvbank._calls.messages import build
from kvbank.v1 import bank_pb2, chunk_pb2
from kvbank.v1 import service_pb2 as pb
from kvbank.wire import scalars
from kvbank.wire.scalars import Scalar


def header(
    bank: str, chunk: m.NewChunk, reader_digest: str, embedder_digest: str
) -> tuple[pb.ChunkHeader, list[memoryview]]:
    """Return the header frame of a chunk and the bytes that follow it, one view a tensor. Errors: InvalidArgument."""
    instance("chunk", chunk, m.NewChunk)
    described = [_tensors.describe(text("tensors", name), array) for name, array in (chunk.tensors or {}).items()]
    descriptors = [descriptor for descriptor, _ in described]
    stored, token_ids = _stored_length(descriptors), each("token_ids", chunk.token_ids, int32)
    message = build(
        chunk_pb2.Chunk,
        idempotency_key=chunk.idempotency_key,
        start=chunk.start,
        original_length=(len(token_ids) or stored) if chunk.original_length is None else chunk.original_length,
        stored_length=stored,
        token_ids=token_ids,
        text=chunk.text,
        **_metadata.fields(chunk.metadata),
        embedding=_tensors.as_embedding("embedding", chunk.embedding, ndim=1).tobytes(),
        pinned=chunk.pinned,
        expiry=None if chunk.expiry is None else expiry(chunk.expiry),
    )
    if chunk.kind is not None:
        message.payload.kind = numbers(chunk_pb2.PayloadKind)[chunk.kind]
        message.payload.tensors.extend(descriptors)
    if chunk.producer is not None:
        message.payload.producer.CopyFrom(_producer(chunk.producer))
    digests = {"reader_digest": reader_digest, "embedder_digest": embedder_digest}
    head = build(pb.ChunkHeader, bank=bank, chunk=message, if_absent=chunk.if_absent, **digests)
    return head, [view for _, view in described]


def update(bank: str, chunk_id: int, metadata: Mapping[str, Scalar]) -> pb.UpdateChunkRequest:
    """Return the request that replaces the metadata of a chunk. Errors: InvalidArgument."""
    return build(pb.UpdateChunkRequest, bank=bank, chunk_id=chunk_id, **_metadata.fields(metadata))


@understood()
def read_written(message: pb.WriteChunksResponse) -> m.WriteResult:
    """Return the acknowledgement of one chunk. Errors: Internal (ODD_ANSWER)."""
    return m.WriteResult(message.chunk_id, message.replayed, message.gone, tuple(message.evicted_chunk_ids))


@understood()
def read(message: chunk_pb2.Chunk, tensors: dict[str, Any] | None = None) -> m.Chunk:
    """Return the chunk of an answer. tensors: its verified tensors by name, for the caller; None where there are none.

    Errors: Internal (ODD_ANSWER).
    """
    payload = message.payload
    return m.Chunk(
        chunk_id=message.chunk_id,
        bank=message.bank,
        idempotency_key=message.idempotency_key,
        start=message.start,
        original_length=message.original_length,
        stored_length=message.stored_length,
        token_ids=tuple(message.token_ids),
        text=message.text,
        metadata=scalars.read(message),
        producer=_read_producer(payload.producer) if payload.HasField("producer") else None,
        kind=word(chunk_pb2.PayloadKind, payload.kind) if message.HasField("payload") else None,
        layout=tuple(_tensor_info(tensor) for tensor in payload.tensors),
        checksum=payload.checksum,
        tensors=tensors,
        embedding=np.frombuffer(message.embedding, "<f4") if message.embedding else None,
        create_time=read_time(message.create_time),
        retrieval_count=message.retrieval_count,
        last_retrieve_time=read_time(message.last_retrieve_time) if message.HasField("last_retrieve_time") else None,
        pinned=message.pinned,
        expiry=read_expiry(message.expiry) if message.HasField("expiry") else None,
        expire_time=read_time(message.expire_time) if message.HasField("expire_time") else None,
    )


def _stored_length(tensors: Sequence[chunk_pb2.TensorDescriptor]) -> int:
    """Return the number of soft tokens, or the most tokens that a layer keeps: m of `k.<layer>` [Hkv, m, D]."""
    for tensor in tensors:
        if tensor.name == "soft":
            return tensor.shape[0] if tensor.shape else 0
    keys = (tensor.shape for tensor in tensors if tensor.name.startswith("k."))
    return max((shape[1] for shape in keys if len(shape) == 3), default=0)


def _producer(producer: m.Producer) -> chunk_pb2.Producer:
    instance("producer", producer, m.Producer)
    return build(
        chunk_pb2.Producer,
        method=producer.method,
        version=producer.version,
        context=producer.context,
        adapter_digest=producer.adapter_digest,
        measured_loss=producer.measured_loss,
    )


def _read_producer(message: chunk_pb2.Producer) -> m.Producer:
    loss = message.measured_loss if message.HasField("measured_loss") else None
    return m.Producer(message.method, message.version, message.context, message.adapter_digest, loss)


def _tensor_info(message: chunk_pb2.TensorDescriptor) -> m.TensorInfo:
    return _info(message.name, message.dtype, tuple(message.shape), message.length)


@lru_cache(4096)
def _info(name: str, dtype: int, shape: tuple[int, ...], length: int) -> m.TensorInfo:
    """Return what is known of a tensor. The chunks of a bank have the same ones, over and over."""
    return m.TensorInfo(name, word(bank_pb2.DataType, dtype), shape, length)
