"""The figures of each measurement, made of the same document that `--json` prints.

So a figure can be drawn again from a document that was kept: those of docs/ are in docs/measured, and
`python -m model_worker.evaluate.figures docs/measured docs` draws them.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from model_worker.evaluate.figure import Figure, Panel, Point, Series, draw

_MIB = 1 << 20
_Document = Mapping[str, Any]
# Readers of a restoration, and what is shown of each: name, reader, field; BLEU is a share of 100 here.
_RESTORED = (
    ("accuracy, own slots", "own", "right"),
    ("accuracy, another text's slots", "other", "right"),
    ("accuracy, no slots", "plain", "right"),
    ("exact prefix, own slots", "own", "prefix"),
    ("BLEU / 100, own slots", "own", "bleu"),
)
_CONTINUED = (("all of the context", "full"), ("its slots", "slots"), ("as many last tokens", "last"))


def compression_figure(model: str, chunk: int, rows: Sequence[_Document]) -> Figure:
    """Return the loss above that of the whole chunk by the tokens kept; a panel of each family of methods.

    model: its name. chunk: tokens of a chunk. rows: documents of compression.Row.
    """
    series: dict[str, list[Point]] = {}
    for row in rows:
        if row["method"] not in ("full", "nothing"):
            point = Point.around(row["budget"], row["above"], row["above_width"])
            series.setdefault(_method(row["method"], row["budget"]), []).append(point)
    return Figure(
        f"{model}: loss behind a compressed chunk of {chunk} tokens, above the loss behind the whole chunk",
        "Methods of compression compared on the same documents, with 95 % intervals of paired differences; lower is "
        "better.",
        f"tokens kept of {chunk}",
        "added loss, nats per token",
        [
            Panel(title, [Series(name, series[name]) for name in names], {"whole chunk": 0.0})
            for title, names in _families(series).items()
        ],
    )


def _method(name: str, budget: int) -> str:
    """Return the name of a method without its budget: `tova block=1` for `tova:m=16,block=1`."""
    return re.sub(rf"[:,]m={budget}\b,?", " ", name).strip().removesuffix(f", {budget} tokens")


def _families(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names by family; methods that have none stand together. Leaves are the baseline of HOMER."""
    found: dict[str, list[str]] = {}
    for name in names:
        family = name.partition(" ")[0]
        found.setdefault("homer" if family == "leaves" else family, []).append(name)
    alone = [name for own in found.values() if len(own) == 1 for name in own]
    return {**({"others": alone} if alone else {}), **{f: own for f, own in found.items() if len(own) > 1}}


def memory_figure(report: _Document) -> Figure:
    """Return the peak memory of a prompt by its length; report: the document of peaks.PeaksReport."""
    peaks = report["peaks"]
    series = {
        name: [Point(peak["length"], peak[field] / _MIB) for peak in peaks if peak[field] is not None]
        for name, field in (("HOMER", "homer"), ("plain prefill", "plain"))
    }
    return Figure(
        "Peak memory of a prompt above the weights",
        "The peak of HOMER's tree grows with the logarithm of the length, that of a plain prefill with the length.",
        "tokens of the prompt",
        "MiB",
        [Panel("", [Series(name, points) for name, points in series.items() if points])],
        y_doubling=True,
    )


def adapter_figures(model: str, adapters: Sequence[_Document]) -> dict[str, Figure]:
    """Return figures by file name, each with a panel of every adapter; adapters: their documents."""

    def panels(field: str, x: str) -> list[Panel]:
        return [Panel(Path(own["adapter"]).name, _restored(own[field], x)) for own in adapters]

    span = adapters[0]["restoration_by_slots"][0]["tokens"]
    continued = [
        Panel(
            Path(own["adapter"]).name,
            [
                Series(name, _points(own["continuation"], "context", (f"{r}_nats", f"{r}_width")))
                for name, r in _CONTINUED
            ],
            {"nothing": own["continuation"][0]["none_nats"]},
        )
        for own in adapters
    ]
    told = "Texts restored from memory slots, with 95 % intervals over texts (BLEU is of all texts together)."
    return {
        "icae-length.svg": Figure(
            f"{model}: restoration by length",
            told,
            "tokens of the text",
            "share",
            panels("restoration_by_length", "tokens"),
        ),
        "icae-slots.svg": Figure(
            f"{model}: {span} tokens by the slots they get",
            told,
            "slots of the text",
            "share",
            panels("restoration_by_slots", "slots"),
        ),
        "icae-continuation.svg": Figure(
            f"{model}: loss of what follows a context",
            "The same following tokens behind the whole context, its slots, as many last tokens, and nothing, with "
            "95 % intervals over texts; lower is better.",
            "tokens of context",
            "loss, nats per token",
            continued,
        ),
    }


def _restored(found: Sequence[_Document], x: str) -> list[Series]:
    made = []
    for name, reader, field in _RESTORED:
        values = [{x: own[x], **own[reader]} for own in found]
        if all(own[field] is not None for own in values):
            scale = 100.0 if field == "bleu" else 1.0
            made.append(Series(name, _points(values, x, (field, f"{field}_width"), scale)))
    return made


def _points(found: Sequence[_Document], x: str, fields: tuple[str, str], scale: float = 1.0) -> list[Point]:
    value, width = fields
    return [Point.around(own[x], own[value] / scale, own.get(width, 0.0) / scale) for own in found]


def documented(measured: Path) -> dict[str, Figure]:
    """Return the figures of docs/ by file name. measured: the folder of the documents that they are drawn from."""

    def read(name: str) -> Any:
        return json.loads((measured / name).read_text(encoding="utf-8"))

    model = "kvbank-small"
    return {
        "compression.svg": compression_figure(model, 256, read("compression.json")),
        "homer-memory.svg": memory_figure(read("homer-memory.json")),
        **adapter_figures(model, read("icae.json")),
    }


def drawn(figures: Mapping[str, Figure]) -> Callable[[], dict[str, str]]:
    """Return what draws the figures when it is called: SVG by file name."""
    return lambda: {name: draw(figure) for name, figure in figures.items()}


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    for file, svg in drawn(documented(source))().items():
        (target / file).write_text(svg, encoding="utf-8")
