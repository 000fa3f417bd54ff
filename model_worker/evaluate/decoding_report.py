"""The report of `kvbank eval decoding` is one document: `--json` prints it, table and figure are made of it."""

from collections.abc import Mapping
from typing import Any

from model_worker.evaluate.figure import Figure, Panel, Point, Series
from model_worker.evaluate.plain_table import PlainTable, plus_minus

_Document = Mapping[str, Any]
_MIB = 1 << 20


def decoding_tables(found: _Document) -> list[PlainTable]:
    """Return the table of all caches."""
    rows = found["rows"]
    lines = [
        (
            row["rule"],
            f"{row['kept']:,}",
            plus_minus(row["nats"], row["nats"] - row["low"], ".3f"),
            plus_minus(row["above"], row["above_width"], "+.3f"),
            f"{row['rate']:.1f}",
            f"{row['bytes'] / _MIB:.1f}",
        )
        for row in rows
    ]
    title = (
        f"{found['model']}: loss of {found['new']} tokens decoded behind {found['tokens']:,}, {found['documents']} "
        "documents"
    )
    columns = ["cache", "tokens kept", "loss, nats", "above full", "tokens/s", "MiB"]
    caption = (
        "± 95 % over documents, differences paired; one row decoded at a time; MiB of keys and values; "
        f"{found['threads']} threads, load average {found['load']:.1f}"
    )
    return [PlainTable(title, columns, lines, caption)]


def decoding_lines(found: _Document) -> list[str]:
    """Return what the decoding cost, in one line."""
    tokens = (found["new"] - 1) * found["documents"]
    return [f"cost: {sum(tokens / row['rate'] for row in found['rows']):,.0f} s to decode, without reading the prompts"]


def decoding_figure(found: _Document) -> Figure:
    """Return the added loss by the tokens kept, a line for each rule."""
    series: dict[str, list[Point]] = {}
    for row in found["rows"]:
        if row["rule"] != "full":
            series.setdefault(row["rule"], []).append(Point.around(row["kept"], row["above"], row["above_width"]))
    return Figure(
        f"{found['model']}: loss of decoded tokens above that of the full cache of {found['tokens']:,} tokens",
        "Rules of a bounded cache compared on the same documents, with 95 % intervals of paired differences; lower is "
        "better.",
        "tokens kept in each layer",
        "added loss, nats per token",
        [Panel("", [Series(rule, points) for rule, points in series.items()], {"full cache": 0.0})],
    )
