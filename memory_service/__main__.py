"""`python -m memory_service`: `kvbank serve` without the other commands."""

import typer

from kvbank._cli import ending, streams
from memory_service.cli import serve

streams.prepare()
app = typer.Typer(add_completion=False)
app.command()(serve)
ending.run(app)
