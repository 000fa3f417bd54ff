"""The tables and the pictures of docs/growth.md, from the points in docs/measured/growth.jsonl, so that no figure is
typed by hand.

    python -m benchmarks.growth.page            write them
    python -m benchmarks.growth.page --check    fail where the page or a picture has other figures

A table stands between the line `<!-- growth AXIS -->` and an empty line behind it.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.growth.axes import AXES
from benchmarks.growth.log import Log, Point
from benchmarks.growth.slopes import table
from model_worker.evaluate import figure

DOCS = Path("docs")
# The axes that have a picture: of each, what is drawn by kind of call.
_PANELS = {"a call, median": "ms", "the service's processor time of a call": "processor ms"}
_DRAWN = ("chunks", "payload", "banks")


def filled(page: str, log: Log) -> str:
    """Return the page with the tables of the points."""

    def made(found: re.Match[str]) -> str:
        return f"{found[1]}{_markdown(table(AXES[found[2]].about, log.of(found[2])))}\n"

    return re.sub(r"(<!-- growth (\w+) -->\n)(?:.+\n)*", made, page)


def pictures(log: Log) -> dict[str, str]:
    """Return the pictures, by file name, as SVG."""
    return {f"growth-{name}.svg": figure.draw(_figure(name, log.of(name))) for name in _DRAWN}


def _figure(name: str, points: Sequence[Point]) -> figure.Figure:
    about = AXES[name].about
    return figure.Figure(
        f"What a call costs, by {about}",
        "One thing grows and all else stays as it is; both axes are logarithmic, so that growth in proportion is a "
        "line of slope 1.",
        about,
        "microseconds",
        [figure.Panel(title, _lines(points, unit)) for title, unit in _PANELS.items()],
        y_doubling=True,
    )


def _lines(points: Sequence[Point], unit: str) -> list[figure.Series]:
    names = [name for name in points[0].figures if name.endswith(f", {unit}") and not name.startswith("first")]
    return [
        figure.Series(name.removesuffix(f", {unit}"), [figure.Point(p.size, 1000 * p.figures[name]) for p in points])
        for name in names
    ]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def main() -> int:
    """Write or check the page and its pictures, and return the exit status."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="write nothing; fail where there are other figures")
    check, log = options.parse_args().check, Log(DOCS / "measured/growth.jsonl")
    wanted = {"growth.md": filled((DOCS / "growth.md").read_text(encoding="utf-8"), log), **pictures(log)}
    for name, text in wanted.items():
        path = DOCS / name
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            print(
                f"docs/{name} has other figures than docs/measured: python -m benchmarks.growth.page", file=sys.stderr
            )
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
