"""Tables in which what was measured here stands beside what MemLong's paper reports (arXiv 2408.16967).

The models differ: the paper's have 3 to 7 billion weights and are trained on billions of tokens. So a pair of figures
of one model, without and with a memory, can be compared with such a pair, and a figure alone with nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from model_worker.evaluate.perplexity import ALL, NONE
from model_worker.evaluate.plain_table import PlainTable

_Documents = Sequence[Mapping[str, Any]]
_Rows = list[tuple[str, ...]]
_PAPER = "paper: "
# model, text, context, tokens that are scored, perplexity without a memory and with it.
_PERPLEXITY: _Rows = [
    (f"{_PAPER}LLaMA-2-7B", "PG19", "1,024", "all", "10.82", "-"),
    (f"{_PAPER}MemLong-3B", "PG19", "1,024", "all", "-", "10.66"),
    (f"{_PAPER}MemLong-3B, 32k tokens of memory", "Proof-pile", "16,384", "the last 2,048 of a window", "-", "2.99"),
]
# model, tasks, demonstrations in the context, per cent of the labels without a memory, with it, by a vote.
_LABELS: _Rows = [
    (f"{_PAPER}OpenLLaMA-3B", "five", "4", "68.9", "-", "-"),
    (f"{_PAPER}MemLong-3B, 4 in memory", "five", "4", "-", "69.8", "-"),
    (f"{_PAPER}OpenLLaMA-3B", "five", "20", "69.0", "-", "-"),
    (f"{_PAPER}LongLLaMA-3B", "five", "20", "-", "72.7", "-"),
    (f"{_PAPER}MemLong-3B, 18 in memory", "five", "20", "-", "73.4", "-"),
]
_LONGEST: _Rows = [(f"{_PAPER}MemLong-3B, a GPU of 24 GB", "80,000", "-", "-")]


def paper_tables(documents: _Documents) -> list[PlainTable]:
    """Return the paper's three tables with our figures below; none where nothing of that kind was measured."""
    made = (_perplexity(documents), _labels(documents), _longest(documents))
    return [table for table in made if any(not row[0].startswith(_PAPER) for row in table.rows)]


def _of(documents: _Documents, kind: str) -> _Documents:
    return [found for found in documents if found["evaluation"] == kind]


def _perplexity(documents: _Documents) -> PlainTable:
    rows = [*_PERPLEXITY]
    for found in _of(documents, "ppl"):
        count, window = len(found["documents"]), f"{found['window']:,}"
        texts = "1 text" if count == 1 else f"{count} texts"
        own = {row["memory"]: f"{row['perplexity']:.2f}" for row in found["gains"]}
        rows.append((found["model"], texts, window, "all behind a history", own[NONE], own[ALL]))
        if found.get("memlong"):
            with_memory, without = (f"{row['perplexity']:.2f}" for row in found["memlong"][:2])
            rows.append((found["model"], texts, window, "as the release scores", without, with_memory))
    columns = ["model", "text", "context", "scored", "without memory", "with memory"]
    caption = (
        "tokens of another tokenizer are not the same tokens: 1,024 pieces (kvbank-small), 49,152 (SmolLM2), 32,000 "
        "(LLaMA). From 4,096 tokens on the paper scores the last 2,048 of a window with memory, and all without; its "
        "memory is never emptied, and the scored text chooses from it"
    )
    return PlainTable("Perplexity without and with a memory", columns, rows, caption)


def _labels(documents: _Documents) -> PlainTable:
    rows = [*_LABELS]
    for found in _of(documents, "icl"):
        for shots in dict.fromkeys(row["shots"] for row in found["rows"]):
            rows += _mean_rows(found, shots)
    columns = ["model", "tasks", "in context", "without memory", "with memory", "vote"]
    caption = (
        "per cent of the labels, mean over tasks; the paper's five are SST-2, MR, Subj, SST-5 and MPQA. A vote of the "
        "demonstrations that memory attends to needs no model"
    )
    return PlainTable("Labels by demonstrations", columns, rows, caption)


def _mean_rows(found: Mapping[str, Any], shots: int) -> Iterator[tuple[str, ...]]:
    """Yield a row for each way of finding demonstrations, with so many in the context."""
    shares: dict[str, dict[str, float]] = {}
    for row in found["rows"]:
        if row["shots"] == shots:
            shares.setdefault(row["way"], {})[row["task"]] = row["label"]["share"]
    means = {way: f"{100 * sum(own.values()) / len(own):.1f}" for way, own in shares.items()}
    for way, mean in means.items():
        if way.startswith("found"):
            name, tasks = f"{found['model']}, {found['top_k']} {way}", ", ".join(shares[way])
            yield name, tasks, str(shots), means["no memory"], mean, means.get("vote", "-")


def _longest(documents: _Documents) -> PlainTable:
    rows = [*_LONGEST]
    for found in _of(documents, "facts"):
        if found.get("resident"):
            first, last = found["resident"][0], found["resident"][-1]
            sizes = (f"{own['bytes'] / (1 << 20):,.0f} MiB at {own['tokens']:,}" for own in (first, last))
            read = max(row["tokens"] for row in found["answers"])
            rows.append((f"{found['model']}, a CPU", f"{read:,}", *sizes))
    columns = ["model", "tokens read", "the worker's memory at first", "and later"]
    caption = "the chunks are in the service; what the worker holds of them does not grow with the text"
    return PlainTable("Long texts on one worker", columns, rows, caption)
