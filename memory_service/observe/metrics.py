"""What the service counts. Owns the names, units and labels of all metrics (docs/operations.md lists them).

Every server has a registry of its own, because several may live in one process. A label has few values, all of them
ours: never a bank's name, never what a caller wrote.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from memory_service.domain.model import EvictionReason
from memory_service.observe.troubles import Condition

# 250 us to 131 s: a percentile read from them is right within a factor of two.
_SECONDS = tuple(0.00025 * 2**i for i in range(20))
_COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# search: the indexes, with filter and re-scoring; load: rows of the hits; open, read: files, with checksums;
# store: file and its sync; commit: from submitted to durable.
STAGES = ("search", "load", "open", "read", "store", "commit")
_SCORES = tuple(i / 10 for i in range(-10, 11))


class Registry(CollectorRegistry):
    """Without the time of creation that the library adds to each counter, which doubles the answer."""

    def collect(self) -> Iterable[Metric]:
        """All families, as a scrape gets them."""
        for family in super().collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family

    def samples(self) -> Iterable[Sample]:
        """Every figure on its own."""
        for family in self.collect():
            yield from family.samples


class Metrics:
    """One object a server; the attributes are the instruments. Threads may share it."""

    def __init__(self) -> None:
        self.registry = Registry()
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        ProcessCollector(namespace="kvbank", registry=self.registry)
        self.condition = Condition()
        gauge("kvbank_ready", "1 where the service can be asked.").set_function(lambda: float(self.condition.ready()))

        self.request_seconds = histogram(
            "kvbank_request_seconds", "Requests by method and status code.", ["method", "code"], buckets=_SECONDS
        )
        self.requests_running = gauge("kvbank_requests_running", "Requests under way.", ["method"])
        self.errors = counter(
            "kvbank_errors", "Failed requests by reason, or code where there is none.", ["method", "reason"]
        )
        stage_seconds = histogram("kvbank_stage_seconds", "Parts of a request.", ["stage"], buckets=_SECONDS)
        self.stages = {stage: stage_seconds.labels(stage) for stage in STAGES}

        self.query_hits = histogram("kvbank_query_hits", "Chunks found for a query.", buckets=_COUNTS)
        self.query_best_score = histogram(
            "kvbank_query_best_score", "Score of the best chunk found for a query.", buckets=_SCORES
        )

        self.chunks_written = counter("kvbank_chunks_written", "Chunks written; a repeated key is none.")
        self.chunks_evicted = counter("kvbank_chunks_evicted", "Chunks evicted by a policy.", ["reason"])
        self.chunks_expired = counter("kvbank_chunks_expired", "Chunks whose time was up.")
        self.chunks_deleted = counter("kvbank_chunks_deleted", "Chunks deleted by a caller, without deleted banks.")
        self.chunks_quarantined = counter("kvbank_chunks_quarantined", "Damaged chunks taken out of service.")
        self.checksum_failures = counter(
            "kvbank_checksum_failures", "Bytes that did not match, as they came (write) or as stored (read).", ["at"]
        )

        self.received_bytes = counter("kvbank_payload_received_bytes", "Payload bytes written.", ["path"])
        self.sent_bytes = counter("kvbank_payload_sent_bytes", "Payload bytes answered.", ["path"])
        self.in_flight_bytes = gauge("kvbank_in_flight_bytes", "Bytes of writes taken and not acknowledged.")

        # As the banks' own counters are called.
        self.gone = {
            "chunks_expired": self.chunks_expired,
            "chunks_deleted": self.chunks_deleted,
            "chunks_quarantined": self.chunks_quarantined,
        }
        # From zero on, so that the first one of a kind shows up as a rate.
        for reason in get_args(EvictionReason):
            self.chunks_evicted.labels(reason)
        for at in ("write", "read"):
            self.checksum_failures.labels(at)

        self.commit_operations = histogram(
            "kvbank_commit_operations", "Operations that shared a transaction.", buckets=_COUNTS
        )
        self.commit_seconds = histogram("kvbank_commit_seconds", "Transactions, until durable.", buckets=_SECONDS)

    def queried(self, scores: Iterable[Sequence[float]]) -> None:
        """The scores that were found for each query, best first."""
        for row in scores:
            self.query_hits.observe(len(row))
            if row:
                self.query_best_score.observe(row[0])
