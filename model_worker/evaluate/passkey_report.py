"""The report of passkeys is one document: `--json` prints it, table and figure are made of it."""

from collections.abc import Mapping
from typing import Any

from model_worker.evaluate.figure import Figure, Panel, Point, Series
from model_worker.evaluate.plain_table import PlainTable

_Document = Mapping[str, Any]


def answers_line(found: _Document) -> str:
    """Return how long all answers took together, in one line."""
    seconds = sum(row["seconds"] * row["asked"] for row in found["scores"] if not row["refused"])
    return f"cost: {seconds:,.0f} s for the answers"


def passkey_tables(found: _Document) -> list[PlainTable]:
    """Return the table of `kvbank eval passkey`: a row of each way, a column of each length."""
    rows = found["scores"]
    lengths = sorted({row["length"] for row in rows})
    lines, refused = [], {}
    for way in dict.fromkeys(row["way"] for row in rows):
        own = {row["length"]: row for row in rows if row["way"] == way}
        lines.append((way, *(_cell(own[length]) for length in lengths)))
        refused[way] = next((row["refused"] for row in own.values() if row["refused"]), None)
    title = f"{found['model']}, rope {found['options'].get('rope', 'as trained')}: numbers told in long prompts"
    columns = ["read", *(f"{length:,} tokens ({length / found['trained']:.3g}x)" for length in lengths)]
    caption = [
        f"right of asked, Wilson's 95 % interval of the share, seconds an answer; {found['trained']:,} tokens count as "
        "trained",
        *(f"{way} is refused: {why}" for way, why in refused.items() if why),
    ]
    return [PlainTable(title, columns, lines, "\n".join(caption))]


def _cell(row: _Document) -> str:
    if row["refused"]:
        return "refused"
    return f"{row['right']}/{row['asked']} [{row['low']:.2f}, {row['high']:.2f}] {row['seconds']:,.1f} s"


def passkey_figure(found: _Document) -> Figure:
    """Return the share of numbers told by the length of the prompt, a line for each way that was not refused."""
    series: dict[str, list[Point]] = {}
    for row in found["scores"]:
        if not row["refused"]:
            series.setdefault(row["way"], []).append(Point.of_share(row["length"], row))
    return Figure(
        f"{found['model']}: a number in the middle of a long prompt, told at its end",
        "The share of numbers that are told, with Wilson's 95 % interval.",
        "tokens of the prompt",
        "share of numbers",
        [Panel(f"{found['trained']:,} trained tokens", [Series(way, points) for way, points in series.items()])],
    )
