"""What the service holds at this moment: for GetStats, and for a scrape beside what `metrics` has counted."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvbank.v1 import service_pb2 as pb
from memory_service import __version__, bank_rows, convert
from memory_service.bank import Banks
from memory_service.domain import Bank, IndexStats
from memory_service.metrics import Metrics
from memory_service.settings import Settings

_PAGE = 1000


class Stats(Collector):
    """Reads; blocks; for storage threads and the thread of `/metrics`."""

    def __init__(self, banks: Banks, settings: Settings, metrics: Metrics) -> None:
        self._banks = banks
        self._settings = settings
        self._registry = metrics.registry
        self._started = banks.records.clock.now_us()
        self._registry.register(self)

    def answer(self, names: Sequence[str], most_bytes: int) -> pb.GetStatsResponse:
        """Of the banks of these names, or all; of as many as fit in `most_bytes`. Errors: BANK_NOT_FOUND."""
        answer = pb.GetStatsResponse(
            version=__version__,
            store_id=self._banks.records.store_id,
            start_time=convert.timestamp(self._started),
            resident_bytes=_resident_bytes(),
            free_bytes=self._free_bytes(),
            samples=[
                pb.MetricSample(name=sample.name, labels=sample.labels, value=sample.value)
                for sample in self._registry.samples()
            ],
        )
        left = most_bytes - answer.ByteSize()
        for bank in map(self._banks.get, names) if names else self._all():
            stats = pb.BankStats(bank=convert.bank_message(bank), index=_index_message(self._banks.indexes.stats(bank)))
            left -= stats.ByteSize() + 8
            if left < 0:
                break
            answer.banks.append(stats)
        return answer

    def collect(self) -> Iterable[Metric]:
        """Gauges over all banks."""
        with self._banks.records.read() as connection:
            banks, chunks, tokens, size = bank_rows.totals(connection)
        loaded = [index for index in map(self._banks.indexes.stats, self._banks.known()) if index.loaded]
        info = GaugeMetricFamily("kvbank_info", "1, with what this server is.", labels=["version", "durability"])
        info.add_metric([__version__, self._settings.durability], 1)
        yield info
        for name, text, value in (
            ("kvbank_banks", "Banks.", banks),
            ("kvbank_chunks", "Live chunks.", chunks),
            ("kvbank_stored_tokens", "Tokens of live chunks, after compression.", tokens),
            ("kvbank_stored_bytes", "Payload bytes of live chunks.", size),
            ("kvbank_evictions_stalled", "Banks whose eviction cannot be written.", self._banks.stalled_evictions),
            ("kvbank_disk_free_bytes", "Free on the disk that holds the data folder.", self._free_bytes()),
            ("kvbank_index_banks", "Banks whose index is in memory.", len(loaded)),
            ("kvbank_index_segments", "Segments of indexes in memory.", sum(index.segments for index in loaded)),
            ("kvbank_index_vectors", "Vectors in memory, removed ones too.", sum(index.vectors for index in loaded)),
            ("kvbank_index_tombstones", "Removed, and not yet compacted away.", sum(i.tombstones for i in loaded)),
            ("kvbank_index_bytes", "Memory of the indexes.", sum(index.memory_bytes for index in loaded)),
        ):
            yield GaugeMetricFamily(name, text, value=value)

    def _all(self) -> Iterator[Bank]:
        name = ""
        while page := self._banks.after(name, _PAGE):
            yield from page
            name = page[-1].name

    def _free_bytes(self) -> int:
        stat = os.statvfs(self._settings.data)
        return stat.f_bavail * stat.f_frsize


def _index_message(stats: IndexStats) -> pb.IndexStats:
    return pb.IndexStats(
        kind=convert.index_number(stats.kind),
        loaded=stats.loaded,
        vectors=stats.vectors,
        tombstones=stats.tombstones,
        memory_bytes=stats.memory_bytes,
        recall=stats.recall,
    )


def _resident_bytes() -> int:
    """Of this process; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0
