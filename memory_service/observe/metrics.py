"""The metrics of the service. This file owns the names, units and labels of all metrics, which docs/operations.md
lists.

Every server has a registry of its own, because several may live in one process. A label has few values, which are known
beforehand: it is never the name of a bank, or anything else that a caller wrote.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from memory_service.domain.model import EvictionReason
from memory_service.observe.recording import Recorder
from memory_service.observe.troubles import Troubles

# The bounds of buckets. Seconds from 250 us to 131 s: a percentile read from them is right within a factor of two.
_SECONDS = tuple(0.00025 * 2**i for i in range(20))
_COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# Parts of a request. search: the indexes, with filter and re-scoring; load: rows of the hits; open, read: files, with
# checksums; store: file and its sync; commit: from submitted to durable.
STAGES = ("search", "load", "open", "read", "store", "commit")
# Kinds of errors of a database.
DATABASE_ERRORS = ("connection", "pool", "statement")
_SCORES = tuple(i / 10 for i in range(-10, 11))


class BucketFigures(NamedTuple):
    """What a service has done with a bucket since it began: payloads that were opened from its cache and from the
    bucket, requests that were made again, and the bytes of the cache."""

    cached: int
    fetched: int
    repeated: int
    cache_bytes: int


class DatabaseMetrics:
    """The instruments of a database that several services share. Threads may share them."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """Make the instruments of one database. registry: where they are shown; nowhere where there is none."""
        text = "Time until a transaction had its connection; with a database only."
        self.wait_seconds = Histogram("kvbank_database_wait_seconds", text, buckets=_SECONDS, registry=registry)
        text = "Errors of the database: no connection (connection), none free in time (pool), others (statement)."
        errors = Counter("kvbank_database_errors", text, ["kind"], registry=registry)
        # Each is there from zero on, so that the first one shows up as a rate.
        self.errors = {kind: errors.labels(kind) for kind in DATABASE_ERRORS}
        text = "Transactions that were tried again, because others had ended them; with a database only."
        self.repeated = Counter("kvbank_database_repeated", text, registry=registry)
        text = "Connections to the database that are in use; with a database only."
        self.connections = Gauge("kvbank_database_connections", text, registry=registry)
        text = "Changes of a bank that this service does not know yet, of the bank with most; with a database only."
        self.behind = Gauge("kvbank_changes_behind", text, registry=registry)
        text = "Banks that were given up and read anew, because changes were not in the log; with a database only."
        self.read_anew = Counter("kvbank_banks_read_anew", text, registry=registry)
        text = "1 where this service does what only one of all does; with a database only."
        self.housekeeper = Gauge("kvbank_housekeeper", text, registry=registry)


class Registry(CollectorRegistry):
    """A registry without the time of creation that the library adds to each counter, which doubles the answer."""

    def collect(self) -> Iterable[Metric]:
        """Yield all families of figures, as a scrape gets them."""
        for family in super().collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family

    def samples(self) -> Iterable[Sample]:
        """Yield each figure of each family."""
        for family in self.collect():
            yield from family.samples


class Metrics:
    """The instruments of one server, by attribute. Threads may share them."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.troubles = Troubles()
        self.recorder = Recorder()
        ProcessCollector(namespace="kvbank", registry=self.registry)
        self._gauge("kvbank_ready", "1 where the service can be asked.").set_function(
            lambda: float(self.troubles.ready())
        )
        self._make_requests()
        self._make_chunks()
        self._make_sessions()
        self._make_bytes()
        self._make_commits()

    def _make_requests(self) -> None:
        self.request_seconds = self._histogram(
            "kvbank_request_seconds", "Requests by method and status code.", _SECONDS, ["method", "code"]
        )
        self.requests_running = self._gauge("kvbank_requests_running", "Requests under way.", ["method"])
        self.errors = self._counter(
            "kvbank_errors", "Failed requests by reason, or code where there is none.", ["method", "reason"]
        )
        stage_seconds = self._histogram("kvbank_stage_seconds", "Parts of a request.", _SECONDS, ["stage"])
        self.stages = {stage: stage_seconds.labels(stage) for stage in STAGES}
        self.query_hits = self._histogram("kvbank_query_hits", "Chunks found for a query.", _COUNTS)
        self.query_best_score = self._histogram(
            "kvbank_query_best_score", "Score of the best chunk found for a query.", _SCORES
        )

    def _make_chunks(self) -> None:
        self.chunks_written = self._counter("kvbank_chunks_written", "Chunks written; a repeated key is none.")
        self.chunks_evicted = self._counter("kvbank_chunks_evicted", "Chunks evicted by a policy.", ["reason"])
        self.chunks_expired = self._counter("kvbank_chunks_expired", "Chunks whose time was up.")
        self.chunks_deleted = self._counter(
            "kvbank_chunks_deleted", "Chunks deleted by a caller, without deleted banks."
        )
        self.chunks_quarantined = self._counter("kvbank_chunks_quarantined", "Damaged chunks taken out of service.")
        # Chunks that are gone without an eviction, by the name of the bank's own counter.
        self.gone = {
            "chunks_expired": self.chunks_expired,
            "chunks_deleted": self.chunks_deleted,
            "chunks_quarantined": self.chunks_quarantined,
        }
        # Each is there from zero on, so that the first one of a kind shows up as a rate.
        for reason in get_args(EvictionReason):
            self.chunks_evicted.labels(reason)

    def _make_sessions(self) -> None:
        self.turns_appended = self._counter("kvbank_turns_appended", "Turns appended; a repeated key is none.")
        self.sessions_expired = self._counter("kvbank_sessions_expired", "Sessions whose time was up.")

    def _make_bytes(self) -> None:
        self.checksum_failures = self._counter(
            "kvbank_checksum_failures", "Bytes that did not match, as they came (write) or as stored (read).", ["at"]
        )
        for at in ("write", "read"):
            self.checksum_failures.labels(at)
        self.received_bytes = self._counter("kvbank_payload_received_bytes", "Payload bytes written.", ["path"])
        self.sent_bytes = self._counter("kvbank_payload_sent_bytes", "Payload bytes answered.", ["path"])
        self.in_flight_bytes = self._gauge("kvbank_in_flight_bytes", "Bytes of writes taken and not acknowledged.")

    def _make_commits(self) -> None:
        self.commit_operations = self._histogram(
            "kvbank_commit_operations", "Operations that shared a transaction.", _COUNTS
        )
        self.commit_seconds = self._histogram("kvbank_commit_seconds", "Transactions, until durable.", _SECONDS)

    def count_down(self, seconds: Callable[[], float]) -> None:
        """Show the end of the service's certificate. seconds: tells how long it is until then."""
        text = "Time until the certificate of the service expires, negative after that; with TLS only."
        self._gauge("kvbank_tls_expiry_seconds", text).set_function(seconds)

    def show_open(self, is_open: Callable[[], bool]) -> None:
        """Show whether the service is open to others. is_open: tells that."""
        text = "1 where others can reach the service without TLS or without a key (--insecure)."
        self._gauge("kvbank_insecure", text).set_function(lambda: float(is_open()))

    def show_bucket(self, figures: Callable[[], BucketFigures]) -> None:
        """Show the figures of a bucket, where payloads are in one. figures: tells them."""
        self.registry.register(_Bucket(figures))

    def show_database(self) -> DatabaseMetrics:
        """Show the figures of a database, where data are in one, and return the instruments for them."""
        return DatabaseMetrics(self.registry)

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def queried(self, scores: Iterable[Sequence[float]]) -> None:
        """Count the hits of each query, and note the best score of each. scores: those of each query, best first."""
        for row in scores:
            self.query_hits.observe(len(row))
            if row:
                self.query_best_score.observe(row[0])


class _Bucket(Collector):
    """Yields the figures of a bucket, as the service counts them."""

    def __init__(self, figures: Callable[[], BucketFigures]) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        """Yield each of the figures."""
        figures, text = self._figures(), "Payloads opened from the cache, or from the bucket; with a bucket only."
        opened = CounterMetricFamily("kvbank_objects_opened", text, labels=["source"])
        opened.add_metric(["cache"], figures.cached)
        opened.add_metric(["bucket"], figures.fetched)
        yield opened
        text = "Requests to the bucket that were made again; with a bucket only."
        yield CounterMetricFamily("kvbank_objects_repeated", text, value=figures.repeated)
        text = "Bytes of the cache of payloads; with a bucket only."
        yield GaugeMetricFamily("kvbank_objects_cache_bytes", text, value=figures.cache_bytes)
