"""What the commands of care print of findings: problems, and totals in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvbank.console.output import print_line

_UNITS = ("B", "kB", "MB", "GB", "TB")


def print_problems(problems: Sequence[Any]) -> None:
    """Print a line for each problem."""
    for problem in problems:
        print_line(f"  {line(problem)}")


def line(problem: Any) -> str:
    """Say a problem in a line."""
    where = [
        f"bank {problem.bank}" if problem.bank else "",
        f"chunk {problem.chunk_id}" if problem.chunk_id is not None else "",
        problem.path,
    ]
    return f"{problem.kind}: {', '.join([*filter(None, where), problem.detail])}"


def summary(totals: Mapping[str, int]) -> str:
    """Say in words what was looked at."""
    size, unit = float(totals.get("payload_bytes", 0)), 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    counted = [number(totals.get(f"{what}s", 0), what) for what in ("bank", "chunk", "payload")]
    snapshots = [number(totals["snapshots"], "snapshot")] if "snapshots" in totals else []
    return ", ".join([*counted[:2], f"{counted[2]} ({size:.3g} {_UNITS[unit]})", *snapshots])


def transferred(totals: Mapping[str, int]) -> str:
    """Say in words how payloads came, and what was not there any more."""
    parts = [f"{totals[how]} {how}" for how in ("copied", "linked", "reused") if totals.get(how)]
    if totals.get("gone_meanwhile"):
        parts.append(f"{totals['gone_meanwhile']} chunks were deleted or evicted meanwhile")
    return "".join(f"; {part}" for part in parts)


def number(count: int, what: str) -> str:
    """Say a number of things."""
    return f"{count} {what}{'' if count == 1 else 's'}"
