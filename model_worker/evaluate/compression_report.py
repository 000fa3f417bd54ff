"""The report of `kvbank eval compression` is one document: `--json` prints it, table and figure are made of it."""

from collections.abc import Mapping
from typing import Any

from model_worker.evaluate.figure import Figure
from model_worker.evaluate.figures import compression_figure
from model_worker.evaluate.plain_table import PlainTable, plus_minus

_Document = Mapping[str, Any]


def compression_tables(found: _Document) -> list[PlainTable]:
    """Return the table of all methods and budgets."""
    lines = [
        (
            row["method"],
            plus_minus(row["loss"], row["loss"] - row["low"], ".3f"),
            plus_minus(row["above"], row["above_width"], "+.3f"),
            f"{row['bytes_per_token']:,.0f}",
            f"{1000 * row['seconds']:.1f}",
            f"{row['forward']:.2f}",
        )
        for row in found["rows"]
    ]
    title = (
        f"{found['model']}: {found['documents']} chunks of {found['chunk']} tokens, loss of the next {found['follow']}"
    )
    columns = ["method", "loss, nats", "above full", "bytes/token", "ms/chunk", "x forward"]
    caption = "± 95 % over documents, differences paired; time without the chunk's forward, if it is used"
    return [PlainTable(title, columns, lines, caption)]


def compression_lines(found: _Document) -> list[str]:
    """Return what the methods cost, in one line."""
    seconds = sum(row["seconds"] for row in found["rows"]) * found["documents"]
    return [f"cost: {seconds:,.0f} s to compress, without the forwards that measure losses"]


def compression_picture(found: _Document) -> Figure:
    """Return the figure of a document: added loss by the tokens kept."""
    return compression_figure(found["model"], found["chunk"], found["rows"])
