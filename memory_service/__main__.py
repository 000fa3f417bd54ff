"""`python -m memory_service`: `kvbank serve` without the SDK's command line."""

import typer

from memory_service.cli import serve

app = typer.Typer(add_completion=False)
app.command()(serve)
app()
