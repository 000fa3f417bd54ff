"""The figures of a worker: requests by path and status, connections that were ended by a bound, tokens by kind, and
what runs and waits. No caller is named."""

from collections.abc import Callable
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from model_worker.serve.served import Served
from model_worker.serve.usage import Usage

# Why a connection is ended: its host, or all hosts together, have as many as they may; or its request does not come in
# time.
Refusal = Literal["host", "all", "late"]
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The figures of one worker, in a registry of their own."""

    def __init__(self, served: Served) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "kvbank_worker_requests", "Requests that were answered.", ("path", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "kvbank_worker_request_seconds",
            "Seconds from a request to the end of its answer.",
            ("path",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._refused = Counter(
            "kvbank_worker_connections_refused",
            "Connections that were ended because their host (host) or all hosts (all) had as many as they may, or "
            "because their request had not come in time (late).",
            ("why",),
            registry=self.registry,
        )
        for why in get_args(Refusal):
            self._refused.labels(why)
        self._tokens = Counter(
            "kvbank_worker_tokens",
            "Tokens: before answers (prompt), of them not fed again (cached), of answers (completion), and written to "
            "the memory (written).",
            ("kind",),
            registry=self.registry,
        )
        self._gauge("running", "Requests that are being answered.", lambda: served.engine.running)
        self._gauge("waiting", "Requests that wait.", lambda: served.engine.waiting)
        self._gauge("ready", "1 while requests are answered.", lambda: served.ready)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request that was answered. path: that of the route, or "" for none."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def refused(self, why: Refusal) -> None:
        """Count a connection that was ended by a bound."""
        self._refused.labels(why).inc()

    def used(self, usage: Usage) -> None:
        """Count the tokens of an answer."""
        for kind in ("prompt", "cached", "completion", "written"):
            self._tokens.labels(kind).inc(getattr(usage, kind))

    def _gauge(self, name: str, text: str, of: Callable[[], float]) -> None:
        Gauge(f"kvbank_worker_{name}", text, registry=self.registry).set_function(lambda: float(of()))
