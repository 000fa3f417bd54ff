"""Models of what a server tells of itself are made here: limits, figures, evictions, and compactions."""

from collections.abc import Iterable, Sequence

from kvbank import _models as m
from kvbank._calls import access_messages, bank_messages
from kvbank._calls.answers import read_time, understood
from kvbank._calls.enums import word
from kvbank._calls.messages import build
from kvbank.v1 import bank_pb2
from kvbank.v1 import service_pb2 as pb
from kvbank.wire import scalars

# Banks that one GetStats names.
_MOST_NAMES = 100


@understood()
def server_info(message: pb.GetServerInfoResponse) -> m.ServerInfo:
    """Return the server and its limits. Errors: Internal (ODD_ANSWER)."""
    return m.ServerInfo(**{name: getattr(message, name) for name in m.ServerInfo.__slots__})


@understood()
def eviction(message: pb.Eviction) -> m.Eviction:
    """Return one chunk that went or would go. Errors: Internal (ODD_ANSWER)."""
    return m.Eviction(
        chunk_id=message.chunk_id,
        reason=word(pb.EvictionReason, message.reason),
        retrieval_count=message.retrieval_count,
        start=message.start,
        stored_length=message.stored_length,
        create_time=read_time(message.create_time),
        evict_time=read_time(message.evict_time) if message.HasField("evict_time") else None,
        metadata=scalars.read(message),
    )


@understood()
def eviction_plan(message: pb.ExplainEvictionResponse) -> m.EvictionPlan:
    """Return what would go, in order, with the explanation. Errors: Internal (ODD_ANSWER)."""
    return m.EvictionPlan(map(eviction, message.victims), message.explanation)


def stats_requests(banks: Iterable[str]) -> list[pb.GetStatsRequest]:
    """Return a request for each hundred of the named banks, or one for all banks; a name that is given twice counts
    once. Errors: InvalidArgument."""
    names = list(dict.fromkeys(build(pb.GetStatsRequest, banks=banks).banks))
    parts = [names[begin : begin + _MOST_NAMES] for begin in range(0, len(names), _MOST_NAMES)]
    return [pb.GetStatsRequest(banks=part) for part in parts or [[]]]


@understood()
def stats(pages: Sequence[pb.GetStatsResponse]) -> m.Stats:
    """Return server and figures of the first page, with the banks of all pages. Errors: Internal (ODD_ANSWER)."""
    message = pages[0]
    return m.Stats(
        version=message.version,
        store_id=message.store_id,
        start_time=read_time(message.start_time),
        resident_bytes=message.resident_bytes,
        free_bytes=message.free_bytes,
        database_bytes=message.database_bytes,
        database_free_bytes=message.database_free_bytes,
        index_bytes=message.index_bytes,
        uptime=message.uptime.ToTimedelta(),
        banks=tuple(_bank_stats(each) for page in pages for each in page.banks),
        samples=tuple(m.MetricSample(each.name, dict(each.labels), each.value) for each in message.samples),
        tenants=tuple(map(access_messages.tenant, message.tenants)),
    )


@understood()
def compacted(message: pb.CompactResponse) -> m.Compacted:
    """Return the size of the database before and after. Errors: Internal (ODD_ANSWER)."""
    return m.Compacted(message.database_bytes_before, message.database_bytes)


def _bank_stats(message: pb.BankStats) -> m.BankStats:
    return m.BankStats(bank_messages.read(message.bank), _index_stats(message.index), message.tenant)


def _index_stats(message: pb.IndexStats) -> m.IndexStats:
    return m.IndexStats(
        kind=word(bank_pb2.IndexKind, message.kind),
        loaded=message.loaded,
        vectors=message.vectors,
        tombstones=message.tombstones,
        memory_bytes=message.memory_bytes,
        recall=message.recall if message.HasField("recall") else None,
    )
