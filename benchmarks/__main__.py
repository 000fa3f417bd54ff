"""Run all comparisons, print a table, write build/bench.json."""

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import decode, store
from benchmarks.pair import Result

OUTPUT = Path("build/bench.json")


def main() -> None:
    """Ours beside the floor, row by row."""
    console = Console()
    results: list[Result] = []
    with console.status("start") as status:
        results.extend(store.run(status.update))
        status.update("decode")
        results.append(decode.run())
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    table = Table(title="medians; ratio = ours / floor", title_justify="left")
    for column in ("what", "ours, ms", "floor, ms", "ratio", "floor", "n", "load"):
        table.add_column(column, justify="left" if column in ("what", "floor") else "right")
    for r in results:
        row = (f"{r.ours:.2f}", f"{r.floor:.2f}", f"{r.ratio:.2f}", r.floor_is, str(r.n), f"{r.load_average:.1f}")
        table.add_row(r.name, *row)
    console.print(table)
    console.print(f"written to {OUTPUT}")


if __name__ == "__main__":
    main()
