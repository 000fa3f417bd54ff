"""A bank as columns of a row, and back: specs, bounds and metadata are JSON."""

import json
from dataclasses import asdict, fields
from typing import Any

from memory_service.domain.model import Bank, Capacity, EmbeddingSpec, Expiry, KvSpec, Policy, Quota, Usage

USAGE = [field.name for field in fields(Usage)]


def values_of(bank: Bank) -> dict[str, Any]:
    """Return the columns of a bank that may change, and its specs."""
    kv = asdict(bank.kv) | {"reader_parts": dict(bank.kv.reader_parts)}
    if not bank.kv.hidden_size:
        del kv["hidden_size"]  # as in what was written before there was one
    return {
        "spec": json.dumps({"kv": kv, "embedding": asdict(bank.embedding)}),
        "capacity": None if bank.capacity is None else json.dumps(asdict(bank.capacity)),
        "policy": json.dumps(asdict(bank.policy)),
        "quota": json.dumps(asdict(bank.quota)),
        "expiry": json.dumps(asdict(bank.expiry)),
        "index_kind": bank.index,
        "meta": json.dumps(dict(bank.metadata)),
    }


def bank_of(row: Any) -> Bank:
    """Make the value of a row. Errors: ValueError, KeyError, TypeError for one that is damaged."""
    spec = json.loads(row.spec)
    kv = spec["kv"]
    return Bank(
        name=row.name,
        kv=KvSpec(**(kv | {"layers": tuple(kv["layers"])})),
        embedding=EmbeddingSpec(**spec["embedding"]),
        capacity=None if row.capacity is None else Capacity(**json.loads(row.capacity)),
        policy=Policy(**json.loads(row.policy)),
        metadata=json.loads(row.meta),
        bank_id=row.bank_id,
        uid=row.uid,
        created=row.created,
        usage=Usage(*(getattr(row, name) for name in USAGE)),
        quota=Quota(**json.loads(row.quota)),
        expiry=Expiry(**json.loads(row.expiry)),
        index=row.index_kind,
        tenant=row.tenant,
    )
