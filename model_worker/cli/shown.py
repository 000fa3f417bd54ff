"""A command shows its report here: one JSON document, or tables and lines; and, where one is wanted, a picture.

Every command measures first and shows afterwards, so no output is interleaved with progress bars.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbank.console.output import print_json, print_line
from kvbank.console.table import Column, print_table

if TYPE_CHECKING:
    from model_worker.evaluate.plain_table import PlainTable

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Pictures = dict[str, str]


@dataclass(frozen=True, slots=True)
class Table:
    """A table for people; caption stands below it, in one line or several."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    title: str | None = None
    caption: str | None = None


def tables_of(made: "Iterable[PlainTable]", *lines: str) -> list[Table | str]:
    """Return tables of an evaluation as tables for people, and `lines` below them."""
    tables: list[Table | str] = [
        Table([Column(own.columns[0], "name"), *map(Column, own.columns[1:])], own.rows, own.title, own.caption or None)
        for own in made
    ]
    return [*tables, *lines]


@dataclass(frozen=True, slots=True)
class Shown:
    """A report in the forms that a command can show.

    document: what `--json` prints. parts: tables, and lines between them. draw: makes the pictures of the report, SVG
    by file name; None for a report that has none.
    """

    document: Any
    parts: Iterable[Table | str]
    draw: Callable[[], Pictures] | None = None


def show(report: Shown, *, as_json: bool, plot: Path | None = None) -> None:
    """Write the picture where one is wanted, then print the report as JSON or as tables.

    plot: the file of the only picture, or a folder for all of them.
    """
    if plot is not None and report.draw is not None:
        for name, picture in report.draw().items():
            (plot / name if plot.is_dir() else plot).write_text(picture, encoding="utf-8")
    if as_json:
        print_json(report.document)
        return
    for part in report.parts:
        if isinstance(part, Table):
            print_table(part.columns, part.rows, title=part.title, caption=part.caption)
        else:
            print_line(part)
