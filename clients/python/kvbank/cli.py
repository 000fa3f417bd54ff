"""The command line: `kvbank`. The server and the worker add their commands through entry points.

An entry point of the group "kvbank.commands" names `register(app: typer.Typer) -> None`. Its module must be cheap to
import, because every command imports it; what is heavy it imports inside its commands. Errors of this package end in
one line on stderr and exit code 1; usage errors exit with 2, Ctrl-C with 130.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import kvbank

if TYPE_CHECKING:
    from kvbank import Bank, Client

DEFAULT_ADDRESS = "127.0.0.1:7400"

# Commands that show up, and name what they need, when their part is not installed.
_COMMANDS = {"server": ("serve",), "worker": ("demo", "chat", "session", "layers", "compressors")}
_EXTRA_OF_MODULE = {
    **dict.fromkeys(("alembic", "faiss", "grpc_health", "grpc_reflection", "sqlalchemy"), "server"),
    **dict.fromkeys(("pydantic_settings", "memory_service"), "server"),
    **dict.fromkeys(("torch", "transformers", "tokenizers", "safetensors", "platformdirs", "model_worker"), "worker"),
}

Memory = Annotated[
    str,
    typer.Option("--memory", "-m", envvar="KVBANK_MEMORY", help="Memory service: HOST:PORT, unix:PATH or a folder."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="Name of the bank.")]

bank = typer.Typer(no_args_is_help=True, help="Look at banks and delete them.")


def main() -> None:
    """Run the command line; the console script."""
    try:
        application()()
    except kvbank.KVBankError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF_MODULE.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _fail(_missing(error.name, extra))


def application() -> typer.Typer:
    """All commands of the installed parts."""
    app = typer.Typer(
        name="kvbank",
        help="A memory that language models attend to.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.callback()(_root)
    app.command()(ping)
    app.add_typer(bank, name="bank")
    for entry_point in entry_points(group="kvbank.commands"):
        _register(app, entry_point)
    return app


def _register(app: typer.Typer, entry_point: EntryPoint) -> None:
    part = typer.Typer()
    try:
        entry_point.load()(part)
    except ModuleNotFoundError as error:
        part = typer.Typer()
        for name in _COMMANDS.get(entry_point.name, ()):
            part.command(name, help=f"Needs kvbank[{entry_point.name}].")(_unavailable(error.name, entry_point.name))
    app.add_typer(part)


def _unavailable(module: str | None, extra: str) -> Callable[[], None]:
    def command() -> None:
        _fail(_missing(module, extra))

    return command


def _missing(module: str | None, extra: str) -> str:
    return f"module {module!r} is not installed: pip install 'kvbank[{extra}]'"


def _fail(message: str) -> NoReturn:
    line = " ".join(message.split())
    print(f"kvbank: {line}", file=sys.stderr)
    raise SystemExit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(kvbank.__version__)
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def ping(
    target: Annotated[str, typer.Argument(metavar="[HOST:PORT]", envvar="KVBANK_MEMORY")] = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Ask a memory service who it is, and how long it takes to answer."""
    with _connect(target) as client:
        client.server_info()
        start = time.perf_counter()
        info = client.server_info()
        milliseconds = (time.perf_counter() - start) * 1000
    if as_json:
        _print_json({"address": target, "milliseconds": round(milliseconds, 3), **asdict(info)})
    else:
        print(f"{target}: kvbank {info.version}, store {info.store_id}, {info.durability}, {milliseconds:.2f} ms")


@bank.command("ls")
def list_banks(memory: Memory = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """List the banks of a memory service."""
    with _connect(memory) as client:
        banks = list(client.list_banks())
    if as_json:
        _print_json([_plain(found) for found in banks])
    else:
        _print_table(banks)


@bank.command("show")
def show_bank(name: Name, memory: Memory = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Show a bank: its specs, capacity, policy and usage."""
    with _connect(memory) as client:
        found = _plain(client.get_bank(name))
    if as_json:
        _print_json(found)
        return
    for key, value in found.items():
        print(f"{key:12} {json.dumps(value) if isinstance(value, dict) else value}")


@bank.command("rm")
def remove_bank(
    name: Name,
    memory: Memory = DEFAULT_ADDRESS,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete a bank and all its chunks."""
    with _connect(memory) as client:
        chunks = client.get_bank(name).usage.chunks
        if not yes:
            typer.confirm(f"Delete bank {name!r} and its {chunks} chunks?", abort=True, err=True)
        client.delete_bank(name)
    if as_json:
        _print_json({"deleted": name, "chunks": chunks})
    else:
        print(f"deleted {name}, {chunks} chunks")


def _connect(target: str) -> "Client":
    return kvbank.connect(target, timeout=10)


def _plain(found: "Bank") -> dict[str, Any]:
    return {**asdict(found), "create_time": found.create_time.isoformat()}


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=dict))


def _print_table(banks: "list[Bank]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "chunks", "tokens", "bytes", "capacity", "policy", "reader", box=None)
    for found in banks:
        usage = found.usage
        reader = found.kv.reader_digest[:12] if found.kv else "vectors only"
        figures = (f"{usage.chunks:,}", f"{usage.tokens:,}", f"{usage.bytes:,}")
        table.add_row(found.name, *figures, _capacity(found), found.policy.kind, reader)
    Console().print(table)


def _capacity(found: "Bank") -> str:
    limits = asdict(found.capacity) if found.capacity else {}
    return next((f"{limit:,} {unit}" for unit, limit in limits.items() if limit is not None), "unbounded")
