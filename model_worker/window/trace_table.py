"""A trace is shown to people as lines: one chunk a line, by the attention that it received."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from kvbank.console.output import printable

TITLES = ("mass", "score", "from", "age", "text")
_LONGEST_ORIGIN, _LEAST_TEXT = 28, 20
_UNITS = (("day", 86400), ("h", 3600), ("min", 60), ("s", 1))


def lines_of(rows: Sequence[Sequence[str]], below: Sequence[str], width: int) -> str:
    """Return rows of cells below `TITLES`, and lines below them, each printable and at most `width` characters wide.

    The first two cells of a row are figures, and the last one is cut to what room is left. Without rows there are no
    titles.
    """
    lines = _aligned([TITLES, *([one_line(cell) for cell in row] for row in rows)], width) if rows else []
    return "\n".join([*lines, *(_cut(one_line(line), width) for line in below)])


def origin(metadata: Mapping[str, object], start: int) -> str:
    """Return where a chunk comes from in a few words: its source, turn and role, and where it has none its offset."""
    if start < 0:
        return "before the restart"
    source, turn, role = (metadata.get(name) for name in ("source", "turn", "role"))
    parts = [part for part in (source, None if turn is None else f"turn {turn}", role) if part is not None]
    return _cut(one_line(", ".join(map(str, parts))), _LONGEST_ORIGIN) if parts else f"token {start:,}"


def age(created: datetime | None, now: datetime) -> str:
    """Return how long ago something was, in its largest unit; a dash where that is not known."""
    if created is None:
        return "-"
    seconds = max(0, (now - created) // timedelta(seconds=1))
    unit, length = next(((unit, length) for unit, length in _UNITS if seconds >= length), _UNITS[-1])
    count = seconds // length
    return f"{count:,} {unit}{'s' * (unit == 'day' and count != 1)}"


def counted(count: int, what: str) -> str:
    """Return a number of things in words, such as `2 tokens`."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def one_line(text: str) -> str:
    """Return a text as one line that no terminal obeys."""
    return printable(" ".join(text.split()))


def _aligned(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return the rows with cells below each other: two figures to the right, the others to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    lines = []
    for row in rows:
        figures = [cell.rjust(wide) for cell, wide in zip(row[:2], widths[:2], strict=True)]
        words = [cell.ljust(wide) for cell, wide in zip(row[2:-1], widths[2:], strict=True)]
        begin = "  ".join([*figures, *words, ""])
        lines.append(begin + _cut(row[-1], max(_LEAST_TEXT, width - len(begin))))
    return lines


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."
