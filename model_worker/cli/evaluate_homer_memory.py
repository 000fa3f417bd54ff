"""`kvbank eval homer-memory` measures the peak memory of a prompt by its length, by HOMER and plain.

The module is light to import: torch comes with the command.
"""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbank.console.progress import progress
from kvbank.console.table import Column
from model_worker.cli.places import check_plot
from model_worker.cli.quiet import load_quietly
from model_worker.cli.shown import AsJson, Shown, Table, show
from model_worker.errors import InputError
from model_worker.settings.base import Count, CountOrZero, Settings, at_least, described
from model_worker.settings.flags import takes

if TYPE_CHECKING:
    from model_worker.evaluate.peaks import PeaksReport

_MIB = 1 << 20


class HomerMemoryOptions(Settings):
    """Options of `kvbank eval homer-memory`."""

    model: Annotated[
        str | None, described("kvbank-small, a folder, or a hub id. Default: 16 layers of random weights.")
    ] = None
    length: Annotated[tuple[Count, ...], described("Tokens, several times.")] = (512, 1024, 2048, 4096, 8192, 16384)
    size: Annotated[int, at_least(21), described("Tokens of a node.")] = 256
    plain_up_to: Annotated[CountOrZero, described("Longest prompt of the plain prefill.")] = 8192


@takes(HomerMemoryOptions)
def homer_memory(
    options: HomerMemoryOptions,
    plot: Annotated[Path | None, typer.Option(help="Also write an SVG: peak against length.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the peak tensor memory of a whole prompt by length: HOMER, plain prefill, fitted to log2(n) and to n.

    Example: kvbank eval homer-memory --length 512 --length 1024 --length 2048
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from model_worker.evaluate.figures import drawn, memory_figure
    from model_worker.evaluate.peaks import measure_peaks, random_model

    check_plot(plot)
    lengths = sorted(options.length)
    if len(set(lengths)) < 3:
        raise InputError("at least three lengths are needed to tell a line from a logarithm")
    loaded = random_model() if options.model is None else load_quietly(options.model)[0]
    with progress() as bars:
        report = measure_peaks(
            loaded,
            lengths,
            size=options.size,
            plain_up_to=options.plain_up_to,
            progress=partial(bars, "lengths"),
        )
    found = report.document()
    title = f"{options.model or 'random weights'}: peak MiB of a prompt above the weights"
    shown = Shown(found, [_memory_table(title, report)], drawn({"homer-memory.svg": memory_figure(found)}))
    show(shown, as_json=as_json, plot=plot)


def _memory_table(title: str, report: "PeaksReport") -> Table:
    rows = [
        (f"{p.length:,}", f"{p.homer / _MIB:.2f}", "" if p.plain is None else f"{p.plain / _MIB:.1f}")
        for p in report.peaks
    ]
    lines = (
        f"{who} {x}: {f.a / _MIB:.2f} + {f.b / _MIB:.3g} {x}, residual {f.residual / _MIB:.3f}"
        for who, both in report.fits.items()
        for x, f in both.items()
    )
    return Table([Column(name) for name in ("tokens", "HOMER", "plain prefill")], rows, title, "\n".join(lines))
