"""The report of a measured recall: one document, which `--json` prints and the figure is drawn from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from model_worker.evaluate.evidence.collection import Collection
from model_worker.evaluate.evidence.recall import Measured
from model_worker.evaluate.figure import Figure, Panel, Series


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
    """Return recall by k, a panel of each kind of question; report: a `document`.

    The width of an interval is its longer side, since a share has none that is even.
    """
    panels: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for row in report["recall"]:
        width = max(row["high"] - row["share"], row["share"] - row["low"])
        panels.setdefault(row["kind"], {}).setdefault(row["way"], []).append((row["k"], row["share"], width))
    return Figure(
        title,
        "The share of questions whose evidence is among the k best passages, with 95 % intervals over questions.",
        "k",
        "recall at k",
        [Panel(kind, [Series(way, points) for way, points in own.items()]) for kind, own in panels.items()],
    )
