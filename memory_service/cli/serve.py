"""`kvbank serve`; the commands of care stand in `care.commands`."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kvbank.console.ending import USAGE, Failed
from kvbank.console.output import print_line
from memory_service import __version__
from memory_service.cli import care
from memory_service.cli.errors import told
from memory_service.settings import SettingsError, load


def _flag(metavar: str) -> Callable[[str], Any]:
    """An option of a quantity, with its help."""
    return lambda words: typer.Option(metavar=metavar, help=words)


_size, _time, _count = map(_flag, ("SIZE", "TIME", "COUNT"))


def register(app: typer.Typer) -> None:
    """Add the server's commands; entry point `server` of the group kvbank.commands."""
    app.command()(serve)
    care.register(app)


def serve(
    data: Annotated[Path | None, typer.Option(help="Data folder; made when missing. [env: KVBANK_DATA]")] = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT (port 0: any free) or unix:PATH.")] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="Allow other than loopback.")] = None,
    same_host: Annotated[
        bool | None, typer.Option("--same-host", help="Let clients of this user read and stage files; unix:PATH only.")
    ] = None,
    durability: Annotated[
        Literal["fsync", "os"] | None, typer.Option(help="os: a power cut may lose what was acknowledged last.")
    ] = None,
    migrate: Annotated[bool | None, typer.Option("--migrate", help="Upgrade an older data folder.")] = None,
    min_free: Annotated[str | None, _size("Of the disk, that writes leave free, such as 1GiB.")] = None,
    max_message_bytes: Annotated[str | None, _size("Largest message.")] = None,
    max_chunk_bytes: Annotated[str | None, _size("Largest payload of a chunk.")] = None,
    max_unacknowledged_bytes: Annotated[str | None, _size("Of a write stream.")] = None,
    max_inflight_bytes: Annotated[str | None, _size("Held in memory, of all streams together.")] = None,
    max_answer_bytes: Annotated[str | None, _size("Largest K-V of an answer.")] = None,
    max_connections: Annotated[str | None, _count("Callers that are connected.")] = None,
    max_calls: Annotated[str | None, _count("Calls under way, of all callers together.")] = None,
    max_banks: Annotated[str | None, _count("Banks of the folder.")] = None,
    max_bank_bytes: Annotated[str | None, _size("Specs and metadata of all banks.")] = None,
    storage_threads: Annotated[int | None, typer.Option(help="Threads that read and write.")] = None,
    grace: Annotated[str | None, _time("That running calls get at the end, such as 30s.")] = None,
    index_idle: Annotated[str | None, _time("After which an unused index is unloaded.")] = None,
    ivf_from: Annotated[str | None, _count("Chunks from which a bank is searched by lists.")] = None,
    reflection: Annotated[bool | None, typer.Option("--reflection", help="Tell tools which methods there are.")] = None,
    metrics_listen: Annotated[
        str | None, typer.Option(help="HOST:PORT of /metrics for Prometheus, /healthz and /readyz.")
    ] = None,
    log_format: Annotated[Literal["text", "json"] | None, typer.Option(help="How log lines look.")] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None, typer.Option(help="debug: every request too.")
    ] = None,
    ready_file: Annotated[Path | None, typer.Option(help="Write the address here when serving.")] = None,
) -> None:
    """Serve the banks of a data folder. Settings come from flags, then KVBANK_* variables, then defaults.

    Example: kvbank serve --data /var/lib/kvbank --listen 127.0.0.1:7400
    """
    flags: dict[str, Any] = {
        "data": data,
        "listen": listen,
        "insecure": insecure,
        "same_host": same_host,
        "durability": durability,
        "migrate": migrate,
        "min_free": min_free,
        "max_message_bytes": max_message_bytes,
        "max_chunk_bytes": max_chunk_bytes,
        "max_unacknowledged_bytes": max_unacknowledged_bytes,
        "max_inflight_bytes": max_inflight_bytes,
        "max_answer_bytes": max_answer_bytes,
        "max_connections": max_connections,
        "max_calls": max_calls,
        "max_banks": max_banks,
        "max_bank_bytes": max_bank_bytes,
        "storage_threads": storage_threads,
        "grace": grace,
        "index_idle": index_idle,
        "ivf_from": ivf_from,
        "reflection": reflection,
        "metrics_listen": metrics_listen,
        "log_format": log_format,
        "log_level": log_level,
    }
    try:
        settings = load(
            {name: value for name, value in flags.items() if value is not None},
            lambda name: f"--{name.replace('_', '-')}",
        )
    except SettingsError as error:
        raise Failed(str(error), USAGE) from None

    def ready(address: str) -> None:
        print_line(f"kvbank {__version__} serving {settings.data} on {address}")
        sys.stdout.flush()
        if ready_file is not None:
            temporary = ready_file.with_suffix(".tmp")
            temporary.write_text(address + "\n")
            temporary.rename(ready_file)

    # Half a second of imports that `kvbank --help` can do without.
    from memory_service.api import server
    from memory_service.observe import logs

    logs.configure(settings.log_format, settings.log_level)
    with told():
        asyncio.run(server.serve(settings, ready))
