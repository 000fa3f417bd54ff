"""The figures of the evaluations of a memory, made of the same documents that `--json` prints."""

from collections.abc import Mapping
from typing import Any

from model_worker.evaluate.figure import Figure, Panel, Series

_Document = Mapping[str, Any]


def perplexity_figure(found: _Document) -> Figure:
    """Return the gain of a memory by its size, for each document and for all; found: the document of an evaluation."""
    series: dict[str, list[tuple[float, float, float]]] = {}
    scored = sum(own["scored"] for own in found["documents"])
    history = max(own["history"] for own in found["documents"])
    for row in found["gains"]:
        size = _size(row["memory"], history)
        if size is not None:
            series.setdefault("all documents", []).append((size, row["gain"], row["width_blocks"] or 0.0))
    for document in found["documents"]:
        for own in document["gains"]:
            size = _size(own["memory"], document["history"])
            if size is not None and len(found["documents"]) > 1:
                point = (size, own["gain"], own["width_blocks"] or 0.0)
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
