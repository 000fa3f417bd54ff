"""The report of a measured recall is one document: `--json` prints it, tables and figure are made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from model_worker.evaluate.evidence.collection import Collection
from model_worker.evaluate.evidence.recall import Measured
from model_worker.evaluate.figure import Figure, Panel, Point, Series
from model_worker.evaluate.plain_table import PlainTable


def document(collections: Sequence[Collection], measured: Measured) -> dict[str, Any]:
    """Return the figures as plain values."""
    return {
        "collections": len(collections),
        "passages": sum(len(each.passages) for each in collections),
        "questions": sum(len(each.questions) for each in collections),
        "recall": [{**asdict(row), "share": row.share} for row in measured.rows],
        "cost": [asdict(cost) for cost in measured.costs],
    }


def recall_figure(title: str, report: Mapping[str, Any]) -> Figure:
    """Return recall by k, a panel of each kind of question; report: a `document`."""
    panels: dict[str, dict[str, list[Point]]] = {}
    for row in report["recall"]:
        panels.setdefault(row["kind"], {}).setdefault(row["way"], []).append(Point.of_share(row["k"], row))
    return Figure(
        title,
        "The share of questions whose evidence is among the k best passages, with 95 % intervals over questions.",
        "k",
        "recall at k",
        [Panel(kind, [Series(way, points) for way, points in own.items()]) for kind, own in panels.items()],
    )


def recall_tables(report: Mapping[str, Any]) -> list[PlainTable]:
    """Return a table of each kind of question; report: a `document`, with the name of its `set`."""
    found = []
    for kind in dict.fromkeys(row["kind"] for row in report["recall"]):
        own = [row for row in report["recall"] if row["kind"] == kind]
        ks = sorted({row["k"] for row in own})
        ways = dict.fromkeys(row["way"] for row in own)
        columns = ["search", *(f"recall@{k}" for k in ks)]
        of = report["set"] if kind == "questions" else f"{report['set']}, {kind}"
        title = f"{of}: {own[0]['asked']} questions"
        rows = [(way, *(_share(row) for row in own if row["way"] == way)) for way in ways]
        found.append(PlainTable(title, columns, rows, "[95 % interval over questions]"))
    return found


def _share(row: Mapping[str, Any]) -> str:
    if row["way"] == "chance":
        return f"{row['share']:.2f}"
    return f"{row['share']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def cost_lines(report: Mapping[str, Any]) -> list[str]:
    """Return what each way of searching cost, a line each."""
    lines = []
    for own in report["cost"]:
        rate, each = own["texts"] / own["seconds"], 1000 * own["cpu_seconds"] / own["texts"]
        lines.append(
            f"cost of {own['way']}: {own['seconds']:,.1f} s for {own['texts']:,} texts, {rate:,.0f} texts a second, "
            f"{each:.2f} ms of CPU each"
        )
    return lines
