"""The command `python -m benchmarks.growth`: it measures the points that its log lacks, and prints a table an axis."""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.bench import Bench
from benchmarks.growth.axes import AXES
from benchmarks.growth.log import Log, Point
from benchmarks.growth.slopes import table

LOG = Path("build/growth.jsonl")
_WIDTH = 200  # columns of the tables where the output is not a terminal


def main(
    axis: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS", help=f"Go along this axis only; may be repeated. One of: {', '.join(AXES)}."),
    ] = None,
    most: Annotated[int | None, typer.Option(min=1, help="Leave larger sizes out.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="How often each call is made.")] = None,
    log: Annotated[Path, typer.Option(help="File of the points, to which new ones are added.")] = LOG,
    anew: Annotated[bool, typer.Option("--anew", help="Measure what the log has, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the points instead of tables.")] = False,
) -> None:
    """Show where cost grows: calls, memory and disk by the size of one thing at a time."""
    if unknown := set(axis or ()) - set(AXES):
        raise typer.BadParameter(f"no such axis: {', '.join(sorted(unknown))}", param_hint="--axis")
    log.parent.mkdir(parents=True, exist_ok=True)
    points, names = Log(log), [name for name in AXES if name in (axis or AXES)]
    console = Console(stderr=as_json)
    if not console.is_terminal:
        console = Console(stderr=as_json, width=_WIDTH)
    # The scratch folder is not made in /tmp, which may be memory: writes are synced.
    with (
        tempfile.TemporaryDirectory(prefix="growth-", dir=log.parent.absolute()) as scratch,
        console.status("start") as status,
    ):
        bench = Bench(Path(scratch), frozenset(names), rounds=rounds, say=status.update)
        for name in names:
            for size in _sizes(name, most):
                if anew or (name, size) not in points:
                    points.add(_measured(bench, name, size))
                    console.print(f"{name} {size:,}: done, load {os.getloadavg()[0]:.1f}")
    if as_json:
        print(json.dumps([asdict(point) for name in names for point in points.of(name)], indent=2))
        return
    for name in names:
        console.print(_shown(AXES[name].about, points.of(name)))


def _sizes(name: str, most: int | None) -> list[int]:
    return [size for size in AXES[name].sizes if most is None or size <= most]


def _measured(bench: Bench, name: str, size: int) -> Point:
    bench.say(f"{name} {size:,}: fill")
    folder = bench.scratch(name)
    try:
        figures = AXES[name].measure(bench, folder, size)
    finally:
        bench.clear(folder)
    return Point(name, size, figures, os.getloadavg()[0], datetime.now(UTC).isoformat(timespec="minutes"))


def _shown(about: str, points: Sequence[Point]) -> Table:
    made = Table(title=about, title_justify="left")
    if points:
        head, *rows = table(about, points)
        for column in head:
            made.add_column(column, justify="right")
        for row in rows:
            made.add_row(*map(escape, row))
    return made


if __name__ == "__main__":
    typer.run(main)
