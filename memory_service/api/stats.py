"""The figures of what the service holds at this moment: for GetStats, and for a scrape beside what `metrics` has
counted."""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvbank.v1 import service_pb2 as pb
from memory_service import __version__
from memory_service.api import listen
from memory_service.api.messages import convert
from memory_service.domain import validate
from memory_service.domain.model import Bank, IndexKind, IndexStats
from memory_service.observe.metrics import Metrics
from memory_service.operations.banks import Banks
from memory_service.settings import Settings


class Stats(Collector):
    """Reads the figures of this moment; this blocks, and is done in storage threads and the thread of `/metrics`."""

    def __init__(self, banks: Banks, settings: Settings, metrics: Metrics) -> None:
        self._banks = banks
        self._settings = settings
        self._registry = metrics.registry
        self._started = banks.now_us()
        self._registry.register(self)

    def of_banks(self, names: Sequence[str]) -> pb.GetStatsResponse:
        """Make the statistics of the banks of these names. Errors: BANK_NOT_FOUND, INVALID_FIELD."""
        validate.names("banks", names)
        return self._answer([self._stats_of(self._banks.get(name)) for name in names], samples=True)

    def page(self, after: str, size: int) -> pb.GetStatsResponse:
        """Make the statistics of a page of all banks, which begins behind a name."""
        banks, more = self._banks.after(after, size)
        answer = self._answer(list(map(self._stats_of, banks)), samples=not after)
        answer.next_page_token = banks[-1].name if more else ""
        return answer

    def _answer(self, banks: Sequence[pb.BankStats], *, samples: bool) -> pb.GetStatsResponse:
        database, now = self._banks.sizes(), self._banks.now_us()
        return pb.GetStatsResponse(
            version=__version__,
            store_id=self._banks.store_id,
            start_time=convert.timestamp(self._started),
            resident_bytes=_resident_bytes(),
            free_bytes=self._banks.free_bytes(),
            database_bytes=database.taken,
            database_free_bytes=database.free,
            index_bytes=_bytes_below(self._banks.engine.cache),
            uptime=convert.duration(now - self._started),
            banks=banks,
            samples=[
                pb.MetricSample(name=sample.name, labels=sample.labels, value=sample.value)
                for sample in (self._registry.samples() if samples else ())
            ],
        )

    def _stats_of(self, bank: Bank) -> pb.BankStats:
        return pb.BankStats(bank=convert.bank_message(bank), index=_index_message(self._banks.index_stats(bank)))

    def collect(self) -> Iterable[Metric]:
        """Yield the gauges over all banks."""
        totals = self._banks.totals()
        loaded = [index for index in map(self._banks.index_stats, self._banks.known()) if index.loaded]
        info = GaugeMetricFamily("kvbank_info", "1, with what this server is.", labels=["version", "durability"])
        info.add_metric([__version__, self._settings.durability], 1)
        yield info
        open_, text = listen.open_addresses(self._settings), "1 where others can reach a port without TLS (--insecure)."
        yield GaugeMetricFamily("kvbank_insecure", text, value=len(open_) > 0)
        for name, text, value in (
            ("kvbank_banks", "Banks.", totals.banks),
            ("kvbank_chunks", "Live chunks.", totals.chunks),
            ("kvbank_stored_tokens", "Tokens of live chunks, after compression.", totals.tokens),
            ("kvbank_stored_bytes", "Bytes of live chunks: K-V, vectors, texts, metadata.", totals.bytes),
            ("kvbank_database_bytes", "Bytes of the database with its log.", self._banks.sizes().taken),
            ("kvbank_evictions_stalled", "Banks whose eviction cannot be written.", totals.stalled),
            ("kvbank_disk_free_bytes", "Free on the disk that holds the data folder.", self._banks.free_bytes()),
            ("kvbank_index_banks", "Banks whose index is in memory.", len(loaded)),
            ("kvbank_index_segments", "Segments of indexes in memory.", sum(index.segments for index in loaded)),
            ("kvbank_index_vectors", "Vectors in memory, removed ones too.", sum(index.vectors for index in loaded)),
            ("kvbank_index_tombstones", "Removed, and not yet compacted away.", sum(i.tombstones for i in loaded)),
            ("kvbank_index_bytes", "Memory of the indexes.", sum(index.memory_bytes for index in loaded)),
        ):
            yield GaugeMetricFamily(name, text, value=value)


def _index_message(stats: IndexStats) -> pb.IndexStats:
    return pb.IndexStats(
        kind=convert.NUMBERS[IndexKind][stats.kind],
        loaded=stats.loaded,
        vectors=stats.vectors,
        tombstones=stats.tombstones,
        memory_bytes=stats.memory_bytes,
        recall=stats.recall,
    )


def _bytes_below(folder: Path) -> int:
    """Return the bytes of the files in the folders of a folder, as far as they are still there."""
    total = 0
    for path in folder.glob("*/*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def _resident_bytes() -> int:
    """Return the bytes of memory that this process has; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0
