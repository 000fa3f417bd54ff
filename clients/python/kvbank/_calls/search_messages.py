"""Requests that select chunks are made here: a retrieval by queries, a fetch by ids, a list by a filter."""

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import numpy.typing as npt

from kvbank import _models as m
from kvbank._arguments import each, expected, flag, instance, int32, invalid, mapping, text
from kvbank._calls import metadata as _metadata
from kvbank._calls import tensors as _tensors
from kvbank._calls.messages import build
from kvbank._exceptions import FailedPrecondition
from kvbank._options import RetrieveOptions, check_names
from kvbank.v1 import service_pb2 as pb
from kvbank.v1 import session_pb2


def list_chunks(bank: str, with_embedding: bool, filter: m.Filter | None) -> pb.ListChunksRequest:
    """Return the request for the first page of a bank's chunks. Errors: InvalidArgument."""
    made = None if filter is None else _filter(filter)
    return build(pb.ListChunksRequest, bank=bank, with_embedding=with_embedding, filter=made)


def forget(bank: str, filter: m.Filter) -> session_pb2.ForgetRequest:
    """Return the request to forget chunks of a bank. Errors: InvalidArgument."""
    chunks = build(session_pb2.ForgetRequest.BankChunks, bank=bank, filter=_filter(filter))
    return session_pb2.ForgetRequest(chunks=chunks)


def check_heeded(message: Any, alternatives: bool) -> None:
    """Check that the server heeds the alternatives and the stretches of a filter. alternatives: whether it says so.

    Errors: FailedPrecondition (FILTER_ALTERNATIVES).
    """
    if has_alternatives(message) and not alternatives:
        what = "this server is of an earlier version, and does not know any_of and stretches of a filter"
        raise FailedPrecondition(what, reason="FILTER_ALTERNATIVES")


def has_alternatives(message: Any) -> bool:
    """Tell whether the filter of a message says what servers of earlier versions do not know."""
    return bool(message.filter.any_of or message.filter.stretches)


def fetch(
    bank: str, chunk_ids: Iterable[int], layers: Iterable[int] | None, reader_digest: str
) -> pb.FetchChunksRequest:
    """Return the request for chunks with their tensors, by id. Errors: InvalidArgument."""
    selected = {"chunk_ids": chunk_ids, "layers": _layers(layers)}
    return build(pb.FetchChunksRequest, bank=bank, reader_digest=reader_digest, **selected)


def retrieve(
    banks: str | Iterable[str],
    queries: npt.ArrayLike,
    *,
    top_k: int,
    filter: m.Filter | None,
    reader_digest: str,
    embedder_digest: str,
    options: RetrieveOptions,
) -> pb.RetrieveRequest:
    """Return the request for the nearest chunks; it has an id that a retry keeps, so that it counts once.

    queries: float32 [n, dimension], or [dimension] for one.
    Errors: InvalidArgument; TypeError for an option that there is not.
    """
    check_names("retrieve", options, RetrieveOptions)
    if int32("top_k", top_k) == 0:
        raise invalid("top_k", "must be at least 1")
    vectors = _tensors.as_embedding("queries", queries, ndim=2)
    message = build(
        pb.RetrieveRequest,
        banks=[banks] if isinstance(banks, str) else banks,
        reader_digest=reader_digest,
        embedder_digest=embedder_digest,
        queries=vectors.tobytes(),
        dimension=vectors.shape[1],
        top_k=top_k,
        min_score=options.get("min_score"),
        min_share=options.get("min_share"),
        layers=_layers(options.get("layers")),
        omit_payload=not flag("payload", options.get("payload", True)),
        skip_count=not flag("count", options.get("count", True)),
        request_id=uuid.uuid4().bytes,
        filter=None if filter is None else _filter(filter),
    )
    if (held := options.get("held")) is not None:
        message.store_id = text("store_id", instance("held", held, m.Held).store_id)
        checksums = mapping("checksums", held.checksums).items()
        message.held.extend(build(pb.HeldChunk, chunk_id=id, checksum=checksum) for id, checksum in checksums)
    return message


def _layers(layers: Iterable[int] | None) -> Sequence[int]:
    """Return the layers as a request has them, where an empty list stands for all. Errors: InvalidArgument for none."""
    if layers is None:
        return ()
    wanted = each("layers", layers, int32)
    if not wanted:
        raise invalid("layers", "expected some layers, got none; leave them out for all")
    return wanted


def _filter(filter: m.Filter) -> pb.Filter:
    instance("filter", filter, m.Filter)
    start = {"start_from": filter.start_from, "start_before": filter.start_before}
    message = build(pb.Filter, **start, pinned=filter.pinned)
    for name in ("created_from", "created_before"):
        if (time := getattr(filter, name)) is not None:
            try:
                getattr(message, name).FromDatetime(time)
            except OverflowError:  # its time zone takes it out of the calendar
                raise expected(name, "a time from year 1 to 9999 in UTC", time) from None
    for conditions, negate in ((filter.metadata, False), (filter.exclude, True)):
        for key, wanted in conditions.items():
            message.metadata.append(_metadata.condition(key, wanted, negate))
    message.any_of.extend(map(_filter, filter.any_of))
    message.stretches.extend(
        build(pb.Stretch, branch=one.branch, start_before=one.start_before) for one in filter.stretches
    )
    return message
