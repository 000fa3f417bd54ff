"""Sessions, turns, chunks and receipts as JSON documents of `/v1/kvbank/` (pure).

Times are seconds since 1970 with their fractions. Checksums are hexadecimal, since programs in JavaScript have no whole
numbers of 64 bits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

import kvbank
from model_worker.session.explained import ExplainedChunk


def _seconds(time: datetime | None) -> float | None:
    return None if time is None else round(time.timestamp(), 3)


def session_document(session: kvbank.Session, title: str = "") -> dict[str, Any]:
    """Return what is said of a session. title: how its first message of its own begins."""
    fork = session.forked_from
    return {
        "id": session.session_id,
        "object": "kvbank.session",
        "name": session.name,
        "title": title,
        "turns": session.head,
        "tokens": session.tokens,
        "bank": session.bank,
        "reads": list(session.reads),
        "metadata": dict(session.metadata),
        "model": session.settings.get("model", ""),
        "forked_from": None if fork is None else {"session": fork.session_id, "turn": fork.turn},
        "created_at": _seconds(session.create_time),
        "updated_at": _seconds(session.update_time),
        "expires_at": _seconds(session.expire_time),
        "in_use": session.lease is not None,
    }


def turn_document(turn: kvbank.Turn) -> dict[str, Any]:
    """Return what is said of a turn. id: what the caller got as the id of the answer."""
    return {
        "id": turn.key,
        "object": "kvbank.turn",
        "number": turn.number,
        "status": turn.status,
        "items": [{"role": item.role, "text": item.text} for item in turn.items],
        "tokens": turn.token_count,
        "usage": dict(turn.usage),
        "created_at": _seconds(turn.create_time),
        "traced": turn.trace is not None,
    }


def chunk_document(chunk: kvbank.Chunk) -> dict[str, Any]:
    """Return what is said of a chunk that is in its bank."""
    return {
        "bank": chunk.bank,
        "chunk_id": chunk.chunk_id,
        "start": chunk.start,
        "tokens": len(chunk.token_ids),
        "text": chunk.text,
        **origin(chunk.metadata),
        "created_at": _seconds(chunk.create_time),
        "retrievals": chunk.retrieval_count,
        "pinned": chunk.pinned,
    }


def origin(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return where a chunk comes from: its source, which is a document, or else its turn in a session and its role."""
    return {name: metadata.get(name) for name in ("source", "turn", "role")}


def eviction_document(eviction: kvbank.Eviction) -> dict[str, Any]:
    """Return what is said of a chunk that was evicted, or that would be next. reason: of the bank's policy."""
    return {
        "chunk_id": eviction.chunk_id,
        "reason": eviction.reason,
        "start": eviction.start,
        "tokens": eviction.stored_length,
        **origin(eviction.metadata),
        "created_at": _seconds(eviction.create_time),
        "retrievals": eviction.retrieval_count,
        "evicted_at": _seconds(eviction.evict_time),
    }


def trace_document(turn: kvbank.Turn, trace: kvbank.AnswerTrace, chunks: Iterable[ExplainedChunk]) -> dict[str, Any]:
    """Return why the answer of a turn came. chunks: those of the trace, with what their banks say of them now."""
    questions = [step.query for step in trace.steps if step.kind == "prompt" and step.query]
    return {
        "id": turn.key,
        "object": "kvbank.trace",
        "session": turn.session_id,
        "turn": turn.number,
        "created_at": _seconds(turn.create_time),
        "query": questions[0] if questions else "",
        "layers": list(trace.layers),
        "tokens": trace.tokens,
        "window": _mass(trace.window),
        "sinks": _mass(trace.sinks),
        "others": {"chunks": trace.left_out, **_mass(trace.rest)},
        "steps": [asdict(step) for step in trace.steps],
        "chunks": [_traced(each, trace) for each in chunks],
    }


def _traced(each: ExplainedChunk, trace: kvbank.AnswerTrace) -> dict[str, Any]:
    """Return a chunk of a trace; text and the like are null for one that is not in its bank any more."""
    traced, stored = each.traced, each.stored
    names = ("text", "source", "turn", "role", "created_at", "retrievals")
    said = dict.fromkeys(names) if stored is None else chunk_document(stored)
    return {
        **{name: said[name] for name in names},
        "bank": traced.bank if stored is None else stored.bank,
        "chunk_id": traced.chunk_id if stored is None else stored.chunk_id,
        "start": traced.start,
        "tokens": traced.tokens,
        "score": traced.score,
        "query": trace.steps[traced.steps[0]].query if traced.steps and traced.score is not None else "",
        "steps": list(traced.steps),
        **_mass(traced.mass),
    }


def _mass(mass: tuple[float, ...]) -> dict[str, Any]:
    """Return a mass by layer, with its sum and its mean over the layers."""
    total = sum(mass)
    return {"mass": list(mass), "total": round(total, 5), "share": round(total / len(mass), 5) if mass else 0.0}


def receipt_document(receipt: kvbank.Receipt) -> dict[str, Any]:
    """Return what a receipt says of what was forgotten."""
    chunks = [
        {"bank": chunk.bank, "chunk_id": chunk.chunk_id, "checksum": f"{chunk.checksum:016x}"}
        for chunk in receipt.chunks
    ]
    fields = ("key_id", "target", "turns", "tokens", "bytes", "turns_kept", "chunks_to_make_again", "remains")
    return {
        "id": receipt.receipt_id,
        "object": "kvbank.receipt",
        "created_at": _seconds(receipt.time),
        **{name: getattr(receipt, name) for name in fields},
        "places": dict(receipt.places),
        "chunk_count": receipt.chunk_count,
        "chunks": chunks,
    }
