"""The command `python -m benchmarks`: it runs the comparisons, prints a table and writes build/bench.json."""

import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import report
from benchmarks.bench import Bench
from benchmarks.pair import Result, Skipped

# A run of some rows has a file of its own, so that it does not replace the figures of all rows.
OUTPUT, PART = Path("build/bench.json"), Path("build/bench-part.json")
_WIDTH = 180  # columns of the table where the output is not a terminal
# Each row with the module that measures it, in the order in which they run.
ROWS = {
    "same_host_fetch": "same_host_fetch",
    "keyed_call": "keyed_call",
    "tls": "tls",
    "neighbour": "neighbour",
    "retrieve_same_host": "retrieve",
    "retrieve_network": "retrieve",
    "durable_write": "durable_write",
    "objects": "objects",
    "engines": "engines",
    "small_records": "small_records",
    "small_chunks": "small_chunks",
    "eviction": "eviction",
    "search": "search",
    "session_filter": "session_filter",
    "restart": "restart",
    "start": "start",
    "server_memory": "server_memory",
    "decode": "decode",
    "traced_decode": "traced_decode",
    "tova_decode": "tova_decode",
    "joint_decode": "joint_decode",
    "recall_ahead": "recall_ahead",
    "reading": "reading",
    "compressors": "compressors",
}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="ROW", help=f"Run this row only; may be repeated. One of: {', '.join(ROWS)}."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Floors only, smaller banks: under 3 minutes.")] = False,
    million: Annotated[
        bool, typer.Option("--million", help="Search a million vectors too, and evict from a million chunks: minutes.")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of each comparison, instead of each row's own number.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what is written to the file, instead of a table.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help=f"Write to this file. Default: {OUTPUT}, with --only {PART}.")
    ] = None,
) -> None:
    """Measure this project beside floors and peers."""
    rows = only or list(ROWS)
    out = out or (PART if only else OUTPUT)
    if unknown := set(rows) - set(ROWS):
        raise typer.BadParameter(f"no such row: {', '.join(sorted(unknown))}", param_hint="--only")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Processes that are started keep their bytecode, as those of installed packages do.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    console = Console(stderr=as_json)
    if not console.is_terminal:
        console = Console(stderr=as_json, width=_WIDTH)
    # The scratch folder is not made in /tmp, which may be memory: the disk is what is measured.
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=out.parent.absolute()) as scratch,
        console.status("start") as status,
    ):
        bench = Bench(Path(scratch), frozenset(rows), quick, rounds, million, status.update)
        results: list[Result] = []
        for name in dict.fromkeys(ROWS[row] for row in ROWS if row in rows):
            for result in import_module(f"benchmarks.{name}").run(bench):
                results.append(result)
                _write(out, results, bench)  # at once: a run that is ended costs no figures that it had
        written = _write(out, results, bench)
    if as_json:
        print(json.dumps(written, indent=2))
        return
    console.print(_table(written))
    for skipped in bench.skipped:
        console.print(f"skipped {skipped.what} in {skipped.row}: {escape(skipped.why)}")
    console.print(f"written to {out}")


def _write(out: Path, results: Sequence[Result], bench: Bench) -> dict[str, Any]:
    """Write what was measured so far, and return it."""
    written = _document(results, bench.skipped)
    out.write_text(json.dumps(written, indent=2) + "\n")
    return written


def _document(results: Sequence[Result], skipped: Sequence[Skipped]) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.platform()},
        "results": [result.as_json() for result in results],
        "skipped": [asdict(item) for item in skipped],
    }


def _cpu() -> str:
    """Return the name of the processor's model where Linux tells it, else what `platform` knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _table(document: dict[str, Any]) -> Table:
    head, *rows = report.table(document)
    table = Table(title="medians; ratio = ours / theirs", title_justify="left")
    for place, column in enumerate(head):
        table.add_column(column, justify="left" if place in report.TEXT else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


if __name__ == "__main__":
    app()
