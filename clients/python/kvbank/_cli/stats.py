"""The command `kvbank stats` shows a server and its banks at this moment; `kvbank compact` shrinks its database."""

from collections import Counter
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

import kvbank
from kvbank._cli import common
from kvbank._cli.common import AsJson, Service
from kvbank._cli.tenant import print_tenants
from kvbank.console.ending import Failed
from kvbank.console.options import spread
from kvbank.console.output import print_json, print_line
from kvbank.console.table import Column, print_table


@spread
def stats(service: Service, as_json: AsJson = False) -> None:
    """Show a memory service, what it has done since it started, and its banks.

    Example: kvbank stats --memory localhost:7400 --json
    """
    with service.connect() as client:
        found = client.stats()
    if as_json:
        print_json(asdict(found))
        return
    totals: Counter[str] = Counter()
    for sample in found.samples:
        totals[sample.name] += sample.value  # type: ignore[assignment]
    up = timedelta(seconds=found.uptime // timedelta(seconds=1))
    print_line(f"kvbank {found.version}, store {found.store_id}, up {up}")
    if totals["kvbank_insecure"]:
        print_line("insecure: others can reach it without TLS or without a key (--insecure)")
    if found.samples:
        _print_service(found, totals)
    if len(found.tenants) > 1 or any(tenant.quota != kvbank.TenantQuota() for tenant in found.tenants):
        print_tenants(found.tenants)
    if found.banks:
        of_one = len({each.tenant for each in found.banks}) == 1
        print_table(_COLUMNS, [(each.bank.name if of_one else _title(each), *_figures(each)) for each in found.banks])


def _print_service(found: "kvbank.Stats", totals: Counter[str]) -> None:
    """Print the figures of the whole service, which an operator gets. totals: the samples, added up by name."""
    print_line(f"memory {common.size(found.resident_bytes)}, {common.size(found.free_bytes)} free on its disk")
    free = f" ({common.size(found.database_free_bytes)} of it free)" if found.database_free_bytes else ""
    indexes = common.size(found.index_bytes)
    print_line(f"on the disk: database {common.size(found.database_bytes)}{free}, indexes {indexes}")
    print(
        f"{totals['kvbank_request_seconds_count']:,.0f} requests, {totals['kvbank_errors_total']:,.0f} of them failed; "
        f"payloads {common.size(totals['kvbank_payload_received_bytes_total'])} in, "
        f"{common.size(totals['kvbank_payload_sent_bytes_total'])} out; "
        f"{totals['kvbank_checksum_failures_total']:,.0f} checksum failures"
    )


_PLACE = typer.Argument(metavar="DATA", help="A data folder that no server serves, instead of --memory.")


@spread
def compact(service: Service, data: Annotated[str | None, _PLACE] = None, as_json: AsJson = False) -> None:
    """Give back to the disk what deleted chunks have left free in the database of a service or a folder.

    Example: kvbank compact /var/lib/kvbank
    """
    # A folder that is not there would be made.
    if data is not None and not (Path(data) / "metadata.db").is_file():
        raise Failed(f"{data} is no data folder of kvbank: it has no metadata.db")
    with (service if data is None else Service(data, service.api_key)).connect() as client:
        done = client.compact()
    if as_json:
        print_json(asdict(done))
        return
    print_line(f"database {common.size(done.database_bytes_before)} before, {common.size(done.database_bytes)} now")


# The tenant whose banks need not be told from those of others.
_DEFAULT = "default"
_COLUMNS = (
    Column("bank", "name"),
    *map(Column, ("chunks", "tokens", "bytes")),
    *(Column(title, "word") for title in ("capacity", "index")),
    *map(Column, ("vectors", "memory")),
)


def _title(found: "kvbank.BankStats") -> str:
    return found.bank.name if found.tenant == _DEFAULT else f"{found.tenant}/{found.bank.name}"


def _figures(found: "kvbank.BankStats") -> tuple[str, ...]:
    bank, index = found.bank, found.index
    return (
        f"{bank.usage.chunks:,}",
        f"{bank.usage.tokens:,}",
        common.size(bank.usage.bytes),
        common.capacity(bank),
        common.index(index),
        f"{index.vectors:,}" if index.loaded else "-",
        common.size(index.memory_bytes) if index.loaded else "-",
    )
