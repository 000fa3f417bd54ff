"""Messages of kvbank.v1 to values of the domain and back. Refuses what the messages can say and the domain cannot."""

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from kvbank.v1 import bank_pb2, chunk_pb2, service_pb2
from memory_service.domain import (
    Bank,
    Capacity,
    Chunk,
    DType,
    EmbeddingSpec,
    Eviction,
    EvictionReason,
    KvSpec,
    Payload,
    Policy,
    PolicyKind,
    Producer,
    Tensor,
)
from memory_service.errors import INVALID_ARGUMENT, ServiceError, invalid

_DTYPES: Mapping[int, DType] = {bank_pb2.DataType.Value(f"DATA_TYPE_{name.upper()}"): name for name in get_args(DType)}
_POLICIES: Mapping[int, PolicyKind] = {
    bank_pb2.PolicyKind.Value(f"POLICY_KIND_{name.upper()}"): name for name in get_args(PolicyKind)
}
_DTYPE_NUMBERS: Mapping[str, Any] = {name: number for number, name in _DTYPES.items()}
_POLICY_NUMBERS: Mapping[str, Any] = {name: number for number, name in _POLICIES.items()}
_REASON_NUMBERS: Mapping[str, Any] = {
    name: service_pb2.EvictionReason.Value(f"EVICTION_REASON_{name.upper()}") for name in get_args(EvictionReason)
}


def timestamp(microseconds: int) -> Timestamp:
    """Microseconds since 1970 as a Timestamp."""
    seconds, rest = divmod(microseconds, 1_000_000)
    return Timestamp(seconds=seconds, nanos=rest * 1000)


# Banks


def bank(message: bank_pb2.Bank) -> Bank:
    """What a request says of a bank. Errors: INVALID_FIELD."""
    kv = message.kv
    if message.embedding.metric not in (bank_pb2.METRIC_UNSPECIFIED, bank_pb2.METRIC_INNER_PRODUCT):
        raise invalid("bank.embedding.metric", "must be INNER_PRODUCT")
    return Bank(
        name=message.name,
        kv=KvSpec(
            reader_digest=kv.reader_digest,
            layers=tuple(kv.layers),
            kv_heads=kv.kv_heads,
            head_dim=kv.head_dim,
            dtype=_DTYPES.get(kv.dtype),
            reader_parts=dict(kv.reader_parts),
        ),
        embedding=EmbeddingSpec(message.embedding.embedder_digest, message.embedding.dimension),
        capacity=capacity(message.capacity),
        policy=policy(message.policy),
        metadata=dict(message.metadata),
    )


def capacity(message: bank_pb2.Capacity) -> Capacity | None:
    """None means unbounded."""
    unit = message.WhichOneof("limit")
    return None if unit is None else Capacity(unit, getattr(message, unit))


def policy(message: bank_pb2.EvictionPolicy) -> Policy:
    """Absent figures are MemLong's. Errors: INVALID_FIELD."""
    kind = _POLICIES.get(message.kind, "frequency")
    if message.kind and message.kind not in _POLICIES:
        raise invalid("bank.policy.kind", "is not known")
    given = {name: getattr(message, name) for name in ("lower", "upper", "target") if message.HasField(name)}
    return Policy(kind, **given)


def bank_message(bank: Bank) -> bank_pb2.Bank:
    """With everything that the store knows."""
    kv, policy = bank.kv, bank.policy
    message = bank_pb2.Bank(
        name=bank.name,
        uid=bank.uid,
        kv=bank_pb2.KvSpec(
            reader_digest=kv.reader_digest,
            reader_parts=kv.reader_parts,
            layers=kv.layers,
            kv_heads=kv.kv_heads,
            head_dim=kv.head_dim,
            dtype=_DTYPE_NUMBERS[kv.dtype] if kv.dtype else bank_pb2.DATA_TYPE_UNSPECIFIED,
        ),
        embedding=bank_pb2.EmbeddingSpec(
            embedder_digest=bank.embedding.embedder_digest,
            dimension=bank.embedding.dimension,
            metric=bank_pb2.METRIC_INNER_PRODUCT,
        ),
        policy=bank_pb2.EvictionPolicy(
            kind=_POLICY_NUMBERS[policy.kind], lower=policy.lower, upper=policy.upper, target=policy.target
        ),
        metadata=bank.metadata,
        create_time=timestamp(bank.created),
        usage=bank_pb2.BankUsage(**{name: getattr(bank.usage, name) for name in bank.usage.__slots__}),
    )
    if bank.capacity is not None:
        setattr(message.capacity, bank.capacity.unit, bank.capacity.limit)
    return message


# Chunks


def chunk(message: chunk_pb2.Chunk) -> Chunk:
    """What a write says of a chunk. Errors: INVALID_FIELD, TENSOR_MISMATCH."""
    return Chunk(
        key=message.idempotency_key,
        start=message.start,
        original_length=message.original_length,
        stored_length=message.stored_length,
        token_ids=np.asarray(message.token_ids, "<i4").tobytes(),
        text=message.text,
        metadata=dict(message.metadata),
        embedding=message.embedding,
        payload=_payload(message.payload) if message.HasField("payload") else None,
    )


def _payload(message: chunk_pb2.PayloadDescriptor) -> Payload:
    if message.kind != chunk_pb2.PAYLOAD_KIND_LAYER_KV:
        raise invalid("chunk.payload.kind", "must be LAYER_KV")
    if not message.tensors:
        raise invalid("chunk.payload.tensors", "must not be empty")
    producer = message.producer
    loss = producer.measured_loss if producer.HasField("measured_loss") else None
    return Payload(
        tensors=tuple(_tensor(tensor) for tensor in message.tensors),
        producer=Producer(producer.method, producer.version, producer.context, producer.adapter_digest, loss),
    )


def _tensor(message: chunk_pb2.TensorDescriptor) -> Tensor:
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        text = f"tensor {message.name}: unknown dtype"
        raise ServiceError(INVALID_ARGUMENT, "TENSOR_MISMATCH", text, tensor=message.name)
    return Tensor(message.name, dtype, tuple(message.shape), 0, message.length, message.checksum)


def chunk_message(chunk: Chunk) -> chunk_pb2.Chunk:
    """With everything that the store knows; the embedding where it was read."""
    message = chunk_pb2.Chunk(
        chunk_id=chunk.chunk_id,
        bank=chunk.bank,
        idempotency_key=chunk.key,
        start=chunk.start,
        original_length=chunk.original_length,
        stored_length=chunk.stored_length,
        token_ids=np.frombuffer(chunk.token_ids, "<i4").tolist(),
        text=chunk.text,
        metadata=chunk.metadata,
        embedding=chunk.embedding,
        create_time=timestamp(chunk.created),
        retrieval_count=chunk.retrieval_count,
        last_retrieve_time=None if chunk.last_retrieved is None else timestamp(chunk.last_retrieved),
    )
    if chunk.payload is not None:
        message.payload.CopyFrom(_payload_message(chunk.payload))
    return message


def _payload_message(payload: Payload) -> chunk_pb2.PayloadDescriptor:
    producer = payload.producer
    return chunk_pb2.PayloadDescriptor(
        kind=chunk_pb2.PAYLOAD_KIND_LAYER_KV,
        tensors=[
            chunk_pb2.TensorDescriptor(
                name=tensor.name,
                dtype=_DTYPE_NUMBERS[tensor.dtype],
                shape=tensor.shape,
                offset=tensor.offset,
                length=tensor.length,
                checksum=tensor.checksum,
            )
            for tensor in payload.tensors
        ],
        producer=chunk_pb2.Producer(
            method=producer.method,
            version=producer.version,
            context=producer.context,
            adapter_digest=producer.adapter_digest,
            measured_loss=producer.measured_loss,
        ),
        seed=payload.seed,
        checksum=payload.checksum,
    )


def eviction_message(eviction: Eviction) -> service_pb2.Eviction:
    """A chunk that went, or would go."""
    return service_pb2.Eviction(
        chunk_id=eviction.chunk_id,
        reason=_REASON_NUMBERS[eviction.reason],
        retrieval_count=eviction.retrieval_count,
        start=eviction.start,
        stored_length=eviction.stored_length,
        create_time=timestamp(eviction.created),
        evict_time=None if eviction.evicted is None else timestamp(eviction.evicted),
        metadata=eviction.metadata,
    )
