"""The tables and the figure of the evaluation `icl`, made of the same document that `--json` prints."""

from collections.abc import Mapping
from typing import Any

from model_worker.evaluate.figure import Figure, Panel, Point, Series
from model_worker.evaluate.plain_table import PlainTable, plus_minus, share_cell

_Document = Mapping[str, Any]
_LONGER = "Left out, in one seed or more: contexts longer than the model was trained for"


def icl_tables(found: _Document) -> list[PlainTable]:
    """Return the tables of `kvbank eval icl`."""
    rows = [
        (
            row["task"],
            str(row["shots"]),
            row["way"],
            share_cell(row["label"]),
            plus_minus(row["mean"], row["width"], ".3f"),
            share_cell(row["greedy"]),
        )
        for row in found["rows"]
    ]
    title = f"{found['model']}: labels told by demonstrations in memory, {found['top_k']} of them attended to"
    caption = (
        "label: the likeliest of the labels by its first token, right of asked with Wilson's 95 % interval; over "
        "seeds: mean ± half the 95 % interval (Student's t); greedy: the likeliest token of all begins the label, as "
        "MemLong counts"
    )
    tables = [PlainTable(title, ["task", "in context", "memory", "label", "over seeds", "greedy"], rows, caption)]
    if found["left_out"]:
        long = [(task, str(shots)) for task, shots in found["left_out"]]
        tables.append(PlainTable(_LONGER, ["task", "in context"], long))
    paired = [
        (row["task"], str(row["shots"]), row["of"], row["less"], plus_minus(row["mean"], row["width"], "+.3f"))
        for row in found["differences"]
    ]
    columns = ["task", "in context", "memory", "less", "difference"]
    caption = "share of right labels, paired by item; ± half the 95 % interval over items"
    return [*tables, PlainTable("Differences", columns, paired, caption)]


def icl_figure(found: _Document) -> Figure:
    """Return the share of right labels by demonstrations in the context, a panel of each task."""
    panels: dict[str, dict[str, list[Point]]] = {}
    for row in found["rows"]:
        point = Point.of_share(row["shots"], row["label"])
        panels.setdefault(row["task"], {}).setdefault(row["way"], []).append(point)
    return Figure(
        f"{found['model']}: labels told by demonstrations in memory",
        "The share of right labels, with Wilson's 95 % interval, by what the memory has; "
        "a vote of the nearest demonstrations needs no model.",
        "demonstrations in the context",
        "share of labels",
        [Panel(title, [Series(way, points) for way, points in own.items()]) for title, own in panels.items()],
        doubling=False,
    )
