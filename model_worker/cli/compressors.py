"""`kvbank compressors` says how chunks can be compressed."""

from kvbank.console.table import Column
from model_worker.cli.shown import AsJson, Shown, Table, show


def compressors(as_json: AsJson = False) -> None:
    """List the compressors, with how to ask for each, what it keeps, its paper and its cost.

    Example: kvbank compressors --json
    """
    from model_worker.compress import REGISTRY, usage

    rows = [{"write": usage(name), "keeps": m.about, "paper": m.paper, "cost": m.cost} for name, m in REGISTRY.items()]
    # A space, so that lines end between parameters.
    cells = [[row["write"].replace("[,", " [,"), row["keeps"], row["paper"], row["cost"]] for row in rows]
    columns = [Column(title, "prose") for title in ("write", "keeps", "paper", "cost")]
    show(Shown(rows, [Table(columns, cells)]), as_json=as_json)
