"""The command `kvbank serve`. Its options are made of the fields of `Settings`, so that each setting is written once,
with its bounds and its description.

They are options of typer, and not of a parser that a library makes of the model: that one's help and errors would be
unlike those of every other command, and what walks the commands (the help, completions, the tests that try odd values
for every option) would find none.
"""

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvbank.console import options
from kvbank.console.ending import USAGE, Failed
from kvbank.console.output import print_line
from memory_service import __version__
from memory_service.cli import care
from memory_service.cli.errors import told
from memory_service.cli.migrate import migrate
from memory_service.cli.store import store
from memory_service.observe import process_memory
from memory_service.settings import Settings, SettingsError, load


def register(app: typer.Typer) -> None:
    """Add the server's commands; entry point `server` of the group kvbank.commands."""
    app.command()(serve)
    app.command()(migrate)
    care.register(app)
    app.add_typer(store, name="store")


@options.from_fields(Settings.model_fields)
def serve(
    config: Annotated[Path | None, typer.Option(help="TOML file with settings, such as min_free = '1GiB'.")] = None,
    ready_file: Annotated[Path | None, typer.Option(help="Write the address here when serving.")] = None,
    **flags: Any,
) -> None:
    """Serve the banks of a data folder.

    A setting comes from its flag, else from its variable (--min-free:
    KVBANK_MIN_FREE), else from the file of --config (min_free = '1GiB'),
    else it is the default.

    Example: kvbank serve --data /var/lib/kvbank --listen 127.0.0.1:7400
    """
    try:
        settings = load({name: value for name, value in flags.items() if value is not None}, options.flag, config)
    except SettingsError as error:
        raise Failed(str(error), USAGE) from None

    def ready(address: str) -> None:
        print_line(f"kvbank {__version__} serving {settings.place} on {address}")
        sys.stdout.flush()
        if ready_file is not None:
            _write(ready_file, address)

    process_memory.begin_to_import()
    # These imports take most of a start, and `kvbank --help` can do without.
    from memory_service.api import server
    from memory_service.observe import logs

    logs.configure(settings.log_format, settings.log_level)
    with told():
        asyncio.run(server.serve(settings, ready))


def _write(ready_file: Path, address: str) -> None:
    """Write the address into a file that has it whole as soon as it is there."""
    temporary = ready_file.with_suffix(".tmp")
    temporary.write_text(address + "\n")
    temporary.rename(ready_file)
