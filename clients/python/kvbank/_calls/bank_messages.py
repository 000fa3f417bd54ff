"""Messages of banks are made here: requests out of what a caller states, and `Bank` out of answers."""

from collections.abc import Mapping
from types import EllipsisType
from typing import Any

from google.protobuf.duration_pb2 import Duration

from kvbank import _models as m
from kvbank._arguments import choice, instance, invalid
from kvbank._calls import metadata as _metadata
from kvbank._calls.answers import read_time, understood
from kvbank._calls.enums import numbers, word
from kvbank._calls.messages import build
from kvbank._exceptions import AlreadyExists
from kvbank._options import BankSettings, check_names
from kvbank.v1 import bank_pb2
from kvbank.v1 import service_pb2 as pb
from kvbank.wire import scalars
from kvbank.wire.scalars import Scalar

# Which figures belong to a policy.
_FIGURES = {"frequency": ("lower", "upper", "target"), "lru": ("target",)}


def create(name: str, kv: m.KVSpec | None, embedding: m.EmbeddingSpec, settings: BankSettings) -> pb.CreateBankRequest:
    """Return the request for a new bank. Errors: InvalidArgument; TypeError for a setting that there is not."""
    check_names("create_bank", settings, BankSettings)
    bank = build(
        bank_pb2.Bank,
        name=name,
        embedding=_embedding_spec(embedding),
        **_metadata.fields(settings.get("metadata", {})),
        index=choice("index", settings.get("index", "auto"), numbers(bank_pb2.IndexKind)),
    )
    if kv is not None:
        bank.kv.CopyFrom(_kv_spec(kv))
    for part, made in _PARTS.items():
        if (given := settings.get(part)) is not None:
            getattr(bank, part).CopyFrom(made(given))
    return pb.CreateBankRequest(bank=bank)


def update(
    name: str,
    *,
    capacity: m.Capacity | EllipsisType | None = ...,
    policy: m.Policy | None = None,
    metadata: Mapping[str, Scalar] | None = None,
    quota: m.Quota | EllipsisType | None = ...,
    expiry: m.Expiry | EllipsisType | None = ...,
    index: str | None = None,
) -> pb.UpdateBankRequest:
    """Return the request that changes what is stated of a bank; what is left out stays as it is. Errors:
    InvalidArgument."""
    request = pb.UpdateBankRequest(bank=build(bank_pb2.Bank, name=name))
    paths = request.update_mask.paths
    for part, given in {"capacity": capacity, "quota": quota, "expiry": expiry}.items():
        if not isinstance(given, EllipsisType):
            paths.append(part)
            if given is not None:
                getattr(request.bank, part).CopyFrom(_PARTS[part](given))
    if policy is not None:
        paths.append("policy")
        request.bank.policy.CopyFrom(_policy(policy))
    if metadata is not None:
        paths.append("metadata")
        request.bank.MergeFrom(build(bank_pb2.Bank, **_metadata.fields(metadata)))
    if index is not None:
        paths.append("index")
        request.bank.index = choice("index", index, numbers(bank_pb2.IndexKind))
    return request


@understood()
def read(message: bank_pb2.Bank) -> m.Bank:
    """Return the bank of an answer. Errors: Internal (ODD_ANSWER)."""
    return m.Bank(
        name=message.name,
        uid=message.uid,
        kv=_read_kv_spec(message.kv) if message.kv.layers else None,
        embedding=m.EmbeddingSpec(
            message.embedding.embedder_digest,
            message.embedding.dimension,
            word(bank_pb2.Metric, message.embedding.metric),
        ),
        capacity=_read_capacity(message.capacity),
        policy=_read_policy(message.policy),
        metadata=scalars.read(message),
        create_time=read_time(message.create_time),
        usage=m.BankUsage(**{name: getattr(message.usage, name) for name in m.BankUsage.__slots__}),
        quota=_read_quota(message.quota),
        expiry=read_expiry(message.expiry),
        index=word(bank_pb2.IndexKind, message.index),
    )


def replace(bank: m.Bank, by: m.Bank, metadata: Mapping[str, Scalar] | None) -> pb.ReplaceBankRequest:
    """Return the request that deletes `bank` and gives its name to `by`. metadata: None is those of `bank`. Errors:
    InvalidArgument."""
    instance("bank", bank, m.Bank)
    instance("by", by, m.Bank)
    return build(
        pb.ReplaceBankRequest,
        name=bank.name,
        uid=bank.uid,
        chunks=bank.usage.chunks,
        chunks_written=bank.usage.chunks_written,
        by=by.name,
        by_uid=by.uid,
        **_metadata.fields(bank.metadata if metadata is None else metadata),
    )


def read_created(answer: pb.CreateBankResponse, exist_ok: bool) -> m.Bank:
    """Return the bank that CreateBank made, or with `exist_ok` the one that it found.

    Errors: AlreadyExists for one that it found without `exist_ok`, Internal (ODD_ANSWER).
    """
    if not (answer.created or exist_ok):
        name = answer.bank.name
        raise AlreadyExists(f"bank {name!r} exists", reason="BANK_EXISTS", metadata={"bank": name})
    return read(answer.bank)


def _kv_spec(kv: m.KVSpec) -> bank_pb2.KvSpec:
    instance("kv", kv, m.KVSpec)
    return build(
        bank_pb2.KvSpec,
        reader_digest=kv.reader_digest,
        reader_parts=kv.reader_parts,
        layers=kv.layers,
        kv_heads=kv.kv_heads,
        head_dim=kv.head_dim,
        dtype=choice("dtype", kv.dtype, numbers(bank_pb2.DataType)),
        hidden_size=kv.hidden_size,
    )


def _read_kv_spec(message: bank_pb2.KvSpec) -> m.KVSpec:
    return m.KVSpec(
        reader_digest=message.reader_digest,
        layers=tuple(message.layers),
        kv_heads=message.kv_heads,
        head_dim=message.head_dim,
        dtype=word(bank_pb2.DataType, message.dtype),
        reader_parts=dict(message.reader_parts),
        hidden_size=message.hidden_size,
    )


def _embedding_spec(embedding: m.EmbeddingSpec) -> bank_pb2.EmbeddingSpec:
    instance("embedding", embedding, m.EmbeddingSpec)
    return build(
        bank_pb2.EmbeddingSpec,
        embedder_digest=embedding.embedder_digest,
        dimension=embedding.dimension,
        metric=choice("metric", embedding.metric, numbers(bank_pb2.Metric)),
    )


def _capacity(capacity: m.Capacity) -> bank_pb2.Capacity:
    instance("capacity", capacity, m.Capacity)
    return build(bank_pb2.Capacity, chunks=capacity.chunks, tokens=capacity.tokens, bytes=capacity.bytes)


def _read_capacity(message: bank_pb2.Capacity) -> m.Capacity | None:
    limit = message.WhichOneof("limit")
    return None if limit is None else m.Capacity(**{limit: getattr(message, limit)})


def _policy(policy: m.Policy) -> bank_pb2.EvictionPolicy:
    instance("policy", policy, m.Policy)
    kind = choice("policy", policy.kind, numbers(bank_pb2.PolicyKind))
    return build(
        bank_pb2.EvictionPolicy, kind=kind, **{name: getattr(policy, name) for name in _FIGURES.get(policy.kind, ())}
    )


def _read_policy(message: bank_pb2.EvictionPolicy) -> m.Policy:
    bounds = {name: getattr(message, name) for name in ("lower", "upper", "target") if message.HasField(name)}
    return m.Policy(word(bank_pb2.PolicyKind, message.kind), **bounds)


def _quota(quota: m.Quota) -> bank_pb2.Quota:
    instance("quota", quota, m.Quota)
    bounds = {name: getattr(quota, name) for name in m.Quota.__slots__}
    return build(bank_pb2.Quota, **{name: bound for name, bound in bounds.items() if bound is not None})


def _read_quota(message: bank_pb2.Quota) -> m.Quota | None:
    bounds = {name: getattr(message, name) or None for name in m.Quota.__slots__}
    return m.Quota(**bounds) if any(bounds.values()) else None


def expiry(expiry: m.Expiry) -> bank_pb2.Expiry:
    """Return the message of an expiry. Errors: InvalidArgument."""
    instance("expiry", expiry, m.Expiry)
    message = build(bank_pb2.Expiry, renew=expiry.renew)
    if expiry.ttl is not None:
        try:
            message.ttl.FromTimedelta(expiry.ttl)
        except (ValueError, OverflowError):
            raise invalid("expiry", "expected a ttl of at most 1000 years") from None
    return message


def read_expiry(message: bank_pb2.Expiry) -> m.Expiry | None:
    """Return the expiry of a message; None where it has no ttl."""
    return m.Expiry(message.ttl.ToTimedelta(), message.renew) if message.ttl != Duration() else None


# The settings that are messages of their own, and how each is made.
_PARTS: Mapping[str, Any] = {"capacity": _capacity, "policy": _policy, "quota": _quota, "expiry": expiry}
