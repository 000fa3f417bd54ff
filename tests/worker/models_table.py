"""The table of models in docs/worker.md: `python -m tests.worker.models_table` judges all of them and writes it."""

from collections.abc import Mapping
from pathlib import Path

import transformers

from tests.worker import zoo
from tests.worker.exactness import Verdict, judge

MARKS = ("<!-- models: begin -->", "<!-- models: end -->")


def table(verdicts: Mapping[str, Verdict]) -> str:
    """Families by verdict, as markdown."""
    rows = {"**exact**": [f for f, verdict in verdicts.items() if verdict.backends]}
    for family, verdict in verdicts.items():
        if verdict.reason:
            rows.setdefault(f"refused: {verdict.kind}", []).append(family)
    rows |= {f"not tried: {reason}": [family] for family, reason in zoo.UNBUILT.items()}
    head = [f"transformers {transformers.__version__}: {len(zoo.NAMES)} families", "", "| | families |", "|---|---|"]
    return "\n".join(head + [f"| {what} | {', '.join(sorted(families))} |" for what, families in sorted(rows.items())])


if __name__ == "__main__":
    docs = Path(__file__).parents[2] / "docs" / "worker.md"
    before, rest = docs.read_text().split(MARKS[0])
    judged = {family: judge(zoo.build(family)) for family in sorted(zoo.NAMES - zoo.UNBUILT.keys())}
    docs.write_text(f"{before}{MARKS[0]}\n{table(judged)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
