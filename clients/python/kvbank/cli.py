"""The command line: `kvbank`. The server and the worker add their commands through entry points.

An entry point of the group "kvbank.commands" names `register(app: typer.Typer) -> None`. Its module must be cheap to
import, because every command imports it; what is heavy it imports inside its commands. Errors of this package end in
one line on stderr and exit code 1; usage errors exit with 2, Ctrl-C with 130.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, NoReturn

import typer

import kvbank
from kvbank._cli import bank, common
from kvbank._cli.common import DEFAULT_ADDRESS, AsJson
from kvbank._cli.stats import stats
from kvbank._cli.top import top

# Commands that show up, and name what they need, when their part is not installed.
_COMMANDS = {
    "server": ("serve", "check", "repair", "backup", "restore"),
    "worker": ("demo", "chat", "session", "layers", "compressors", "homer", "eval", "train"),
}
_EXTRA_OF_MODULE = {
    **dict.fromkeys(("alembic", "faiss", "grpc_health", "grpc_reflection", "sqlalchemy"), "server"),
    **dict.fromkeys(("prometheus_client", "pydantic_settings", "memory_service"), "server"),
    **dict.fromkeys(("torch", "transformers", "tokenizers", "safetensors", "platformdirs", "model_worker"), "worker"),
}


def main() -> None:
    """Run the command line; the console script."""
    try:
        application()()
    except kvbank.KVBankError as error:
        _fail(str(error))
    except UnicodeEncodeError as error:
        _fail(f"{error.object[error.start : error.end]!r} cannot be said in {error.encoding}")
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
    app.add_typer(bank.app, name="bank")
    app.command()(stats)
    app.command()(top)
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
    with common.connect(target) as client:
        client.server_info()
        start = time.perf_counter()
        info = client.server_info()
        milliseconds = (time.perf_counter() - start) * 1000
    if as_json:
        common.print_json({"address": target, "milliseconds": round(milliseconds, 3), **asdict(info)})
    else:
        print(f"{target}: kvbank {info.version}, store {info.store_id}, {info.durability}, {milliseconds:.2f} ms")
