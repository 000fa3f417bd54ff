"""Tables for people. In a terminal names are cut and prose is wrapped, so that figures stay whole; in a pipe all is."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvbank._cli.output import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_GAP = 2
# Cells that a column keeps however narrow the terminal is: enough of a name to know it by.
_LEAST = {"name": 8, "prose": 16}


@dataclass(frozen=True, slots=True)
class Column:
    """A column and what its cells are.

    "figure": to the right, always whole. "word": to the left, always whole. "name": to the left, cut with an ellipsis
    where the terminal is too narrow. "prose": to the left, wrapped there.
    """

    title: str
    kind: Literal["figure", "word", "name", "prose"] = "figure"


def print_table(
    columns: Sequence[Column], rows: Iterable[Sequence[str]], *, title: str | None = None, caption: str | None = None
) -> None:
    """Print rows on stdout, with a line above and one below; every cell is made printable."""
    if title is not None:
        print(printable(title))
    made = table(columns, rows, terminal_width())
    # As wide as the table: rich would cut figures of one that is wider than the terminal.
    console(sum(column.width or 0 for column in made.columns) + _GAP * len(made.columns)).print(made)
    if caption is not None:
        print(printable(caption, keep="\n"))


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]], width: int | None = None) -> "Table":
    """Return the rows as a table for at most `width` cells, where figures leave room for that; None: all is whole."""
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    cells = [[printable(cell) for cell in row] for row in rows]
    natural = [
        max(map(cell_len, [column.title, *(row[index] for row in cells)])) for index, column in enumerate(columns)
    ]
    made = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for column, own in zip(columns, _fitted(columns, natural, width), strict=True):
        made.add_column(
            Text(column.title),
            width=own,
            justify="right" if column.kind == "figure" else "left",
            no_wrap=column.kind != "prose",
            overflow="fold" if column.kind == "prose" else "ellipsis",
        )
    for row in cells:
        made.add_row(*map(Text, row))
    return made


def _fitted(columns: Sequence[Column], natural: Sequence[int], width: int | None) -> list[int]:
    """The width of each column: the widest that may shrink shrinks first, down to its least."""
    widths = list(natural)
    if width is None:
        return widths
    excess = sum(widths) + _GAP * (len(widths) - 1) - width
    while excess > 0:
        shrinking = [i for i, column in enumerate(columns) if widths[i] > _LEAST.get(column.kind, widths[i])]
        if not shrinking:
            break
        widest = max(shrinking, key=lambda index: widths[index])
        widths[widest] -= 1
        excess -= 1
    return widths


def terminal_width() -> int | None:
    """Return the cells of a line of the terminal; None where stdout is no terminal."""
    return console().width if sys.stdout.isatty() else None


def console(width: int | None = None) -> "Console":
    """Return a console on stdout that takes text as it is: no markup, no emoji codes, no highlighting."""
    from rich.console import Console

    return Console(width=width, highlight=False, markup=False, emoji=False)
