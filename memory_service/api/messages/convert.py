"""Messages of kvbank.v1 become values of the domain here, and values messages. This file owns the refusal of what a
message can say and the domain cannot."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any, get_args

import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from kvbank.v1 import access_pb2, bank_pb2, chunk_pb2, service_pb2
from kvbank.wire import enums
from kvbank.wire import scalars as _scalars
from memory_service.api.messages import metadata
from memory_service.domain.errors import ServiceError, invalid
from memory_service.domain.model import (
    Bank,
    Capacity,
    Chunk,
    DType,
    EmbeddingSpec,
    Eviction,
    EvictionReason,
    Expiry,
    Filter,
    IndexKind,
    Kept,
    KvSpec,
    Payload,
    PayloadKind,
    Policy,
    PolicyKind,
    Producer,
    Quota,
    Tensor,
)
from memory_service.domain.sessions import MOST_STRETCHES
from memory_service.domain.tenants import Tenant, TenantUsage
from memory_service.domain.validate import MOST_LAYERS

# The enums of the contract by the words of the domain, with the word that stands for ..._UNSPECIFIED, if one does.
_ENUMS: Mapping[Any, tuple[Any, str]] = {
    DType: (bank_pb2.DataType, ""),
    PolicyKind: (bank_pb2.PolicyKind, ""),
    IndexKind: (bank_pb2.IndexKind, "auto"),
    PayloadKind: (chunk_pb2.PayloadKind, ""),
    EvictionReason: (service_pb2.EvictionReason, ""),
}
NUMBERS: Mapping[Any, Mapping[str, Any]] = {
    words: enums.numbers(enum, get_args(words), unspecified) for words, (enum, unspecified) in _ENUMS.items()
}
_WORDS: Mapping[Any, Mapping[int, Any]] = {
    words: {number: word for word, number in found.items()} for words, found in NUMBERS.items()
}

# The tensors of a chunk: three for each layer of the largest bank.
MOST_TENSORS = 3 * MOST_LAYERS
MOST_CONDITIONS = 32
MOST_VALUES = 1000
MOST_ALTERNATIVES = 100
# Roughly the most that a Timestamp may say: ten thousand years.
_MOST_SECONDS = 10_000 * 366 * 24 * 3600


def timestamp(microseconds: int) -> Timestamp:
    """Return microseconds since 1970 as a Timestamp."""
    seconds, rest = divmod(microseconds, 1_000_000)
    return Timestamp(seconds=seconds, nanos=rest * 1000)


def duration(microseconds: int) -> Duration:
    """Return microseconds as a Duration."""
    seconds, rest = divmod(microseconds, 1_000_000)
    return Duration(seconds=seconds, nanos=rest * 1000)


# Banks


def bank(message: bank_pb2.Bank) -> Bank:
    """Read what a request says of a bank. Errors: INVALID_FIELD."""
    kv = message.kv
    if message.embedding.metric not in (bank_pb2.METRIC_UNSPECIFIED, bank_pb2.METRIC_INNER_PRODUCT):
        raise invalid("bank.embedding.metric", "must be INNER_PRODUCT")
    if message.index not in _WORDS[IndexKind]:
        raise invalid("bank.index", "is not known")
    quota = message.quota
    return Bank(
        name=message.name,
        kv=KvSpec(
            reader_digest=kv.reader_digest,
            layers=tuple(kv.layers),
            kv_heads=kv.kv_heads,
            head_dim=kv.head_dim,
            dtype=_WORDS[DType].get(kv.dtype),
            reader_parts=dict(kv.reader_parts),
            hidden_size=kv.hidden_size,
        ),
        embedding=EmbeddingSpec(message.embedding.embedder_digest, message.embedding.dimension),
        capacity=capacity(message.capacity),
        policy=policy(message.policy),
        metadata=metadata.read("bank.metadata", message),
        quota=Quota(quota.chunks, quota.tokens, quota.bytes),
        expiry=expiry(message.expiry),
        index=_WORDS[IndexKind][message.index],
    )


def tenant_message(tenant: Tenant, usage: TenantUsage) -> access_pb2.Tenant:
    """Make the message of a tenant and what it holds."""
    return access_pb2.Tenant(
        name=tenant.name,
        create_time=timestamp(tenant.created),
        quota=access_pb2.TenantAmounts(**asdict(tenant.quota)),
        usage=access_pb2.TenantAmounts(**asdict(usage)),
    )


def capacity(message: bank_pb2.Capacity) -> Capacity | None:
    """Read the capacity of a bank; None means unbounded."""
    unit = message.WhichOneof("limit")
    return None if unit is None else Capacity(unit, getattr(message, unit))


def policy(message: bank_pb2.EvictionPolicy) -> Policy:
    """Read the policy of a bank; figures that are absent are those of MemLong. Errors: INVALID_FIELD."""
    kind = _WORDS[PolicyKind].get(message.kind, "frequency")
    if message.kind and message.kind not in _WORDS[PolicyKind]:
        raise invalid("bank.policy.kind", "is not known")
    given = {name: getattr(message, name) for name in ("lower", "upper", "target") if message.HasField(name)}
    return Policy(kind, **given)


def expiry(message: bank_pb2.Expiry) -> Expiry:
    """Read the expiry of a bank or chunk. A part of a microsecond counts as a whole one, because 0 would mean never."""
    return Expiry(message.ttl.seconds * 1_000_000 - -message.ttl.nanos // 1000, message.renew)


def _expiry_message(expiry: Expiry | None) -> bank_pb2.Expiry | None:
    return bank_pb2.Expiry(ttl=duration(expiry.ttl), renew=expiry.renew) if expiry and expiry.ttl else None


def bank_message(bank: Bank) -> bank_pb2.Bank:
    """Make the message of a bank, with everything that the store knows."""
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
            dtype=NUMBERS[DType][kv.dtype] if kv.dtype else bank_pb2.DATA_TYPE_UNSPECIFIED,
            hidden_size=kv.hidden_size,
        ),
        embedding=bank_pb2.EmbeddingSpec(
            embedder_digest=bank.embedding.embedder_digest,
            dimension=bank.embedding.dimension,
            metric=bank_pb2.METRIC_INNER_PRODUCT,
        ),
        policy=bank_pb2.EvictionPolicy(
            kind=NUMBERS[PolicyKind][policy.kind], lower=policy.lower, upper=policy.upper, target=policy.target
        ),
        **_scalars.fields(bank.metadata),
        create_time=timestamp(bank.created),
        usage=bank_pb2.BankUsage(**asdict(bank.usage)),
        quota=bank_pb2.Quota(**asdict(bank.quota)) if bank.quota != Quota() else None,
        expiry=_expiry_message(bank.expiry),
        index=NUMBERS[IndexKind][bank.index],
    )
    if bank.capacity is not None:
        setattr(message.capacity, bank.capacity.unit, bank.capacity.limit)
    return message


# Chunks


def chunk(message: chunk_pb2.Chunk, *, if_absent: bool = False) -> Chunk:
    """Read what a write says of a chunk. Errors: INVALID_FIELD, TENSOR_MISMATCH."""
    token_ids = message.token_ids
    return Chunk(
        key=message.idempotency_key,
        start=message.start,
        original_length=message.original_length,
        stored_length=message.stored_length,
        token_ids=np.asarray(token_ids, "<i4").tobytes() if token_ids else b"",
        text=message.text,
        metadata=metadata.read("chunk.metadata", message),
        embedding=message.embedding,
        payload=_payload(message.payload) if message.HasField("payload") else None,
        pinned=message.pinned,
        expiry=expiry(message.expiry) if message.HasField("expiry") else None,
        if_absent=if_absent,
    )


def _payload(message: chunk_pb2.PayloadDescriptor) -> Payload:
    if message.kind not in _WORDS[PayloadKind]:
        raise invalid("chunk.payload.kind", "must be LAYER_KV or SOFT_TOKENS")
    if not message.tensors:
        raise invalid("chunk.payload.tensors", "must not be empty")
    if len(message.tensors) > MOST_TENSORS:
        raise invalid("chunk.payload.tensors", f"are {len(message.tensors)}; at most {MOST_TENSORS} are taken")
    producer = message.producer
    loss = producer.measured_loss if producer.HasField("measured_loss") else None
    return Payload(
        tensors=tuple(_tensor(tensor) for tensor in message.tensors),
        producer=Producer(producer.method, producer.version, producer.context, producer.adapter_digest, loss),
        kind=_WORDS[PayloadKind][message.kind],
    )


def _tensor(message: chunk_pb2.TensorDescriptor) -> Tensor:
    dtype = _WORDS[DType].get(message.dtype)
    if dtype is None:
        text = f"tensor {message.name}: unknown dtype"
        raise ServiceError("TENSOR_MISMATCH", text, tensor=message.name)
    return Tensor(message.name, dtype, tuple(message.shape), 0, message.length, message.checksum)


def chunk_message(chunk: Chunk) -> chunk_pb2.Chunk:
    """Make the message of a chunk, with everything that the store knows, and the embedding where it was read."""
    message = _content(chunk)
    message.MergeFrom(_state(chunk))
    return message


def chunk_bytes(chunk: Chunk) -> bytes:
    """Make the message of a chunk, as bytes. Those of what never changes are made once for a chunk that is kept in
    memory."""
    kept = chunk.kept or Kept()
    if kept.message is None:
        kept.message = _content(chunk).SerializeToString()
    return kept.message + _state(chunk).SerializeToString()


def _content(chunk: Chunk) -> chunk_pb2.Chunk:
    """Make the message of what is the same of a chunk each time that it is read."""
    metadata_ = _scalars.fields(chunk.metadata)
    message = chunk_pb2.Chunk(
        chunk_id=chunk.chunk_id,
        idempotency_key=chunk.key,
        start=chunk.start,
        original_length=chunk.original_length,
        stored_length=chunk.stored_length,
        token_ids=np.frombuffer(chunk.token_ids, "<i4").tolist(),
        text=chunk.text,
        metadata=metadata_["metadata"],
        typed_metadata=metadata_["typed_metadata"],
        create_time=timestamp(chunk.created),
    )
    if chunk.payload is not None:
        message.payload.CopyFrom(_payload_message(chunk.payload))
    return message


def _state(chunk: Chunk) -> chunk_pb2.Chunk:
    """Make the message of what may be another each time that a chunk is read: what is counted, the name of the bank,
    and what was asked for."""
    return chunk_pb2.Chunk(
        bank=chunk.bank,
        embedding=chunk.embedding,
        retrieval_count=chunk.retrieval_count,
        last_retrieve_time=None if chunk.last_retrieved is None else timestamp(chunk.last_retrieved),
        pinned=chunk.pinned,
        expiry=_expiry_message(chunk.expiry),
        expire_time=None if chunk.expires is None else timestamp(chunk.expires),
    )


# Made once, because a chunk may have hundreds of tensors. Whoever gets it changes nothing of it.
@lru_cache(512)
def _payload_message(payload: Payload) -> chunk_pb2.PayloadDescriptor:
    producer = payload.producer
    return chunk_pb2.PayloadDescriptor(
        kind=NUMBERS[PayloadKind][payload.kind],
        tensors=[
            chunk_pb2.TensorDescriptor(
                name=tensor.name,
                dtype=NUMBERS[DType][tensor.dtype],
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
        file_length=payload.file_length,
        header_length=payload.header_length,
        header_checksum=payload.header_checksum,
    )


# Filters


def filter_(message: service_pb2.Filter) -> Filter:
    """Read the filter of a request. Errors: INVALID_FIELD."""
    if len(message.any_of) > MOST_ALTERNATIVES:
        raise invalid("filter.any_of", f"must be at most {MOST_ALTERNATIVES} filters")
    if any(each.any_of for each in message.any_of):
        raise invalid("filter.any_of", "must be filters without alternatives of their own")
    # Before any of them is looked at, which makes it an object.
    if any(len(part.metadata) > MOST_CONDITIONS for part in (message, *message.any_of)):
        raise invalid("filter.metadata", f"must have at most {MOST_CONDITIONS} conditions")
    conditions = [each for part in (message, *message.any_of) for each in part.metadata]
    if sum(len(part.stretches) for part in (message, *message.any_of)) > MOST_STRETCHES:
        raise invalid("filter.stretches", f"must be at most {MOST_STRETCHES}")
    if sum(len(each.values) + len(each.typed.values) for each in conditions) > MOST_VALUES:
        raise invalid("filter.metadata.values", f"must be at most {MOST_VALUES}, all conditions together")
    return replace(_filter(message), any_of=tuple(map(_filter, message.any_of)))


def _filter(message: service_pb2.Filter) -> Filter:
    """Read a filter without its alternatives. Errors: INVALID_FIELD."""
    made = Filter(
        metadata=tuple(map(metadata.condition, message.metadata)),
        created_from=_microseconds(message, "created_from"),
        created_before=_microseconds(message, "created_before"),
        start_from=message.start_from if message.HasField("start_from") else None,
        start_before=message.start_before if message.HasField("start_before") else None,
        pinned=message.pinned if message.HasField("pinned") else None,
        stretches=tuple(
            (each.branch, each.start_before if each.HasField("start_before") else None) for each in message.stretches
        ),
    )
    for begin, end, name in (
        (made.created_from, made.created_before, "created_before"),
        (made.start_from, made.start_before, "start_before"),
    ):
        if begin is not None and end is not None and begin >= end:
            raise invalid(f"filter.{name}", "must be after the beginning of the range")
    return made


def _microseconds(message: service_pb2.Filter, name: str) -> int | None:
    """Return a bound of times in whole microseconds: the first one that is not before it."""
    if not message.HasField(name):
        return None
    time: Timestamp = getattr(message, name)
    if not (-_MOST_SECONDS <= time.seconds <= _MOST_SECONDS and 0 <= time.nanos < 10**9):
        raise invalid(f"filter.{name}", "is not a time")
    return time.seconds * 1_000_000 - (-time.nanos // 1000)


def eviction_message(eviction: Eviction) -> service_pb2.Eviction:
    """Make the message of an eviction that was, or would be."""
    return service_pb2.Eviction(
        chunk_id=eviction.chunk_id,
        reason=NUMBERS[EvictionReason][eviction.reason],
        retrieval_count=eviction.retrieval_count,
        start=eviction.start,
        stored_length=eviction.stored_length,
        create_time=timestamp(eviction.created),
        evict_time=None if eviction.evicted is None else timestamp(eviction.evicted),
        **_scalars.fields(eviction.metadata),
    )
