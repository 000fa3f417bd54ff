"""`kvbank eval eviction` replays recorded retrievals with smaller banks, by several policies of eviction.

The module is light to import: what measures comes with the command.
"""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from kvbank.console.progress import progress
from model_worker.cli.measuring import command_of
from model_worker.cli.places import check_plot
from model_worker.cli.shown import AsJson, Shown, show, tables_of
from model_worker.errors import InputError
from model_worker.settings.base import Seed, Settings, described
from model_worker.settings.flags import takes


class EvictionOptions(Settings):
    """Options of `kvbank eval eviction`."""

    trace: Annotated[
        tuple[Path, ...],
        described("What kvbank serve --record has written, or a .gz of it, several times. Default: those that ship."),
    ] = ()
    capacity: Annotated[
        tuple[Annotated[float, Field(ge=0.001, le=1)], ...],
        described("Chunks of the bank, as a share of the most that a trace has at once; several times."),
    ] = (0.1, 0.25, 0.5)
    policy: Annotated[
        tuple[str, ...], described("Such as lru:target=90; several times. Default: those of banks, caches and MIN.")
    ] = ()
    bound: Annotated[
        bool, described("Also find the most hits that are possible; takes minutes above some 10,000 chunks.")
    ] = True
    seed: Annotated[Seed, described("Seed of the policy random.")] = 0


@takes(EvictionOptions)
def eviction(
    options: EvictionOptions,
    plot: Annotated[Path | None, typer.Option(help="Also write an SVG: hit rate by capacity.")] = None,
    as_json: AsJson = False,
) -> None:
    """Replay recorded retrievals, to measure how much of what was found later a smaller bank still has, by policy.

    frequency (MemLong's rule), recency_half and lru with a target are policies of banks, with their defaults and with
    others; lru, lfu, fifo, arc and random make room for one chunk at a time, as caches do. belady and the bound know
    the future: no policy has more hits than the bound.

    Example: kvbank eval eviction --trace memory.trace.jsonl --capacity 0.25 --policy frequency --policy lru
    """
    from model_worker.evaluate.eviction.measuring import POLICIES, SHIPPED, Plan, measure
    from model_worker.evaluate.eviction.report import cost_lines, eviction_figure, eviction_tables
    from model_worker.evaluate.eviction.trace import read_traces
    from model_worker.evaluate.figures import drawn

    check_plot(plot)
    traces = [trace for path in options.trace or sorted(SHIPPED.glob("*.gz")) for trace in read_traces(path)]
    names = [trace.name for trace in traces]
    if len(set(names)) < len(names):
        raise InputError(f"two traces have the name {max(names, key=names.count)}: they are told apart by their names")
    policies = tuple(dict.fromkeys(options.policy or POLICIES))
    plan = Plan(sorted(set(options.capacity)), policies, options.bound, options.seed)
    with progress() as bars:
        measured = measure(traces, plan, bars)
    run = {"evaluation": "eviction", "command": command_of("eviction", options), "seed": options.seed}
    found = {**run, **measured}
    parts = tables_of(eviction_tables(found), *cost_lines(found))
    show(Shown(found, parts, drawn({"eviction.svg": eviction_figure(found)})), as_json=as_json, plot=plot)
