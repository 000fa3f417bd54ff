"""The table of models in docs/worker.md: `python tests/worker/models_table.py` judges all of them and writes it."""

import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import transformers
import zoo
from exactness import Verdict, judge

MARKS = ("<!-- models: begin -->", "<!-- models: end -->")


def table(verdicts: Mapping[str, Verdict]) -> str:
    """Families by verdict, as markdown."""
    rows = {"**exact**": [f for f, verdict in verdicts.items() if verdict.backends]}
    for family, verdict in verdicts.items():
        if verdict.reason:
            rows.setdefault(f"refused: {verdict.kind}", []).append(family)
    rows |= {f"not tried: {reason}": [family] for family, reason in zoo.UNBUILT.items()}
    head = [f"transformers {transformers.__version__}: {len(zoo.CLASSES)} families", "", "| | families |", "|---|---|"]
    return "\n".join(head + [f"| {what} | {', '.join(sorted(families))} |" for what, families in sorted(rows.items())])


if __name__ == "__main__":
    docs = Path(__file__).parents[2] / "docs" / "worker.md"
    before, rest = docs.read_text().split(MARKS[0])
    judged = {family: judge(zoo.build(family)) for family in sorted(zoo.CLASSES.keys() - zoo.UNBUILT.keys())}
    docs.write_text(f"{before}{MARKS[0]}\n{table(judged)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
