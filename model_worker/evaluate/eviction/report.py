"""The report of replayed traces is one document: `--json` prints it, tables and figure are made of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from model_worker.evaluate.eviction.measuring import ALL, BOUND, LEVEL, of_bank
from model_worker.evaluate.figure import Figure, Panel, Point, Series
from model_worker.evaluate.plain_table import PlainTable, plus_minus

_Document = Mapping[str, Any]
_CAPTION = "share of what retrievals found that is still there, means over traces (± 95 %); above lru: paired by trace"
_OF_BOUND = "bound: the most that a policy could have that knows the future"


def eviction_tables(found: _Document) -> list[PlainTable]:
    """Return a table of each capacity, with a row of each policy, one of differences, and one of the traces."""
    kinds = list(dict.fromkeys(own["kind"] for own in found["traces"]))
    kinds = kinds if len(kinds) > 1 else []
    shares = dict.fromkeys(own["capacity"] for own in found["rates"])
    compared = [_compared(found, kinds)] if any(pair["than"] != LEVEL for pair in found["pairs"]) else []
    return [*(_of_capacity(found, share, kinds) for share in shares), *compared, _traces(found)]


def _of_capacity(found: _Document, share: float, kinds: Sequence[str]) -> PlainTable:
    rates = {(own["policy"], own["kind"]): own for own in found["rates"] if own["capacity"] == share}
    above = {own["policy"]: own for own in found["pairs"] if (own["capacity"], own["kind"]) == (share, ALL)}
    rows = []
    for spec in dict.fromkeys(spec for spec, _ in rates):
        cells = [_cell(rates[spec, ALL], ".3f"), _cell(above[spec], "+.3f") if spec in above else "-"]
        rows.append((spec, *cells, *(f"{rates[spec, kind]['mean']:.3f}" for kind in kinds)))
    title = f"{_traces_of(found)}, capacity {100 * share:g} % of the chunks"
    caption = f"{_CAPTION}; {_OF_BOUND}" if (BOUND, ALL) in rates else _CAPTION
    return PlainTable(title, ("policy", "all traces", "above lru", *kinds), rows, caption)


def _compared(found: _Document, kinds: Sequence[str]) -> PlainTable:
    """Return the table of MemLong's rule beside LRU where both go down to the same share of the capacity."""
    pairs = [pair for pair in found["pairs"] if pair["than"] != LEVEL]
    rows = []
    for spec, than, share in dict.fromkeys((pair["policy"], pair["than"], pair["capacity"]) for pair in pairs):
        own = {
            pair["kind"]: _cell(pair, "+.3f")
            for pair in pairs
            if (pair["policy"], pair["than"], pair["capacity"]) == (spec, than, share)
        }
        rows.append((spec, than, f"{100 * share:g} %", own[ALL], *(own[kind] for kind in kinds)))
    caption = "differences of the hit rate, paired by trace (± 95 %)"
    return PlainTable("MemLong's rule above LRU", ("policy", "than", "capacity", "all traces", *kinds), rows, caption)


def _cell(mean: Mapping[str, Any], form: str) -> str:
    return plus_minus(mean["mean"], mean["width"], form)


def _traces_of(found: _Document) -> str:
    count = len(found["traces"])
    return f"{count} trace{'s' * (count > 1)}"


def _traces(found: _Document) -> PlainTable:
    rows = [
        (own["name"], *(f"{own[field]:,}" for field in ("written", "most", "asked", "unknown", "evicted", "lost")))
        for own in found["traces"]
    ]
    columns = ("trace", "written", "most at once", "found", "not known", "evicted", "lost")
    caption = (
        "found: chunks by all retrievals; not known: found, and written before the recording; evicted: while it was "
        "recorded, so that their later use is not known; lost: events that the disk did not take"
    )
    return PlainTable("traces", columns, rows, caption)


def eviction_figure(found: _Document) -> Figure:
    """Return the hit rate by capacity over all traces, a line for each policy; what banks can have stands apart."""
    series: dict[str, list[Point]] = {}
    for rate in found["rates"]:
        if rate["kind"] == ALL:
            point = Point.around(100 * rate["capacity"], rate["mean"], rate["width"] or 0.0)
            series.setdefault(rate["policy"], []).append(point)
    panels = {
        "policies of banks": [spec for spec in series if of_bank(spec)],
        "one chunk at a time": [spec for spec in series if spec != BOUND and not of_bank(spec)],
    }
    return Figure(
        f"What a smaller bank still has of what was found later: {_traces_of(found)}",
        f"The mean hit rate over traces with 95 % intervals; {_OF_BOUND}.",
        "capacity, % of the chunks",
        "hit rate",
        [
            Panel(title, [Series(spec, series[spec]) for spec in (*own, BOUND) if spec in series])
            for title, own in panels.items()
            if own
        ],
    )


def cost_lines(found: _Document) -> list[str]:
    """Return what the replays cost."""
    cost = found["cost"]
    return [f"cost: {cost['seconds']:,.1f} s for {cost['replays']:,} replays, {cost['steps']:,} steps in all"]
