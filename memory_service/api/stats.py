"""The figures of what the service holds at this moment: for GetStats, and for a scrape beside what `metrics` has
counted."""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvbank.v1 import access_pb2
from kvbank.v1 import service_pb2 as pb
from memory_service import __version__
from memory_service.api.messages import convert
from memory_service.api.patience import Patience
from memory_service.domain import validate
from memory_service.domain.access import Caller
from memory_service.domain.errors import ServiceError, refusal_for
from memory_service.domain.limits import Limits
from memory_service.domain.model import Bank, IndexKind, IndexStats
from memory_service.domain.tenants import Tenant
from memory_service.observe.metrics import Metrics
from memory_service.operations.banks import Banks
from memory_service.settings import Settings

# Stands between tenant and name in the token of a page of all banks; no name has it.
_BETWEEN = "\n"


class Stats(Collector):
    """Reads the figures of this moment; this blocks, and is done in storage threads and the thread of `/metrics`."""

    def __init__(self, banks: Banks, settings: Settings, metrics: Metrics, limits: Limits) -> None:
        self._banks = banks
        self._stored = Patience(self._held, limits.figures_s, "kvbank-figures")
        self._settings = settings
        self._registry = metrics.registry
        self._started = banks.now_us()
        self._registry.register(self)

    def of_banks(self, caller: Caller, names: Sequence[str]) -> pb.GetStatsResponse:
        """Make the statistics of the banks of these names, of the caller's tenant. Errors: BANK_NOT_FOUND,
        INVALID_FIELD."""
        validate.names("banks", names)
        return self._answer(caller, [self._banks.get(caller.tenant, name) for name in names], first=True)

    def page(self, caller: Caller, token: str, size: int) -> pb.GetStatsResponse:
        """Make the statistics of a page of the banks that the caller sees, which begins behind the token of the page
        before: the banks of its tenant, or all for an operator."""
        if caller.may("operate"):
            tenant, _, name = token.partition(_BETWEEN)
            banks, more = self._banks.after_of_all(tenant, name, size)
        else:
            banks, more = self._banks.after(caller, token, size)
        answer = self._answer(caller, banks, first=not token)
        if more:
            last = banks[-1]
            answer.next_page_token = f"{last.tenant}{_BETWEEN}{last.name}" if caller.may("operate") else last.name
        return answer

    def _answer(self, caller: Caller, banks: Sequence[Bank], *, first: bool) -> pb.GetStatsResponse:
        """Make the answer for a caller. first: whether it is the first page, which has more than the banks."""
        answer = pb.GetStatsResponse(
            version=__version__,
            store_id=self._banks.store_id,
            start_time=convert.timestamp(self._started),
            uptime=convert.duration(self._banks.now_us() - self._started),
            banks=[self._stats_of(caller, bank) for bank in banks],
            tenants=self._tenants(caller) if first else (),
        )
        if caller.may("operate"):
            self._add_whole(answer, samples=first)
        return answer

    def _add_whole(self, answer: pb.GetStatsResponse, *, samples: bool) -> None:
        """Add the figures of the whole service, from which one tenant would learn of another."""
        database = self._banks.sizes()
        answer.resident_bytes, answer.free_bytes = _resident_bytes(), self._banks.free_bytes() or 0
        answer.database_bytes, answer.database_free_bytes = database.taken, database.free
        answer.index_bytes = _bytes_below(self._banks.engine.cache)
        for sample in self._registry.samples() if samples else ():
            answer.samples.add(name=sample.name, labels=sample.labels, value=sample.value)

    def _tenants(self, caller: Caller) -> list[access_pb2.Tenant]:
        """Make what is said of the tenants that the caller sees: its own, which may be gone, or all."""
        access, seen = self._banks.engine.access, list[Tenant]()
        if caller.may("operate"):
            seen = access.tenants()
        else:
            with suppress(ServiceError):
                seen = [access.tenant(caller.tenant)]
        return [convert.tenant_message(tenant, access.tenant_usage(tenant.name)) for tenant in seen]

    def _stats_of(self, caller: Caller, bank: Bank) -> pb.BankStats:
        shown = bank if bank.tenant == caller.tenant and caller.may("read") else replace(bank, metadata={})
        index = _index_message(self._banks.index_stats(bank))
        return pb.BankStats(bank=convert.bank_message(shown), index=index, tenant=bank.tenant)

    def collect(self) -> Iterable[Metric]:
        """Yield the gauges over all banks. Those that the storage has to be asked for are left out while it fails or is
        silent, so that the others say what is the matter."""
        info = GaugeMetricFamily(
            "kvbank_info", "1, with what this server is.", labels=["version", "durability", "store"]
        )
        info.add_metric([__version__, self._settings.durability, self._banks.store_id], 1)
        yield info
        try:
            held = self._stored.answer() or ()
        except Exception as error:
            if refusal_for(error) is None:
                raise
            return
        for name, text, value in held:
            yield GaugeMetricFamily(name, text, value=value)

    def _held(self) -> Sequence[tuple[str, str, float | None]]:
        """Return name, help and value of each figure of what is stored, and of the indexes. Errors: those of the
        storage."""
        totals, sessions = self._banks.totals(), self._banks.engine.sessions.totals()
        loaded = [index for index in map(self._banks.index_stats, self._banks.known()) if index.loaded]
        return (
            ("kvbank_banks", "Banks.", totals.banks),
            ("kvbank_chunks", "Live chunks.", totals.chunks),
            ("kvbank_stored_tokens", "Tokens of live chunks, after compression.", totals.tokens),
            ("kvbank_stored_bytes", "Bytes of live chunks: K-V, vectors, texts, metadata.", totals.bytes),
            ("kvbank_sessions", "Sessions.", sessions.sessions),
            ("kvbank_sessions_leased", "Sessions that a worker has.", sessions.leased),
            ("kvbank_turn_bytes", "Bytes of the turns of sessions.", sessions.bytes),
            ("kvbank_database_bytes", "Bytes of the database with its log.", self._banks.sizes().taken),
            ("kvbank_evictions_stalled", "Banks whose eviction cannot be written.", totals.stalled),
            ("kvbank_disk_free_bytes", "Free on the disk that holds the data folder.", self._banks.free_bytes()),
            ("kvbank_index_banks", "Banks whose index is in memory.", len(loaded)),
            ("kvbank_index_segments", "Segments of indexes in memory.", sum(index.segments for index in loaded)),
            ("kvbank_index_vectors", "Vectors in memory, removed ones too.", sum(index.vectors for index in loaded)),
            ("kvbank_index_tombstones", "Removed, and not yet compacted away.", sum(i.tombstones for i in loaded)),
            ("kvbank_index_bytes", "Memory of the indexes.", sum(index.memory_bytes for index in loaded)),
        )


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
