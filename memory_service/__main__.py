"""The program that `python -m memory_service` runs: `kvbank serve` without the other commands."""

import typer

from kvbank.console import aside, ending, streams
from memory_service.cli.serve import serve

streams.prepare()
aside.listen()
app = typer.Typer(add_completion=False)
app.command()(serve)
ending.run(app)
