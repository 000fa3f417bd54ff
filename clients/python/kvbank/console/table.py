"""Tables for people are printed here. In a terminal names are cut and prose is wrapped, so that figures stay whole; a
pipe gets all."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvbank.console.output import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_GAP = 2
# Cells of a name that stay however narrow the terminal is: enough to know it by.
_LEAST_OF_A_NAME = 8
# Where prose is wrapped in a pipe.
_WIDTH_OF_PROSE = 80


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table, with the kind of its cells.

    "figure": to the right, always whole. "word": to the left, always whole. "name": to the left, cut with an ellipsis
    where the terminal is too narrow. "prose": to the left, wrapped between words, in a pipe too.
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
    from rich.table import Table
    from rich.text import Text

    cells = [[printable(cell) for cell in row] for row in rows]
    columns_of_cells = [[row[index] for row in cells] for index in range(len(columns))]
    spans = [_span(column, own, width is None) for column, own in zip(columns, columns_of_cells, strict=True)]
    made = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for column, own in zip(columns, _fitted(spans, width or _WIDTH_OF_PROSE), strict=True):
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


def _span(column: Column, cells: Sequence[str], whole: bool) -> tuple[int, int]:
    """Return the least and the natural width of a column, in cells of the terminal. whole: names are not cut."""
    from rich.cells import cell_len

    texts = [column.title, *cells]
    natural = max(map(cell_len, texts))
    if column.kind == "prose":
        return max(cell_len(word) for text in texts for word in text.split() or [""]), natural
    return min(_LEAST_OF_A_NAME, natural) if column.kind == "name" and not whole else natural, natural


def _fitted(spans: Sequence[tuple[int, int]], width: int) -> list[int]:
    """Return the width of each column, so that all fit into `width` cells if that is possible.

    spans: least and natural width of each. The widest that may shrink shrinks first, down to its least.
    """
    widths = [natural for _, natural in spans]
    excess = sum(widths) + _GAP * (len(widths) - 1) - width
    while excess > 0:
        shrinking = [index for index, (least, _) in enumerate(spans) if widths[index] > least]
        if not shrinking:
            break
        widths[max(shrinking, key=lambda index: widths[index])] -= 1
        excess -= 1
    return widths


def terminal_width() -> int | None:
    """Return the cells of a line of the terminal; None where stdout is no terminal."""
    return console().width if sys.stdout.isatty() else None


def console(width: int | None = None) -> "Console":
    """Return a console on stdout that takes text as it is: no markup, no emoji codes, no highlighting."""
    from rich.console import Console

    return Console(width=width, highlight=False, markup=False, emoji=False)
