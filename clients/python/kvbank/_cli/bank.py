"""The commands of `kvbank bank` look at banks, make them, change and delete them."""

import re
from dataclasses import asdict
from itertools import islice
from typing import Annotated

import typer

import kvbank
from kvbank._cli import common, parse
from kvbank._cli.bank_options import LARGEST, Settings, Specs
from kvbank._cli.common import AsJson, Name, Service
from kvbank._cli.trace import trace
from kvbank.console.ending import say
from kvbank.console.options import spread
from kvbank.console.output import print_json, print_line, printable
from kvbank.console.table import Column, print_table

_BANKS = (
    Column("name", "name"),
    *map(Column, ("chunks", "tokens", "bytes")),
    *(Column(title, "word") for title in ("capacity", "policy", "expiry", "reader")),
)
_EVICTIONS = (
    Column("chunk", "word"),
    Column("reason", "word"),
    *map(Column, ("retrieved", "tokens")),
    *(Column(title, "word") for title in ("written", "went")),
)

# The names of banks that sessions have made, and sessions of earlier versions.
_OF_SESSIONS = re.compile(r"session-(?:[0-9a-f]{16}|.+-[0-9a-f]{8})")

app = typer.Typer(no_args_is_help=True, help="Look at banks, make, change and delete them.")


@app.command("ls")
@spread
def list_banks(
    service: Service,
    orphans: Annotated[
        bool,
        typer.Option(
            "--orphans",
            help="Only banks that are named as a session's, and that no session of the service has: those of sessions "
            "of earlier versions, too.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the banks of a memory service.

    Example: kvbank bank ls --memory ./memory
    """
    with service.connect() as client:
        banks = list(client.list_banks())
        if orphans:
            banks = [found for found in banks if _OF_SESSIONS.fullmatch(found.name)]
            used = {name for session in client.sessions.list() for name in (session.bank, *session.reads)}
            banks = [found for found in banks if found.name not in used]
    if as_json:
        print_json([asdict(found) for found in banks])
        return
    rows = (
        (
            found.name,
            f"{found.usage.chunks:,}",
            f"{found.usage.tokens:,}",
            common.size(found.usage.bytes),
            common.capacity(found),
            found.policy.kind,
            common.expiry(found),
            common.reader(found),
        )
        for found in banks
    )
    print_table(_BANKS, rows)


@app.command("show")
@spread
def show_bank(name: Name, service: Service, as_json: AsJson = False) -> None:
    """Show the specs, bounds, policy, usage and index of a bank.

    Example: kvbank bank show notes --json
    """
    with service.connect() as client:
        (found,) = client.stats([name]).banks
    if as_json:
        print_json({**asdict(found.bank), "index_state": asdict(found.index)})
        return
    _print_bank(found.bank)
    index = found.index
    _line("index", f"{found.bank.index}; now {common.index(index)}")
    if index.loaded:
        removed = f", {index.tombstones:,} of them removed" if index.tombstones else ""
        _line("", f"{index.vectors:,} vectors{removed}, {common.size(index.memory_bytes)}")


@app.command("create")
@spread
def create_bank(name: Name, specs: Specs, settings: Settings, service: Service, as_json: AsJson = False) -> None:
    """Make a bank for other producers than workers, which make their own.

    Example: kvbank bank create notes --embedder my-embedder --dimension 384 --capacity chunks=10k --ttl 30d
    """
    kv, options = specs.kv(), settings.given()
    with service.connect() as client:
        made = client.create_bank(name, kv=kv, embedding=specs.embedding(), **options)
    _answer(made, as_json)


@app.command("update")
@spread
def update_bank(name: Name, settings: Settings, service: Service, as_json: AsJson = False) -> None:
    """Change the bounds, policy, expiry, index or metadata (all of them) of a bank; what is not given stays.

    Example: kvbank bank update notes --quota bytes=2GiB --policy lru
    """
    options = settings.given()
    if not options:
        raise typer.BadParameter("nothing to change")
    with service.connect() as client:
        changed = client.update_bank(name, **options)
    _answer(changed, as_json)


@app.command("rm")
@spread
def remove_bank(
    name: Name,
    service: Service,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete a bank and all its chunks.

    Example: kvbank bank rm notes --yes
    """
    with service.connect() as client:
        chunks = client.get_bank(name).usage.chunks
        if not yes:
            typer.confirm(f"Delete bank {printable(name)!r} and its {chunks} chunks?", abort=True, err=True)
        client.delete_bank(name)
    if as_json:
        print_json({"deleted": name, "chunks": chunks})
    else:
        print_line(f"deleted {name}, {chunks} chunks")


@app.command("evictions")
@spread
def evictions(
    name: Name,
    service: Service,
    explain: Annotated[bool, typer.Option("--explain", help="What would go next, instead of what went.")] = False,
    need: Annotated[
        int, typer.Option(min=1, max=2**63 - 1, help="With --explain: room wanted, in the capacity's unit.")
    ] = 1,
    limit: Annotated[int, typer.Option(min=1, max=LARGEST, help="Show at most so many.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Show which chunks went, newest first, and why; or which would go next, in order.

    Example: kvbank bank evictions notes --explain --need 100
    """
    with service.connect() as client:
        if explain:
            plan = client.explain_eviction(name, need)
            shown, why = plan[:limit], plan.explanation
        else:
            shown, why = list(islice(client.list_evictions(name), limit)), ""
    if as_json:
        print_json([asdict(eviction) for eviction in shown])
        if why:
            say(why)
        return
    if not shown:
        nothing = f"nothing can go: {why}" if why else "nothing would go"
        print_line(nothing if explain else "nothing went")
        return
    if why:
        print_line(why)
    rows = (
        (
            str(eviction.chunk_id),
            eviction.reason,
            f"{eviction.retrieval_count:,}",
            f"{eviction.stored_length:,}",
            common.moment(eviction.create_time),
            common.moment(eviction.evict_time) if eviction.evict_time else "not yet",
        )
        for eviction in shown
    )
    print_table(_EVICTIONS, rows)


app.command("trace")(trace)


def _answer(bank: "kvbank.Bank", as_json: bool) -> None:
    if as_json:
        print_json(asdict(bank))
    else:
        _print_bank(bank)


def _print_bank(bank: "kvbank.Bank") -> None:
    usage, policy = bank.usage, bank.policy
    _line("name", bank.name)
    _line("uid", bank.uid)
    _line("created", common.moment(bank.create_time))
    if bank.kv:
        _line("K-V", f"layers {list(bank.kv.layers)}, {bank.kv.kv_heads} heads x {bank.kv.head_dim}, {bank.kv.dtype}")
        if bank.kv.hidden_size:
            _line("", f"soft tokens of {bank.kv.hidden_size}")
        _line("reader", bank.kv.reader_digest)
        for part, digest in bank.kv.reader_parts.items():
            _line("", f"{part} {digest}")
    else:
        _line("K-V", "none, vectors only")
    _line("embedder", f"{bank.embedding.embedder_digest}, dimension {bank.embedding.dimension}")
    _line("capacity", common.capacity(bank))
    _line("quota", common.bounds(bank.quota, "none"))
    figures = {
        "frequency": f" {policy.lower}/{policy.upper}, target {policy.target} %",
        "lru": f", target {policy.target} %",
    }
    _line("policy", policy.kind + figures.get(policy.kind, ""))
    _line("expiry", common.expiry(bank))
    _line("usage", f"{usage.chunks:,} chunks, {usage.tokens:,} tokens, {common.size(usage.bytes)}")
    _line("written", f"{usage.chunks_written:,} chunks")
    gone = ("evicted", "expired", "deleted", "quarantined")
    _line("gone", ", ".join(f"{getattr(usage, f'chunks_{how}'):,} {how}" for how in gone))
    for key, value in bank.metadata.items():
        _line("metadata", f"{key} = {parse.written(value)}")


def _line(label: str, text: str) -> None:
    print_line(f"{label:10} {text}".rstrip())
