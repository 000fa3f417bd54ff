"""The commands of the SDK, one file a subject."""

import typer

from kvbank._cli import bank, chunk, key, session, tenant
from kvbank._cli.mcp import mcp
from kvbank._cli.ping import ping
from kvbank._cli.reembed import reembed
from kvbank._cli.remember import remember
from kvbank._cli.search import search
from kvbank._cli.stats import compact, stats
from kvbank._cli.top import top


def register(app: typer.Typer) -> None:
    """Add the SDK's commands to the `kvbank` command line."""
    app.command()(ping)
    app.add_typer(bank.app, name="bank")
    app.add_typer(chunk.app, name="chunk")
    app.command()(remember)
    app.command()(search)
    app.command()(reembed)
    app.command()(mcp)
    app.add_typer(key.app, name="key")
    app.add_typer(tenant.app, name="tenant")
    app.add_typer(session.app, name="session")
    app.command()(stats)
    app.command()(compact)
    app.command()(top)
