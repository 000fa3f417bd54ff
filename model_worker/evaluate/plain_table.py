"""A table of an evaluation, as text: the command prints it, and the page of results has it in Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class PlainTable:
    """Rows below the titles of their columns, the first of which names the row; caption stands below."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def markdown(self) -> str:
        """Return the table in Markdown, figures to the right."""
        lines = [f"**{self.title}**", "", _line(self.columns)]
        lines.append(_line(["---", *["---:"] * (len(self.columns) - 1)]))
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, *(["", self.caption] if self.caption else [])])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def plus_minus(value: float | None, width: float | None, form: str = "+.4f") -> str:
    """Return a value with half the width of its interval, without one where it has none."""
    if value is None:
        return "-"
    return f"{value:{form}}" if width is None else f"{value:{form}} ± {width:{form.lstrip('+')}}"


def share_cell(row: Mapping[str, Any] | None) -> str:
    """Return right of asked and the interval of the share, of a row that has them; a dash where nothing was asked."""
    return "-" if row is None else f"{row['right']}/{row['asked']} [{row['low']:.2f}, {row['high']:.2f}]"
