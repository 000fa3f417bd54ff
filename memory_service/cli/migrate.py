"""The command `kvbank migrate`, which upgrades data without serving them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kvbank.console import options
from kvbank.console.ending import USAGE, Failed
from kvbank.console.output import print_json, print_line
from memory_service.cli.errors import told
from memory_service.settings import Settings, SettingsError, load


@options.from_fields({"data": Settings.model_fields["data"]})
def migrate(
    config: Annotated[Path | None, typer.Option(help="TOML file with settings, of which this reads 'data'.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **flags: Any,
) -> None:
    """Upgrade a data folder or a database to the schema of this version.

    The services of a database go on meanwhile; restart each with this version
    afterwards. The service of a folder must be stopped. An empty database gets
    its tables.

    Example: kvbank migrate --data postgresql://kvbank@db.example/kvbank
    """
    try:
        settings = load({name: value for name, value in flags.items() if value is not None}, options.flag, config)
    except SettingsError as error:
        raise Failed(str(error), USAGE) from None
    from memory_service.storage.opening import upgrade

    with told():
        found, now = upgrade(settings)
    if as_json:
        print_json({"data": settings.place, "found": found, "schema": now})
    elif found == now:
        print_line(f"{settings.place} has the schema {now} already")
    else:
        print_line(f"{settings.place}: schema {now}, was {found or 'empty'}")
