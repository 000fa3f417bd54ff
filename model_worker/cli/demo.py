"""`kvbank demo` tells the story of a text that is read, forgotten in part and recalled, and shows its figures."""

import io
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbank.console.output import printable
from kvbank.console.progress import progress
from kvbank.console.table import Column, table
from model_worker.cli.places import check_writable
from model_worker.cli.quiet import quiet_libraries
from model_worker.cli.shown import AsJson, Shown, Table, show
from model_worker.demo.settings import DemoSettings
from model_worker.settings.flags import takes

if TYPE_CHECKING:
    from model_worker.demo.story import DemoReport

_PICTURE_WIDTH = 100  # cells


@takes(DemoSettings)
def demo(
    settings: DemoSettings,
    as_json: AsJson = False,
    svg: Annotated[Path | None, typer.Option(help="Also save the table as a picture.")] = None,
) -> None:
    """Read a long text into a memory service, kill the service, and ask the model for facts of the text.

    Example: kvbank demo --limit 40000 --json
    """
    quiet_libraries()
    from model_worker.demo.story import run_demo

    if svg is not None:
        check_writable(svg)
    with progress() as bars:
        report = run_demo(settings, bars.say, bars)
    made = _table(report)
    show(Shown(asdict(report), [made], lambda: {"demo.svg": _picture(made)}), as_json=as_json, plot=svg)


def _picture(made: Table) -> str:
    """Return a table as SVG, without rich's fonts, which are on the network."""
    from rich.console import Console

    out = Console(record=True, width=_PICTURE_WIDTH, file=io.StringIO(), highlight=False, markup=False, emoji=False)
    out.print(printable(made.title or ""))
    out.print(table(made.columns, made.rows, _PICTURE_WIDTH))
    out.print(made.caption)
    return re.sub(r"@font-face \{.*?\}\s*", "", out.export_svg(title="kvbank demo"), flags=re.DOTALL)


def _table(report: "DemoReport") -> Table:
    return Table(
        (Column("what", "prose"), Column("measured")),
        [*_memory_rows(report), *_recall_rows(report), *_loss_rows(report)],
        f"{report.text}, model {report.model}, seed {report.seed}",
        f"eviction: {report.policy} (bounds 10/90 would always drop the oldest tenth)",
    )


def _memory_rows(report: "DemoReport") -> list[tuple[str, str]]:
    reasons = ", ".join(f"{n} {reason}" for reason, n in report.evicted_by_reason.items()) or "none"
    return [
        ("tokens read", f"{report.tokens_read:,} in {report.read_seconds:.0f} s"),
        ("chunks written / evicted", f"{report.chunks_written:,} / {report.chunks_evicted:,} ({reasons})"),
        (
            f"K-V bytes per token before / after compression ({report.compressor})",
            f"{report.bytes_per_token_before:,.0f} / {report.bytes_per_token_after:,.0f}",
        ),
        ("retrieval, p50 over the wire", f"{report.retrieval_ms_p50:.1f} ms"),
        ("facts asked for while reading: survived", f"{report.asked_survived} of {report.asked}"),
        ("facts never asked for: survived", f"{report.never_asked_survived} of {report.never_asked}"),
    ]


def _recall_rows(report: "DemoReport") -> list[tuple[str, str]]:
    counts = (
        ("recalled with memory (of the survivors)", report.with_memory),
        ("the same chunks read again as text", report.read_again),
        ("recalled with memory behind a full window", report.full_window),
        ("the same chunks read again behind a full window", report.full_window_read_again),
        ("recalled without memory", report.without_memory),
        ("recalled with another text's memory", report.other_memory),
        ("after kill -9, first worker", report.after_kill),
        ("after kill -9, second worker", report.second_worker),
    )
    return [(what, "no room" if count is None else f"{count[0]} of {count[1]}") for what, count in counts]


def _loss_rows(report: "DemoReport") -> list[tuple[str, str]]:
    low, high = report.loss_drop_interval
    return [
        (f"loss on the rest ({report.rest_tokens:,} tokens), without memory", f"{report.loss_without:.3f} nats"),
        ("the same with memory, same local window", f"{report.loss_with:.3f} nats"),
        (
            f"drop, 95 % interval over {report.loss_blocks} chunks",
            f"{report.loss_drop:.3f} [{low:.3f}, {high:.3f}]",
        ),
    ]
