"""Two samples of a server become rates here: what happened a second between them. Nothing here does I/O."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import kvbank
from kvbank._cli import common


@dataclass(frozen=True, slots=True)
class MethodRate:
    """The rates of one method between two samples; percentiles in milliseconds, None where nothing ended."""

    method: str
    per_second: float
    errors_per_second: float
    p50_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True, slots=True)
class BankRate:
    """The rates of one bank between two samples."""

    name: str
    chunks: int
    bytes: int
    written_per_second: float
    evicted_per_second: float
    expired_per_second: float
    index: str


@dataclass(frozen=True, slots=True)
class Rates:
    """The rates of a server between two samples, `seconds` apart."""

    seconds: float
    resident_bytes: int
    free_bytes: int
    in_flight_bytes: int
    received_bytes_per_second: float
    sent_bytes_per_second: float
    methods: tuple[MethodRate, ...]
    banks: tuple[BankRate, ...]


def between(before: kvbank.Stats, after: kvbank.Stats, seconds: float) -> Rates:
    """Return the rates between two samples, the busiest methods and banks first. A server that started again between
    the samples has counted from zero. seconds: between the samples."""
    same = before.start_time == after.start_time
    samples = _Difference(before.samples if same else (), after.samples, seconds)
    methods = [_method(samples, method) for method in sorted(samples.values("kvbank_request_seconds_count", "method"))]
    usage = {found.bank.uid: found.bank.usage for found in before.banks}
    banks = [_bank(found, usage.get(found.bank.uid), seconds) for found in after.banks]
    return Rates(
        seconds=seconds,
        resident_bytes=after.resident_bytes,
        free_bytes=after.free_bytes,
        in_flight_bytes=int(sum(each.value for each in after.samples if each.name == "kvbank_in_flight_bytes")),
        received_bytes_per_second=samples.rate("kvbank_payload_received_bytes_total"),
        sent_bytes_per_second=samples.rate("kvbank_payload_sent_bytes_total"),
        methods=tuple(sorted(methods, key=lambda each: -each.per_second)),
        banks=tuple(sorted(banks, key=lambda each: (-each.written_per_second, each.name))),
    )


class _Difference:
    """The gains of all counters between two samples, `seconds` apart."""

    def __init__(
        self, before: Sequence[kvbank.MetricSample], after: Sequence[kvbank.MetricSample], seconds: float
    ) -> None:
        earlier = {_key(sample): sample.value for sample in before}
        self._gained = [(each.name, each.labels, each.value - earlier.get(_key(each), 0.0)) for each in after]
        self._seconds = seconds

    def values(self, name: str, label: str) -> set[str]:
        """Return the values that a label of a metric has."""
        return {labels[label] for each, labels, _ in self._gained if each == name}

    def rate(self, name: str, **wanted: str) -> float:
        """Return the gain of a counter a second, summed over all labels that are not named."""
        return sum(gain for _, gain in self._of(name, wanted)) / self._seconds

    def percentile(self, name: str, share: float, **wanted: str) -> float | None:
        """Return the value below which a share of a histogram's observations lies, linear within its bucket; None
        without observations."""
        buckets: defaultdict[float, float] = defaultdict(float)
        for labels, gain in self._of(f"{name}_bucket", wanted):
            buckets[float(labels["le"])] += gain
        bounds = sorted(buckets)
        wanted_count = share * buckets[bounds[-1]] if bounds else 0.0
        if wanted_count <= 0:
            return None
        low, below = 0.0, 0.0
        for bound in bounds:
            if buckets[bound] >= wanted_count:
                return low if bound == inf else low + (bound - low) * (wanted_count - below) / (buckets[bound] - below)
            low, below = bound, buckets[bound]
        return low

    def _of(self, name: str, wanted: Mapping[str, str]) -> list[tuple[Mapping[str, str], float]]:
        return [
            (labels, gain)
            for each, labels, gain in self._gained
            if each == name and all(labels.get(label) == value for label, value in wanted.items())
        ]


def _key(sample: kvbank.MetricSample) -> tuple[str, frozenset[tuple[str, str]]]:
    return sample.name, frozenset(sample.labels.items())


def _method(samples: _Difference, method: str) -> MethodRate:
    name = "kvbank_request_seconds"
    p50, p99 = (samples.percentile(name, share, method=method) for share in (0.5, 0.99))
    return MethodRate(
        method=method,
        per_second=samples.rate(f"{name}_count", method=method),
        errors_per_second=samples.rate("kvbank_errors_total", method=method),
        p50_ms=None if p50 is None else p50 * 1000,
        p99_ms=None if p99 is None else p99 * 1000,
    )


def _bank(found: kvbank.BankStats, before: kvbank.BankUsage | None, seconds: float) -> BankRate:
    usage = found.bank.usage

    def rate(counter: str) -> float:
        gained: int = getattr(usage, counter) - (getattr(before, counter) if before else 0)
        return gained / seconds

    return BankRate(
        name=found.bank.name,
        chunks=usage.chunks,
        bytes=usage.bytes,
        written_per_second=rate("chunks_written"),
        evicted_per_second=rate("chunks_evicted"),
        expired_per_second=rate("chunks_expired"),
        index=common.index(found.index),
    )
