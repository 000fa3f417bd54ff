"""The report of the evaluation `ruler`: tables and figure, made of the same document that `--json` prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from model_worker.evaluate.figure import Figure, Panel, Point, Series
from model_worker.evaluate.interval import Share
from model_worker.evaluate.plain_table import PlainTable
from model_worker.evaluate.ruler.run import FOUND

_Document = Mapping[str, Any]


def ruler_tables(found: _Document) -> list[PlainTable]:
    """Return the table of `kvbank eval ruler`: a row of each task and length, and of all tasks at a length."""
    rows = found["rows"]
    ways = [way for way in dict.fromkeys(row["way"] for row in rows) if way != FOUND]
    ways += [FOUND] if any(row["way"] == FOUND for row in rows) else []
    lines = []
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        own = [row for row in rows if row["tokens"] == tokens]
        for task in dict.fromkeys(row["task"] for row in own):
            lines.append(_line(tokens, task, ways, [row for row in own if row["task"] == task]))
        if len({row["task"] for row in own}) > 1:
            lines.append(_line(tokens, "all", ways, own))
    prompts = max(row["asked"] for row in rows)
    title = f"{found['model']}: strings told, {prompts:g} prompts of each task and length, window {found['window']}"
    caption = (
        "share of the expected strings that stand in the answer, with Wilson's 95 % interval over prompts; found: the "
        "share that stands in the hits; - where the text is longer than the model was trained for"
    )
    return [PlainTable(title, ["tokens", "task", *ways], lines, caption)]


def _line(tokens: int, task: str, ways: Sequence[str], rows: Sequence[_Document]) -> tuple[str, ...]:
    cells = (str(own) if (own := _pooled(rows, way)).asked else "-" for way in ways)
    return (f"{tokens:,}", task, *cells)


def _pooled(rows: Sequence[_Document], way: str) -> Share:
    """Return the share of all prompts of the rows of one way."""
    own = [Share(row["right"], row["asked"]) for row in rows if row["way"] == way]
    return sum(own, Share(0, 0))


def ruler_figure(found: _Document) -> Figure:
    """Return the share of expected strings by the length of the prompt, a panel of each kind of task."""
    rows = [row for row in found["rows"] if row["way"] != FOUND]
    panels = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        series: dict[str, list[Point]] = {}
        for tokens, way in dict.fromkeys((row["tokens"], row["way"]) for row in rows if row["kind"] == kind):
            own = _pooled([row for row in rows if row["kind"] == kind and row["tokens"] == tokens], way)
            series.setdefault(way, []).append(Point.of_share(tokens, own.document()))
        panels.append(Panel(kind, [Series(way, points) for way, points in series.items()]))
    return Figure(
        f"{found['model']}: RULER's tasks by length, window {found['window']}",
        "The share of expected strings that an answer holds, with Wilson's 95 % interval: by the plain model, by "
        "reading what the question found again, and by recalled K-V.",
        "tokens of the prompt",
        "share of strings",
        panels,
    )
