"""The tables and the figure of the evaluation `chat`, made of the same document that `--json` prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from model_worker.evaluate.figure import Figure, Panel, Point, Series
from model_worker.evaluate.plain_table import PlainTable, share_cell

_Document = Mapping[str, Any]
_COMPARED = ("told", "whole context", "no memory")


def chat_tables(found: _Document) -> list[PlainTable]:
    """Return the tables of `kvbank eval chat`."""
    rows = found["answers"]
    places, wordings, ways = (list(dict.fromkeys(row[name] for row in rows)) for name in ("turns", "wording", "way"))
    own = {(row["turns"], row["wording"], row["way"]): row for row in rows}
    lines = [
        (f"{place:,}", wording, *(share_cell(own.get((place, wording, way))) for way in ways))
        for place in places
        for wording in wordings
    ]
    asked = max(row["asked"] for row in rows)
    after = ", after a restart of service and worker" if found["restarted"] else ""
    title = f"{found['model']}: facts told in a conversation, of {asked} at each place{after}, window {found['window']}"
    caption = (
        "right of asked, with Wilson's 95 % interval; whole: the statement stands whole in a chunk; found: the chunk "
        "with the answer is among those found; empty window: told where the question stands alone; load average "
        f"{found['load']:.1f}"
    )
    return [PlainTable(title, ["turns", "wording", *ways], lines, caption), _by_conversation(found["conversations"])]


def _by_conversation(found: Sequence[_Document]) -> PlainTable:
    rows = [
        (str(own["seed"]), f"{own['turns']:,}", f"{own['tokens']:,}", f"{own['told']}/{own['asked']}") for own in found
    ]
    return PlainTable("Told by conversation", ["seed", "turns", "tokens so far", "told"], rows)


def chat_figure(found: _Document) -> Figure:
    """Return the share of facts that are told by turns, a line for each way."""
    series: dict[str, list[Point]] = {}
    for row in found["answers"]:
        if row["wording"] == "all" and row["way"] in _COMPARED:
            series.setdefault(row["way"], []).append(Point.of_share(row["turns"], row))
    return Figure(
        f"{found['model']}: facts told in a conversation, window {found['window']}",
        "The share of facts that are told, with Wilson's 95 % interval: by the session, "
        "with the whole conversation in the model's own window, and without a memory.",
        "turns since the facts were told",
        "share of facts",
        [Panel("", [Series(way, points) for way, points in series.items()])],
    )
