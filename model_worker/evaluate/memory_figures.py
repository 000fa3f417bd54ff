"""The figures of the evaluations of a memory, made of the same documents that `--json` prints."""

from collections.abc import Mapping
from typing import Any

from model_worker.evaluate.figure import Figure, Panel, Point, Series

_Document = Mapping[str, Any]


def perplexity_figure(found: _Document) -> Figure:
    """Return the gain of a memory by its size, for each document and for all; found: the document of an evaluation."""
    series: dict[str, list[Point]] = {}
    scored = sum(own["scored"] for own in found["documents"])
    history = max(own["history"] for own in found["documents"])
    for row in found["gains"]:
        size = _size(row["memory"], history)
        if size is not None:
            series.setdefault("all documents", []).append(Point.around(size, row["gain"], row["width_blocks"] or 0.0))
    for document in found["documents"]:
        for own in document["gains"]:
            size = _size(own["memory"], document["history"])
            if size is not None and len(found["documents"]) > 1:
                point = Point.around(size, own["gain"], own["width_blocks"] or 0.0)
                series.setdefault(document["text"], []).append(point)
    return Figure(
        f"{found['model']}: gain of a memory over none, window {found['window']}",
        f"Loss of {scored:,} tokens without a memory less the loss with it, with 95 % intervals over blocks of 512 "
        "tokens; higher is better.",
        "tokens of the text that the memory finds",
        "gain, nats per token",
        [Panel("", [Series(name, points) for name, points in series.items()], {"no memory": 0.0})],
    )


def _size(memory: str, history: int) -> float | None:
    """Return the size in tokens of a memory by its name; None for one that has no size."""
    if memory == "all":
        return history
    return float(memory.removeprefix("last ").replace(",", "")) if memory.startswith("last ") else None


def facts_figure(found: _Document) -> Figure:
    """Return the share of facts that are told by how far back they stand, a panel of each form and local text."""
    panels: dict[str, dict[str, list[Point]]] = {}
    for row in found["answers"]:
        if row["wording"] == "all":
            name = f"{row['form']}, local text {row['local']}"
            panels.setdefault(name, {}).setdefault(row["way"], []).append(Point.of_share(row["tokens"], row))
    return Figure(
        f"{found['model']}: facts told behind a text, window {found['window']}",
        "The share of facts that are told, with Wilson's 95 % interval: by recalled K-V, "
        "by reading the same hits again, and by neither.",
        "tokens read",
        "share of facts",
        [Panel(title, [Series(way, points) for way, points in own.items()]) for title, own in panels.items()],
    )


def first_token_figure(found: _Document) -> Figure:
    """Return the time to the first token by the length of the history, a line for each way."""
    series: dict[str, list[Point]] = {}
    for row in found["rows"]:
        point = Point.around(row["history"], 1000 * row["seconds"], 1000 * row["width"])
        series.setdefault(row["way"], []).append(point)
    return Figure(
        f"{found['model']}: time to the first token, {found['hits']} hits of {found['chunk']} tokens",
        "Medians of interleaved rounds with 95 % intervals; lower is better.",
        "tokens of history",
        "milliseconds",
        [Panel("", [Series(way, points) for way, points in series.items()])],
        y_doubling=True,
    )


def session_figure(found: _Document) -> Figure:
    """Return the seconds of a whole session by the number of questions that are answered, a line for each way."""
    counts = [2**power for power in range(found["questions"].bit_length())]
    series = [Series(row["way"], [Point(n, row["after"][n - 1]) for n in counts]) for row in found["rows"]]
    return Figure(
        f"{found['model']}: {found['tokens']:,} tokens read once, and questions behind them",
        "Seconds of the reading and of all questions so far; lower is better.",
        "questions",
        "seconds",
        [Panel("", series)],
        y_doubling=True,
    )
