"""The figure of a choice of layers, made of the same document that `kvbank layers --choose --json` prints."""

from collections.abc import Mapping
from typing import Any

from model_worker.evaluate.figure import Figure, Panel, Point, Series


def layers_figure(found: Mapping[str, Any]) -> Figure:
    """Return the recall of sets of layers by their size, counted on facts that the search did not see."""
    points = [Point.of_share(float(len(own["layers"])), own["told"]) for own in found["frontier"]]
    chosen, every = found["chosen"], found["all"]
    confirmed = {len(own["layers"]): own for own in (every, chosen)}
    again = [Point.of_share(float(size), own["told"]) for size, own in confirmed.items()]
    return Figure(
        f"{found['model']}: recall by the number of layers with memory",
        f"Facts told of {found['fresh']}, with Wilson's 95 % intervals. "
        f"{len(chosen['layers'])} layers were chosen: {', '.join(map(str, chosen['layers']))}. Bytes a token: "
        f"{chosen['bytes_per_token']:,} in place of {every['bytes_per_token']:,}.",
        "layers with memory",
        "share of facts told",
        [Panel("", [Series("sets of the search", points), Series("confirmed on other facts", again)])],
        doubling=False,
    )
