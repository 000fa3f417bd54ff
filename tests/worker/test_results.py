"""The page of results is what the program makes of the documents that were kept, and the documents are of this code."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from model_worker.evaluate.figure import draw
from model_worker.evaluate.results import documents_in, figures, page

DOCS = Path(__file__).parents[2] / "docs"
COST = {"seconds": 12.0, "tokens": 3400, "stored": 5_600_000}


def test_the_page_is_what_the_program_writes() -> None:
    documents = documents_in(DOCS / "measured")
    assert documents
    assert page(documents) == (DOCS / "results.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_figures_are_those_of_the_documents() -> None:
    for name, figure in figures(documents_in(DOCS / "measured")).items():
        kept, now = (
            re.search("<desc>.*?</desc>", svg, re.S) for svg in ((DOCS / name).read_text("utf-8"), draw(figure))
        )
        assert kept is not None
        assert now is not None
        assert kept[0] == now[0], name  # every value; another matplotlib draws other lines


def test_each_document_has_its_figure() -> None:
    made = figures(documents_in(DOCS / "measured"))
    assert made
    assert sorted(path.name for path in DOCS.glob("results-*.svg")) == sorted(made)


def gain(memory: str, value: float) -> dict[str, Any]:
    return {"memory": memory, "gain": value, "width_blocks": 0.01, "width_documents": None}


def told(right: int) -> dict[str, Any]:
    return {"right": right, "asked": 4, "share": right / 4, "low": 0.3, "high": 0.95}


def counted(layers: list[int], right: int) -> dict[str, Any]:
    return {
        "layers": layers,
        "bytes_per_token": 10 * len(layers),
        "told": told(right),
        "kept": {"share": 1, "low": 1, "high": 1},
    }


DOCUMENTS: dict[str, dict[str, Any]] = {
    "ppl": {
        "command": "kvbank eval ppl --tokens 9",
        "model": "m",
        "window": 16,
        "gains": [
            {"memory": "none", "nats": 3.0, "perplexity": 20.1},
            {"nats": 2.9, "perplexity": 18.2, **gain("last 4", 0.1)},
            {"nats": 2.95, "perplexity": 19.1, **gain("all", 0.05)},
        ],
        "documents": [
            {"text": "a", "history": 8, "scored": 5, "nats": 3.0, "gains": [gain("last 4", 0.1), gain("all", 0.05)]}
        ],
        "distance": [{"seen": "below 4", "memory": "all", "words": 2, "gain": 0.2, "width": None}],
        "memlong": [
            {"scored": "x", "windows": 2, "nats": 2.0, "perplexity": 7.4, "gain": 0.5, "width": 0.1},
            {"scored": "y", "windows": 2, "nats": 2.3, "perplexity": 9.9},
        ],
    },
    "layers": {
        "command": "kvbank layers --choose",
        **{"model": "m", "mode": "per_layer", "positions": "zero", "context": "window", "keep": 0.95},
        **{"chunk": 8, "hits": 2, "local": 4, "fresh": 4, "ended_by_time": False},
        "tried": [{"layers": [0, 1], "nats": 1.0}, {"layers": [1], "nats": 1.1}],
        "all": counted([0, 1, 2, 4], 3),
        "chosen": counted([1], 3),
        "frontier": [counted([0, 1, 2, 4], 3), counted([1], 3)],
    },
    "facts": {
        "command": "kvbank eval facts",
        "model": "m",
        "window": 16,
        "answers": [
            {"tokens": tokens, "local": "0", "form": "complete", "wording": wording, "way": way}
            | {"right": 3, "asked": 4, "share": 0.75, "low": 0.3, "high": 0.95}
            for tokens in (10, 20)
            for wording in ("number", "all")
            for way in ("memory", "re-reading")
        ],
        "resident": [{"tokens": 8192, "bytes": 1 << 20}, {"tokens": 16384, "bytes": 3 << 19}],
        "pressure": {
            "capacity": 100,
            "policy": "frequency 0/90/50",
            "written": 9,
            "evicted": 4,
            "facts": [
                {
                    "group": "asked for",
                    "stays": {"right": 2, "asked": 2, "low": 0.3, "high": 1.0},
                    "recalled": {"right": 1, "asked": 2, "low": 0.1, "high": 0.9},
                }
            ],
        },
    },
    "ruler": {
        "command": "kvbank eval ruler",
        "model": "m",
        "window": 16,
        "rows": [
            {"tokens": 64, "task": task, "kind": "retrieval", "way": way, "right": right, "asked": asked}
            for task, way, right, asked in (
                ("single", "plain", 2, 2),
                ("single", "memory", 1, 2),
                ("single", "found", 2, 2),
                ("multi-key", "memory", 1.5, 2),
            )
        ],
    },
    "chat": {
        "command": "kvbank eval chat",
        **{"model": "m", "window": 16, "restarted": True, "load": 2.5},
        "answers": [
            {"turns": turns, "wording": wording, "way": way}
            | {"right": 3, "asked": 4, "share": 0.75, "low": 0.3, "high": 0.95}
            for turns in (50, 1000)
            for wording in ("number", "all")
            for way in ("told", "no memory", "whole")
        ],
        "conversations": [{"seed": 5, "turns": 1000, "tokens": 42_000, "told": 3, "asked": 4}],
    },
    "icl": {
        "command": "kvbank eval icl",
        **{"model": "m", "top_k": 2, "left_out": [["mr", 20]]},
        "rows": [
            {"task": "mr", "shots": 4, "way": way, "label": told(3), "greedy": told(1)}
            | {"seeds": 3, "mean": 0.7, "width": 0.1}
            for way in ("no memory", "found of all")
        ],
        "differences": [{"task": "mr", "shots": 4, "of": "found of all", "less": "vote", "mean": -0.05, "width": 0.02}],
    },
    "compression": {
        "command": "kvbank eval compression",
        "model": "m",
        **{"chunk": 8, "follow": 4, "documents": 3},
        "rows": [
            {"method": method, "budget": budget, "loss": 3.0, "low": 2.9, "high": 3.1, "above": above}
            | {"above_width": 0.02, "bytes_per_token": 100.0, "seconds": 0.5, "forward": 1.5}
            for method, budget, above in (("full", 8, 0.0), ("tova:m=2", 2, 0.1), ("tova:m=4", 4, 0.05))
        ],
    },
    "decoding": {
        "command": "kvbank eval decoding",
        "model": "m",
        **{"tokens": 64, "new": 11, "documents": 3, "threads": 1, "load": 0.5},
        "rows": [
            {"rule": rule, "kept": kept, "nats": 3.0, "low": 2.9, "high": 3.1, "above": above}
            | {"above_width": 0.02, "rate": 10.0, "bytes": kept << 17}
            for rule, kept, above in (("full", 64, 0.0), ("tova", 8, 0.1), ("window", 8, 0.4))
        ],
    },
    "passkey": {
        "command": "kvbank eval passkey",
        "model": "m",
        **{"options": {}, "trained": 64},
        "scores": [
            {"way": way, "length": 128, "right": 1, "asked": 2, "low": 0.09, "high": 0.91}
            | {"share": 0.5, "seconds": 3.0, "refused": refused}
            for way, refused in (("plain, all tokens", None), ("homer, paper", "too many leaves"))
        ],
    },
    "ttft": {
        "command": "kvbank eval ttft",
        "model": "m",
        "hits": 2,
        "chunk": 8,
        "question": 4,
        "threads": 1,
        "load": 0.5,
        "rows": [
            {"history": 64, "way": "memory", "tokens": 4, "rounds": 3, "seconds": 0.0123, "width": 0.001}
            | {"ratio": 3.2, "ratio_width": 0.1, "peak": 1 << 21}
        ],
    },
    "eviction": {
        "command": "kvbank eval eviction",
        "traces": [
            {"name": "novel-a", "kind": "novel", "written": 1200, "most": 1100, "asked": 3400}
            | {"unknown": 2, "evicted": 0, "lost": 0}
        ],
        "rates": [
            {"capacity": share, "policy": policy, "kind": kind, "traces": 1, "mean": rate, "width": None}
            for share in (0.1, 0.5)
            for policy, rate in (("frequency", 0.25), ("lru", 0.5))
            for kind in ("all", "novel")
        ],
        "pairs": [
            {"capacity": share, "policy": "frequency", "than": than, "kind": "all", "mean": 0.125, "width": 0.5}
            for share in (0.1, 0.5)
            for than in ("lru:target=50", "lru")
        ],
        "cost": {"seconds": 1.25, "replays": 26, "steps": 52_000},
    },
    "evidence": {
        "command": "kvbank eval evidence",
        "set": "statements",
        "recall": [
            {"kind": "same words", "way": "lexical", "k": 1, "share": 0.5, "low": 0.3, "high": 0.7, "asked": 60}
        ],
        "cost": [{"way": "lexical", "seconds": 2.0, "texts": 100, "cpu_seconds": 1.0}],
    },
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_every_evaluation_has_its_section(tmp_path: Path, kind: str) -> None:
    """Test that command, figures and cost of a document stand on the page, and that other documents do not."""
    document = {"evaluation": kind, "cost": COST, **DOCUMENTS[kind]}
    (tmp_path / f"{kind}-m.json").write_text(json.dumps(document), encoding="utf-8")
    (tmp_path / "other.json").write_text("[1]", encoding="utf-8")
    made = page(documents_in(tmp_path))
    assert f"\n    {document['command']}\n" in made
    assert f"(results-{kind}-m.svg)" in made
    for text in {
        "ppl": [
            "| last 4 | 2.9000 | 18.20 | +0.1000 ± 0.0100 | +0.1000 |",
            "| below 4 | 2 | +0.2000 |",
            "3,400 tokens fed",
            "| m | 1 text | 16 | all behind a history | 20.10 | 19.10 |",
            "| m | 1 text | 16 | as the release scores | 9.90 | 7.40 |",
        ],
        "facts": [
            "| 20 | 0 | complete | all | 3/4 [0.30, 0.95] |",
            "| 16,384 | 2 | 1.500 |",
            "2/2 [0.30, 1.00]",
            "| m, a CPU | 20 | 1 MiB at 8,192 | 2 MiB at 16,384 |",
        ],
        "ruler": [
            "| 64 | single | 1.00 [0.34, 1.00] | 0.50 [0.09, 0.91] | 1.00 [0.34, 1.00] |",
            "| 64 | multi-key | - | 0.75 [",
            "| 64 | all | 1.00 [0.34, 1.00] | 0.62 [",
        ],
        "compression": ["| tova:m=2 | 3.000 ± 0.100 | +0.100 ± 0.020 | 100 | 500.0 | 1.50 |", "Cost: 4 s to compress"],
        "decoding": ["| tova | 8 | 3.000 ± 0.100 | +0.100 ± 0.020 | 10.0 | 1.0 |", "Cost: 9 s to decode"],
        "passkey": [
            "| read | 128 tokens (2x) |",
            "| plain, all tokens | 1/2 [0.09, 0.91] 3.0 s |",
            "| homer, paper | refused |",
            "homer, paper is refused: too many leaves",
            "Cost: 6 s for the answers",
        ],
        "layers": [
            "| 0-2, 4 | 4 | chooses | 0.75 [0.30, 0.95] | 1.00 [1.00, 1.00] | 40 |",
            "Chosen: 1 of 4 layers (1), 3 of 4 told (3 by all), 10 bytes a token in place of 40.",
            "2 sets tried in the search.",
        ],
        "chat": [
            "after a restart of service and worker, window 16",
            "; load average 2.5\n",
            "| 1,000 | all | 3/4 [0.30, 0.95] | 3/4 [0.30, 0.95] |",
            "| 5 | 1,000 | 42,000 | 3/4 |",
        ],
        "icl": [
            "| mr | 4 | found of all | 3/4 [0.30, 0.95] | 0.700 ± 0.100 | 1/4 [0.30, 0.95] |",
            "| mr | 4 | found of all | vote | -0.050 ± 0.020 |",
            "| mr | 20 |",
            "| m, 2 found of all | mr | 4 | 75.0 | 75.0 | - |",
        ],
        "ttft": ["| 64 | memory | 4 | 12 ± 1 | 3.20 ± 0.10 | 2 |"],
        "eviction": [
            "1 trace, capacity 10 % of the chunks",
            "| frequency | 0.250 | +0.125 ± 0.500 |",
            "| frequency | lru:target=50 | 50 % | +0.125 ± 0.500 |",
            "| novel-a | 1,200 | 1,100 | 3,400 | 2 | 0 | 0 |",
            "1.2 s for 26 replays, 52,000 steps",
        ],
        "evidence": ["| lexical | 0.50 [0.30, 0.70] |", "50 texts a second"],
    }[kind]:
        assert text in made, text
    [(name, figure)] = figures(documents_in(tmp_path)).items()
    assert name == f"results-{kind}-m.svg"
    assert "<svg" in draw(figure)
