"""The commands of `kvbank tenant` make, list, bound and delete the tenants of a memory service."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

import kvbank
from kvbank._cli import common, parse
from kvbank._cli.common import AsJson, Service
from kvbank._cli.receipts import tell_receipt
from kvbank.console.options import spread
from kvbank.console.output import print_json, print_line, printable
from kvbank.console.table import Column, print_table

_TENANTS = (Column("name", "name"), *map(Column, ("banks", "chunks", "tokens", "bytes")), Column("quota", "word"))
_QUOTA = "Some of banks=N,chunks=N,tokens=N,bytes=N (10k, 2GiB), calls=N (a second), or none."

Name = Annotated[str, typer.Argument(help="Name of the tenant.")]

app = typer.Typer(no_args_is_help=True, help="Make, list, bound and delete tenants, which see nothing of each other.")


@app.command("create")
@spread
def create_tenant(
    name: Name,
    service: Service,
    quota: Annotated[str, typer.Option("--quota", help=_QUOTA)] = "none",
    as_json: AsJson = False,
) -> None:
    """Make a tenant, which has no banks and no keys yet; `kvbank key create --tenant` makes the keys.

    Example: kvbank tenant create research --quota banks=20,bytes=50GiB,calls=200
    """
    bounds = parse.tenant_quota(quota)
    with service.connect() as client:
        _answer(client.access.create_tenant(name, quota=bounds), as_json)


@app.command("ls")
@spread
def list_tenants(service: Service, as_json: AsJson = False) -> None:
    """List the tenants with what they hold and may hold.

    Example: kvbank tenant ls --json
    """
    with service.connect() as client:
        tenants = list(client.access.list_tenants())
    if as_json:
        print_json([asdict(tenant) for tenant in tenants])
        return
    print_tenants(tenants)


def print_tenants(tenants: "Sequence[kvbank.Tenant]") -> None:
    """Print a table of tenants with what they hold and may hold."""
    print_table(_TENANTS, map(_row, tenants))


@app.command("quota")
@spread
def set_quota(
    name: Name,
    quota: Annotated[str, typer.Argument(metavar="QUOTA", help=_QUOTA)],
    service: Service,
    as_json: AsJson = False,
) -> None:
    """Replace the whole quota of a tenant. Below what the tenant holds, its writes are refused until it holds less.

    Example: kvbank tenant quota research banks=20,bytes=100GiB
    """
    bounds = parse.tenant_quota(quota)
    with service.connect() as client:
        _answer(client.access.set_tenant_quota(name, bounds), as_json)


@app.command("rm")
@spread
def remove_tenant(
    name: Name,
    service: Service,
    force: Annotated[
        bool, typer.Option("--force", help="Forget its banks and sessions too, for good, and show the receipt.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete a tenant with its keys; one that has banks or sessions by --force alone.

    Example: kvbank tenant rm research --force
    """
    with_banks = ", its keys and all its banks and sessions for good" if force else " and its keys"
    if not yes:
        typer.confirm(f"Delete tenant {printable(name)!r}{with_banks}?", abort=True, err=True)
    with service.connect() as client:
        if force:
            tell_receipt(client.access.forget_tenant(name), as_json)
            return
        banks = client.access.delete_tenant(name)
    if as_json:
        print_json({"deleted": name, "banks": banks})
    else:
        print_line(f"deleted {name}, {banks} banks")


def _answer(tenant: "kvbank.Tenant", as_json: bool) -> None:
    if as_json:
        print_json(asdict(tenant))
    else:
        print_tenants([tenant])


def _row(tenant: "kvbank.Tenant") -> tuple[str, ...]:
    usage = tenant.usage
    counts = (f"{count:,}" for count in (usage.banks, usage.chunks, usage.tokens))
    return (tenant.name, *counts, common.size(usage.bytes), _bounds(tenant.quota))


def _bounds(quota: "kvbank.TenantQuota") -> str:
    """Write a quota for people, such as "banks 20, bytes 50.0 GiB"."""
    given = {unit: bound for unit, bound in asdict(quota).items() if bound is not None}
    written = (f"{unit} {common.size(bound) if unit == 'bytes' else f'{bound:,}'}" for unit, bound in given.items())
    return ", ".join(written) or "none"
