"""The figures of build/bench.json as a table: for the terminal, and as Markdown for docs/benchmarks.md.

`python -m benchmarks.report [FILE]` puts the table between the two marks in docs/benchmarks.md.
"""

import json
import sys
from pathlib import Path
from typing import Any

PAGE = Path("docs/benchmarks.md")
BEGIN, END = "<!-- made by python -m benchmarks.report -->", "<!-- end -->"
# Columns with words, which are aligned on the left; the others have numbers.
TEXT = (0, 2, 5)
_HEAD = ["what", "ours", "against", "theirs", "ratio", "target", "met", "n", "load"]


def table(document: dict[str, Any]) -> list[list[str]]:
    """Return the head of the table and its rows; a name that repeats that of the row above is left out."""
    rows, before = [], ""
    for entry in document["results"]:
        theirs = entry.get("floor", entry.get("peer"))
        unit = entry["unit"]
        ours = f"{_number(entry['ours'])} {unit}"
        targets = ", ".join(_target(target, unit) for target in entry["targets"])
        met = ", ".join("yes" if target["met"] else "no" for target in entry["targets"])
        shown = ("", "") if entry["name"] == before else (entry["name"], ours)
        before = entry["name"]
        numbers = [_number(theirs), f"{entry['ratio']:.2f}"]
        rows.append([*shown, entry["against"], *numbers, targets, met, str(entry["n"]), f"{entry['load_average']:.1f}"])
    return [_HEAD, *rows]


def _target(target: dict[str, Any], unit: str) -> str:
    sign = "≥" if target["at_least"] else "≤"
    number = _number(target["limit"])
    return {
        "ours": f"{sign} {number} {unit}",
        "ratio": f"{sign} {number}x",
        "difference": f"{sign} theirs + {number} {unit}",
    }[target["of"]]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(document: dict[str, Any]) -> str:
    """Return the table as Markdown, with the machine and the day, and what was skipped."""
    head, *rows = table(document)
    machine = document["machine"]
    about = f"{document['date'][:10]}, {machine['cores']} cores of {machine['cpu']}, {machine['system']}."
    lines = [about, "", _line(head), _line(["---"] * len(head)), *map(_line, map(_emphasised, rows)), ""]
    lines += [f"Skipped in {item['row']}: {item['what']} ({item['why']})." for item in document["skipped"]]
    return "\n".join(lines).rstrip() + "\n"


def _emphasised(row: list[str]) -> list[str]:
    met = _HEAD.index("met")
    return [*row[:met], row[met].replace("no", "**no**"), *row[met + 1 :]]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(path: str = "build/bench.json") -> None:
    """Replace what stands between the two marks in docs/benchmarks.md. path: the file of figures."""
    made = markdown(json.loads(Path(path).read_text()))
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
