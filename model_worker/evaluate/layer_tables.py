"""The table of a choice of layers, made of the same document that `kvbank layers --choose --json` prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from model_worker.evaluate.memory_tables import cost_line
from model_worker.evaluate.plain_table import PlainTable

_Document = Mapping[str, Any]


def layer_tables(found: _Document) -> list[PlainTable]:
    """Return the sets of layers that were counted, with what each tells and the bytes that a token takes."""
    counted = [("chooses", own) for own in found["frontier"]]
    counted += [("confirms", own) for own in (found["all"], found["chosen"])]
    rows = [
        (
            _runs(own["layers"]),
            str(len(own["layers"])),
            stage,
            f"{own['told']['share']:.2f} [{own['told']['low']:.2f}, {own['told']['high']:.2f}]",
            f"{own['kept']['share']:.2f} [{own['kept']['low']:.2f}, {own['kept']['high']:.2f}]",
            f"{own['bytes_per_token']:,}",
        )
        for stage, own in counted
    ]
    title = (
        f"{found['model']}, {found['mode']}: facts told with memory in a set of layers, {found['fresh']} facts each, "
        f"chunks of {found['chunk']} tokens ({found['context']}), {found['hits']} hits, {found['positions']}"
    )
    columns = ["layers", "number", "count that", "told", "share of what all tell", "bytes/token"]
    caption = (
        f"half of the facts are asked for behind {found['local']} tokens of other text; 95 % intervals: Wilson's, "
        "and of a paired ratio"
    )
    return [PlainTable(title, columns, rows, caption)]


def layer_lines(found: _Document) -> list[str]:
    """Return what was chosen, what it saves, and what the choice cost, in lines."""
    few, every = found["chosen"], found["all"]
    if len(few["layers"]) == len(every["layers"]):
        lines = [
            f"no smaller set that was found keeps {found['keep']:.0%} of the recall: all {len(few['layers'])} layers"
        ]
    else:
        lines = [
            f"chosen: {len(few['layers'])} of {len(every['layers'])} layers ({_runs(few['layers'])}), "
            f"{few['told']['right']} of {few['told']['asked']} told ({every['told']['right']} by all), "
            f"{few['bytes_per_token']:,} bytes a token in place of {every['bytes_per_token']:,}"
        ]
    if found["mode"] == "memlong":
        lines.append("mode memlong stores one memory layer: fewer retrieval layers save attention, and no bytes")
    ended = ", ended by --minutes" if found["ended_by_time"] else ""
    return [*lines, f"{len(found['tried'])} sets tried in the search{ended}", cost_line(found)]


def _runs(layers: Sequence[int]) -> str:
    """Return ascending layers as text, neighbours together: `0, 2-5`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
