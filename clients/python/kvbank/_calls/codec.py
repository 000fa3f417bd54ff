"""Requests from models and models from answers. Pure: both transports call these, and neither builds a message."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from types import EllipsisType
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.duration_pb2 import Duration
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.timestamp_pb2 import Timestamp

from kvbank import _models as m
from kvbank._arguments import choice, each, expected, flag, instance, int32, invalid, mapping, text
from kvbank._calls import metadata as _metadata
from kvbank._calls import tensors as _tensors
from kvbank._calls.answers import understood
from kvbank._calls.messages import build
from kvbank._exceptions import AlreadyExists
from kvbank.v1 import bank_pb2, chunk_pb2, service_pb2
from kvbank.wire import scalars
from kvbank.wire.scalars import Scalar

_DTYPES: dict[str, bank_pb2.DataType] = {
    "bf16": bank_pb2.DATA_TYPE_BF16,
    "fp16": bank_pb2.DATA_TYPE_FP16,
    "fp32": bank_pb2.DATA_TYPE_FP32,
    "int32": bank_pb2.DATA_TYPE_INT32,
}
_METRICS: dict[str, bank_pb2.Metric] = {"inner_product": bank_pb2.METRIC_INNER_PRODUCT}
_KINDS: dict[str, chunk_pb2.PayloadKind] = {
    "layer_kv": chunk_pb2.PAYLOAD_KIND_LAYER_KV,
    "soft_tokens": chunk_pb2.PAYLOAD_KIND_SOFT_TOKENS,
}
_POLICIES: dict[str, bank_pb2.PolicyKind] = {
    "frequency": bank_pb2.POLICY_KIND_FREQUENCY,
    "recency_half": bank_pb2.POLICY_KIND_RECENCY_HALF,
    "reject": bank_pb2.POLICY_KIND_REJECT,
    "lru": bank_pb2.POLICY_KIND_LRU,
}
# Which figures belong to a policy.
_FIGURES = {"frequency": ("lower", "upper", "target"), "lru": ("target",)}
_INDEXES: dict[str, bank_pb2.IndexKind] = {
    "auto": bank_pb2.INDEX_KIND_UNSPECIFIED,
    "exact": bank_pb2.INDEX_KIND_EXACT,
    "ivf": bank_pb2.INDEX_KIND_IVF,
}
# Banks that one GetStats names.
_MOST_NAMES = 100
_INDEX_NAMES: dict[int, str] = {number: name for name, number in _INDEXES.items()}


# Banks


def create_bank(
    name: str,
    kv: m.KVSpec | None,
    embedding: m.EmbeddingSpec,
    capacity: m.Capacity | None,
    policy: m.Policy | None,
    metadata: Mapping[str, Scalar],
    quota: m.Quota | None,
    expiry: m.Expiry | None,
    index: str,
) -> service_pb2.CreateBankRequest:
    bank = build(
        bank_pb2.Bank,
        name=name,
        embedding=_embedding_spec(embedding),
        **_metadata.fields(metadata),
        index=choice("index", index, _INDEXES),
    )
    if kv is not None:
        bank.kv.CopyFrom(_kv_spec(kv))
    if capacity is not None:
        bank.capacity.CopyFrom(_capacity(capacity))
    if policy is not None:
        bank.policy.CopyFrom(_policy(policy))
    if quota is not None:
        bank.quota.CopyFrom(_quota(quota))
    if expiry is not None:
        bank.expiry.CopyFrom(_expiry(expiry))
    return service_pb2.CreateBankRequest(bank=bank)


def update_bank(
    name: str,
    capacity: m.Capacity | EllipsisType | None,
    policy: m.Policy | None,
    metadata: Mapping[str, Scalar] | None,
    quota: m.Quota | EllipsisType | None,
    expiry: m.Expiry | EllipsisType | None,
    index: str | None,
) -> service_pb2.UpdateBankRequest:
    request = service_pb2.UpdateBankRequest(bank=build(bank_pb2.Bank, name=name))
    if not isinstance(capacity, EllipsisType):
        request.update_mask.paths.append("capacity")
        if capacity is not None:
            request.bank.capacity.CopyFrom(_capacity(capacity))
    if policy is not None:
        request.update_mask.paths.append("policy")
        request.bank.policy.CopyFrom(_policy(policy))
    if metadata is not None:
        request.update_mask.paths.append("metadata")
        request.bank.MergeFrom(build(bank_pb2.Bank, **_metadata.fields(metadata)))
    if not isinstance(quota, EllipsisType):
        request.update_mask.paths.append("quota")
        if quota is not None:
            request.bank.quota.CopyFrom(_quota(quota))
    if not isinstance(expiry, EllipsisType):
        request.update_mask.paths.append("expiry")
        if expiry is not None:
            request.bank.expiry.CopyFrom(_expiry(expiry))
    if index is not None:
        request.update_mask.paths.append("index")
        request.bank.index = choice("index", index, _INDEXES)
    return request


@understood()
def bank(message: bank_pb2.Bank) -> m.Bank:
    return m.Bank(
        name=message.name,
        uid=message.uid,
        kv=_read_kv_spec(message.kv) if message.kv.layers else None,
        embedding=m.EmbeddingSpec(
            message.embedding.embedder_digest,
            message.embedding.dimension,
            _name(bank_pb2.Metric, message.embedding.metric),
        ),
        capacity=_read_capacity(message.capacity),
        policy=_read_policy(message.policy),
        metadata=scalars.read(message),
        create_time=_time(message.create_time),
        usage=m.BankUsage(**{name: getattr(message.usage, name) for name in m.BankUsage.__slots__}),
        quota=_read_quota(message.quota),
        expiry=_read_expiry(message.expiry),
        index=_index_name(message.index),
    )


@understood()
def created_bank(answer: service_pb2.CreateBankResponse, exist_ok: bool) -> m.Bank:
    if not (answer.created or exist_ok):
        name = answer.bank.name
        raise AlreadyExists(f"bank {name!r} exists", reason="BANK_EXISTS", metadata={"bank": name})
    return bank(answer.bank)


def _kv_spec(kv: m.KVSpec) -> bank_pb2.KvSpec:
    instance("kv", kv, m.KVSpec)
    return build(
        bank_pb2.KvSpec,
        reader_digest=kv.reader_digest,
        reader_parts=kv.reader_parts,
        layers=kv.layers,
        kv_heads=kv.kv_heads,
        head_dim=kv.head_dim,
        dtype=choice("dtype", kv.dtype, _DTYPES),
        hidden_size=kv.hidden_size,
    )


def _read_kv_spec(message: bank_pb2.KvSpec) -> m.KVSpec:
    return m.KVSpec(
        reader_digest=message.reader_digest,
        layers=tuple(message.layers),
        kv_heads=message.kv_heads,
        head_dim=message.head_dim,
        dtype=_name(bank_pb2.DataType, message.dtype),
        reader_parts=dict(message.reader_parts),
        hidden_size=message.hidden_size,
    )


def _embedding_spec(embedding: m.EmbeddingSpec) -> bank_pb2.EmbeddingSpec:
    instance("embedding", embedding, m.EmbeddingSpec)
    return build(
        bank_pb2.EmbeddingSpec,
        embedder_digest=embedding.embedder_digest,
        dimension=embedding.dimension,
        metric=choice("metric", embedding.metric, _METRICS),
    )


def _capacity(capacity: m.Capacity) -> bank_pb2.Capacity:
    instance("capacity", capacity, m.Capacity)
    return build(bank_pb2.Capacity, chunks=capacity.chunks, tokens=capacity.tokens, bytes=capacity.bytes)


def _read_capacity(message: bank_pb2.Capacity) -> m.Capacity | None:
    limit = message.WhichOneof("limit")
    return None if limit is None else m.Capacity(**{limit: getattr(message, limit)})


def _policy(policy: m.Policy) -> bank_pb2.EvictionPolicy:
    instance("policy", policy, m.Policy)
    kind = choice("policy", policy.kind, _POLICIES)
    return build(
        bank_pb2.EvictionPolicy, kind=kind, **{name: getattr(policy, name) for name in _FIGURES.get(policy.kind, ())}
    )


def _read_policy(message: bank_pb2.EvictionPolicy) -> m.Policy:
    bounds = {name: getattr(message, name) for name in ("lower", "upper", "target") if message.HasField(name)}
    return m.Policy(_name(bank_pb2.PolicyKind, message.kind), **bounds)


def _quota(quota: m.Quota) -> bank_pb2.Quota:
    instance("quota", quota, m.Quota)
    bounds = {name: getattr(quota, name) for name in m.Quota.__slots__}
    return build(bank_pb2.Quota, **{name: bound for name, bound in bounds.items() if bound is not None})


def _read_quota(message: bank_pb2.Quota) -> m.Quota | None:
    bounds = {name: getattr(message, name) or None for name in m.Quota.__slots__}
    return m.Quota(**bounds) if any(bounds.values()) else None


def _expiry(expiry: m.Expiry) -> bank_pb2.Expiry:
    instance("expiry", expiry, m.Expiry)
    message = build(bank_pb2.Expiry, renew=expiry.renew)
    if expiry.ttl is not None:
        try:
            message.ttl.FromTimedelta(expiry.ttl)
        except (ValueError, OverflowError):
            raise invalid("expiry", "expected a ttl of at most 1000 years") from None
    return message


def _read_expiry(message: bank_pb2.Expiry) -> m.Expiry | None:
    return m.Expiry(message.ttl.ToTimedelta(), message.renew) if message.ttl != Duration() else None


def _index_name(number: int) -> str:
    return _INDEX_NAMES.get(number, str(number))


# Chunks


def header(
    bank: str, chunk: m.NewChunk, reader_digest: str, embedder_digest: str
) -> tuple[service_pb2.ChunkHeader, list[memoryview]]:
    """The header frame of a chunk and the bytes that follow it."""
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
        expiry=None if chunk.expiry is None else _expiry(chunk.expiry),
    )
    if chunk.kind is not None:
        message.payload.kind = _KINDS[chunk.kind]
        message.payload.tensors.extend(descriptors)
    if chunk.producer is not None:
        message.payload.producer.CopyFrom(_producer(chunk.producer))
    digests = {"reader_digest": reader_digest, "embedder_digest": embedder_digest}
    head = build(service_pb2.ChunkHeader, bank=bank, chunk=message, **digests)
    return head, [view for _, view in described]


@understood()
def write_result(message: service_pb2.WriteChunksResponse) -> m.WriteResult:
    return m.WriteResult(message.chunk_id, message.replayed, message.gone, tuple(message.evicted_chunk_ids))


@understood()
def chunk(message: chunk_pb2.Chunk, tensors: dict[str, Any] | None = None) -> m.Chunk:
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
        kind=_name(chunk_pb2.PayloadKind, payload.kind) if message.HasField("payload") else None,
        layout=tuple(_tensor_info(tensor) for tensor in payload.tensors),
        checksum=payload.checksum,
        tensors=tensors,
        embedding=np.frombuffer(message.embedding, "<f4") if message.embedding else None,
        create_time=_time(message.create_time),
        retrieval_count=message.retrieval_count,
        last_retrieve_time=_time(message.last_retrieve_time) if message.HasField("last_retrieve_time") else None,
        pinned=message.pinned,
        expiry=_read_expiry(message.expiry),
        expire_time=_time(message.expire_time) if message.HasField("expire_time") else None,
    )


def _stored_length(tensors: Sequence[chunk_pb2.TensorDescriptor]) -> int:
    """Soft tokens, or the most tokens that a layer keeps: m of `k.<layer>` [Hkv, m, D]."""
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
    return m.TensorInfo(message.name, _name(bank_pb2.DataType, message.dtype), tuple(message.shape), message.length)


# Search


def list_chunks(bank: str, with_embedding: bool, filter: m.Filter | None) -> service_pb2.ListChunksRequest:
    made = None if filter is None else _filter(filter)
    return build(service_pb2.ListChunksRequest, bank=bank, with_embedding=with_embedding, filter=made)


def _filter(filter: m.Filter) -> service_pb2.Filter:
    instance("filter", filter, m.Filter)
    start = {"start_from": filter.start_from, "start_before": filter.start_before}
    message = build(service_pb2.Filter, **start, pinned=filter.pinned)
    for name in ("created_from", "created_before"):
        if (time := getattr(filter, name)) is not None:
            try:
                getattr(message, name).FromDatetime(time)
            except OverflowError:  # its time zone takes it out of the calendar
                raise expected(name, "a time from year 1 to 9999 in UTC", time) from None
    for conditions, negate in ((filter.metadata, False), (filter.exclude, True)):
        for key, wanted in conditions.items():
            message.metadata.append(_metadata.condition(key, wanted, negate))
    return message


def update_chunk(bank: str, chunk_id: int, metadata: Mapping[str, Scalar]) -> service_pb2.UpdateChunkRequest:
    return build(service_pb2.UpdateChunkRequest, bank=bank, chunk_id=chunk_id, **_metadata.fields(metadata))


def fetch(
    bank: str, chunk_ids: Iterable[int], layers: Iterable[int] | None, reader_digest: str
) -> service_pb2.FetchChunksRequest:
    return build(
        service_pb2.FetchChunksRequest,
        bank=bank,
        chunk_ids=chunk_ids,
        layers=_layers(layers),
        reader_digest=reader_digest,
    )


def _layers(layers: Iterable[int] | None) -> Sequence[int]:
    """On the wire none stands for all."""
    if layers is None:
        return ()
    wanted = each("layers", layers, int32)
    if not wanted:
        raise invalid("layers", "expected some layers, got none; leave them out for all")
    return wanted


def retrieve(
    banks: str | Iterable[str],
    queries: npt.ArrayLike,
    *,
    top_k: int,
    min_score: float | None,
    layers: Iterable[int] | None,
    held: m.Held | None,
    payload: bool,
    count: bool,
    reader_digest: str,
    embedder_digest: str,
    filter: m.Filter | None,
) -> service_pb2.RetrieveRequest:
    """The request, with an id that a retry keeps, so that it counts once."""
    if int32("top_k", top_k) == 0:
        raise invalid("top_k", "must be at least 1")
    vectors = _tensors.as_embedding("queries", queries, ndim=2)
    message = build(
        service_pb2.RetrieveRequest,
        banks=[banks] if isinstance(banks, str) else banks,
        reader_digest=reader_digest,
        embedder_digest=embedder_digest,
        queries=vectors.tobytes(),
        dimension=vectors.shape[1],
        top_k=top_k,
        min_score=min_score,
        layers=_layers(layers),
        omit_payload=not flag("payload", payload),
        skip_count=not flag("count", count),
        request_id=uuid.uuid4().bytes,
        filter=None if filter is None else _filter(filter),
    )
    if held is not None:
        message.store_id = text("store_id", instance("held", held, m.Held).store_id)
        checksums = mapping("checksums", held.checksums).items()
        message.held.extend(build(service_pb2.HeldChunk, chunk_id=id, checksum=checksum) for id, checksum in checksums)
    return message


# The rest


@understood()
def server_info(message: service_pb2.GetServerInfoResponse) -> m.ServerInfo:
    return m.ServerInfo(**{name: getattr(message, name) for name in m.ServerInfo.__slots__})


@understood()
def eviction(message: service_pb2.Eviction) -> m.Eviction:
    return m.Eviction(
        chunk_id=message.chunk_id,
        reason=_name(service_pb2.EvictionReason, message.reason),
        retrieval_count=message.retrieval_count,
        start=message.start,
        stored_length=message.stored_length,
        create_time=_time(message.create_time),
        evict_time=_time(message.evict_time) if message.HasField("evict_time") else None,
        metadata=scalars.read(message),
    )


@understood()
def eviction_plan(message: service_pb2.ExplainEvictionResponse) -> m.EvictionPlan:
    return m.EvictionPlan(map(eviction, message.victims), message.explanation)


def stats_requests(banks: Iterable[str]) -> list[service_pb2.GetStatsRequest]:
    """One for each hundred banks; each of them is asked for once."""
    names = list(dict.fromkeys(build(service_pb2.GetStatsRequest, banks=banks).banks))
    parts = [names[begin : begin + _MOST_NAMES] for begin in range(0, len(names), _MOST_NAMES)]
    return [service_pb2.GetStatsRequest(banks=part) for part in parts or [[]]]


@understood()
def stats(pages: Sequence[service_pb2.GetStatsResponse]) -> m.Stats:
    """Server and figures of the first page, banks of all."""
    message = pages[0]
    return m.Stats(
        version=message.version,
        store_id=message.store_id,
        start_time=_time(message.start_time),
        resident_bytes=message.resident_bytes,
        free_bytes=message.free_bytes,
        database_bytes=message.database_bytes,
        database_free_bytes=message.database_free_bytes,
        index_bytes=message.index_bytes,
        uptime=message.uptime.ToTimedelta(),
        banks=tuple(m.BankStats(bank(each.bank), _index_stats(each.index)) for page in pages for each in page.banks),
        samples=tuple(m.MetricSample(each.name, dict(each.labels), each.value) for each in message.samples),
    )


@understood()
def compacted(message: service_pb2.CompactResponse) -> m.Compacted:
    """What was given back."""
    return m.Compacted(message.database_bytes_before, message.database_bytes)


def _index_stats(message: service_pb2.IndexStats) -> m.IndexStats:
    return m.IndexStats(
        kind=_index_name(message.kind),
        loaded=message.loaded,
        vectors=message.vectors,
        tombstones=message.tombstones,
        memory_bytes=message.memory_bytes,
        recall=message.recall if message.HasField("recall") else None,
    )


def _time(message: Timestamp) -> datetime:
    return message.ToDatetime(tzinfo=UTC)


@lru_cache(256)
def _name(enum: EnumTypeWrapper, number: int) -> str:
    """ "least_retrieved" for EVICTION_REASON_LEAST_RETRIEVED; a number that a newer server sent, as digits."""
    values = enum.DESCRIPTOR.values_by_number
    if number not in values:
        return str(number)
    prefix = values[0].name.removesuffix("UNSPECIFIED")
    return values[number].name.removeprefix(prefix).lower()
