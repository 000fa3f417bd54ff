"""All commands of the installed parts are put together here, from entry points.

An entry point of the `GROUP` names `register(app: typer.Typer) -> None`. Its module must be cheap to import, because
every command of the part imports it; what is heavy it imports inside its commands. A command imports no other part than
its own.
"""

from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated

import typer

import kvbank
from kvbank.console.ending import Failed, missing

GROUP = "kvbank.commands"
# The commands of each part. They show up, and name what they need, when the part is not installed.
_COMMANDS = {
    "sdk": (
        *("ping", "bank", "chunk", "remember", "search", "reembed", "mcp", "key", "tenant", "session"),
        *("stats", "compact", "top"),
    ),
    "server": ("serve", "migrate", "check", "repair", "backup", "restore", "store"),
    "worker": (
        "demo",
        "chat",
        "worker",
        "reencode",
        "model",
        "layers",
        "compressors",
        "homer",
        "icae",
        "eval",
        "train",
    ),
}
_TAKES_ANYTHING = {"allow_extra_args": True, "ignore_unknown_options": True}


def application(parts: Iterable[EntryPoint] | None = None, arguments: Sequence[str] = ()) -> typer.Typer:
    """Return the application with the commands of the SDK and of all parts.

    parts: entry points of the group "kvbank.commands"; by default those of the installed packages. arguments: those
    that it is to be run with; where they begin with a command, only the part that has it is there.
    """
    app = typer.Typer(
        name="kvbank",
        help="A memory that language models attend to.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.callback()(_root)
    called = next((word for word in arguments if word != "--debug"), "")
    owner = next((part for part, names in _COMMANDS.items() if called in names), None)
    if owner in (None, "sdk"):
        from kvbank._cli import commands

        commands.register(app)
    if owner != "sdk":
        for part in entry_points(group=GROUP) if parts is None else parts:
            if owner in (None, part.name):
                _register(app, part)
    return app


def _register(app: typer.Typer, entry_point: EntryPoint) -> None:
    part = typer.Typer()
    try:
        entry_point.load()(part)
    except ModuleNotFoundError as error:
        part = typer.Typer()
        for name in _COMMANDS.get(entry_point.name, ()):
            unavailable = _unavailable(missing(error.name, entry_point.name))
            text = f"Needs kvbank[{entry_point.name}]."
            part.command(name, help=text, context_settings=_TAKES_ANYTHING, add_help_option=False)(unavailable)
    app.add_typer(part)


def _unavailable(reason: str) -> Callable[[], None]:
    def command() -> None:
        raise Failed(reason)

    return command


def _print_version(wanted: bool) -> None:
    if wanted:
        print(kvbank.__version__)
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, as KVBANK_DEBUG=1 does.")
    ] = False,
) -> None:
    pass
