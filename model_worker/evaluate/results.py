"""The page of results is written here from the documents that `kvbank eval ... --json` printed, with their commands.

`python -m model_worker.evaluate.results docs/measured docs` writes docs/results.md and its figures; a document counts
that says which evaluation it is of. So nothing on the page is typed by hand, and a document that is replaced changes
the page.
"""

import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_worker.evaluate.beside_paper import paper_tables
from model_worker.evaluate.chat_report import chat_figure, chat_tables
from model_worker.evaluate.compression_report import compression_lines, compression_picture, compression_tables
from model_worker.evaluate.decoding_report import decoding_figure, decoding_lines, decoding_tables
from model_worker.evaluate.eviction import report as eviction
from model_worker.evaluate.evidence.report import cost_lines, recall_figure, recall_tables
from model_worker.evaluate.figure import Figure, draw
from model_worker.evaluate.icl_report import icl_figure, icl_tables
from model_worker.evaluate.layer_figures import layers_figure
from model_worker.evaluate.layer_tables import layer_lines, layer_tables
from model_worker.evaluate.memory_figures import facts_figure, first_token_figure, perplexity_figure, session_figure
from model_worker.evaluate.memory_tables import (
    cost_line,
    facts_tables,
    first_token_tables,
    perplexity_tables,
    session_tables,
)
from model_worker.evaluate.passkey_report import answers_line, passkey_figure, passkey_tables
from model_worker.evaluate.plain_table import PlainTable
from model_worker.evaluate.ruler.report import ruler_figure, ruler_tables

PAGE = "results.md"
_WIDTH = 120
_Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Section:
    """A section of the page: its title, what its evaluation does, and what is made of a document of it."""

    title: str
    about: str
    tables: Callable[[_Document], Sequence[PlainTable]]
    figure: Callable[[_Document], Figure]
    costs: Callable[[_Document], Sequence[str]]


def _cost(found: _Document) -> list[str]:
    return [cost_line(found)]


def _answers(found: _Document) -> list[str]:
    return [answers_line(found)]


def _evidence_figure(found: _Document) -> Figure:
    return recall_figure(f"{found['set']}: evidence among the best k", found)


_SECTIONS = {
    "ppl": _Section(
        "Loss of long texts",
        "All tokens of a span behind a history are scored, in the same local window for every memory. The past alone "
        "chooses what is recalled. `last N` finds chunks of the last N tokens of the text, `all` of the whole history, "
        "`another text` of another text; `recent alone` attends to the last chunks that left the window, and finds "
        "nothing. The text is read once, without recalling, and its bank serves all memories. A gain is paired, token "
        "by token. MemLong's own protocol, where it stands below, scores the last segment of a window with a memory "
        "that this segment chooses; it is here to be compared with published figures, and not with the others.",
        perplexity_tables,
        perplexity_figure,
        _cost,
    ),
    "facts": _Section(
        "Facts behind a long text",
        "Facts about made-up names stand in the beginning of a text. When so many tokens were read as the table says, "
        "each fact is asked for: in a window without other text (local text 0), behind so many tokens of other text, "
        "or behind as many as fit (`full`). The search of a question is made once. `memory` attends to the K-V of its "
        "hits, `re-reading` reads the tokens of the same hits before the question with the plain model, `nothing` has "
        "neither; `chunk found` counts the questions for which a hit holds the answer.",
        facts_tables,
        facts_figure,
        _cost,
    ),
    "ruler": _Section(
        "RULER's tasks",
        "Prompts after RULER (arXiv 2404.06654), made by us: what is expected is looked for in the greedy answer, and "
        "the share that stands there counts. `plain` reads the whole prompt, where the model was trained for so many "
        "tokens. For the others the text is read into a bank first, and the question is searched for once: `memory` "
        "attends to the K-V of the hits, `re-reading` reads the tokens of the same hits before the question; `found` "
        "is the share of what is expected that stands in the hits. One search cannot follow a chain of variables or "
        "count the words of a list.",
        ruler_tables,
        ruler_figure,
        _cost,
    ),
    "chat": _Section(
        "Facts told in a conversation",
        "Facts about made-up names are told in the first turns of a conversation, a turn each. After so many turns of "
        "other sentences as the table says, all of them are asked for, a turn each, through the sessions that `kvbank "
        "chat` has. `told` asks the session itself; where the table says so, the service was killed and started "
        "before that, and a new process asks. `whole context` has the whole conversation in the window of the model, "
        "where it was trained for that length; `no memory` has the same window as `told`, and recalls nothing. The "
        "other columns say what must be right for a fact to be told: that its statement stands whole in a chunk, that "
        "the chunk with its answer is found, that it is told from the same bank by a question in an empty window. What "
        "is said behind a place is said in a fork of the conversation, which has none of the questions.",
        chat_tables,
        chat_figure,
        _cost,
    ),
    "icl": _Section(
        "Labels told by demonstrations in memory",
        "A text is asked for its label behind demonstrations in the context, and with others in a memory, a chunk "
        "each, as in MemLong's table. `found of N` searches among N that are drawn anew for each text, as MemLong's "
        "code does; `found of all` among all of the bank; `random` attends to as many without a search. `vote` is no "
        "model: the label that most of those have that `found of all` attends to. Texts and demonstrations of the "
        "context are drawn by each seed; no text that is asked for stands in the bank.",
        icl_tables,
        icl_figure,
        _cost,
    ),
    "evidence": _Section(
        "Evidence found",
        "The share of questions for which a passage with the evidence is among the best k of all passages, by "
        "embedder; BM25 and chance stand beside them. No language model takes part.",
        recall_tables,
        _evidence_figure,
        cost_lines,
    ),
    "eviction": _Section(
        "Eviction",
        "Recorded retrievals of unbounded banks are replayed with banks that hold a share of the chunks: a hit is a "
        "chunk that a retrieval found and that is still there. `frequency`, `recency_half` and `lru` with a target are "
        "policies of banks; those that make room for one chunk at a time are of caches. `belady` and `bound` know the "
        "future. The word before the first hyphen of a trace's name is its kind: reading a novel, facts that are asked "
        "for again and again while a novel is read, a shift to another novel and back, a chat, and meetings that are "
        "asked about one after the other.",
        eviction.eviction_tables,
        eviction.eviction_figure,
        eviction.cost_lines,
    ),
    "ttft": _Section(
        "Time to the first token",
        "The same question is answered behind histories of several lengths: from recalled K-V (which come from the "
        "service, or are held by the worker already), by reading the hits again, and by reading all again. The ways "
        "take turns, and each searches for itself. Reading the history the first time is no part of the time.",
        first_token_tables,
        first_token_figure,
        _cost,
    ),
    "session": _Section(
        "A long text and many questions",
        "A text is read once, and questions made of pieces of it are answered greedily, one after the other: from the "
        "K-V that a bank has, by reading the same hits again, and by the plain model, which keeps the K-V of the whole "
        "text in its process (time and memory follow from shapes, also beyond the length of its training). Kept are "
        "K-V and embeddings in the service, texts and embeddings, and K-V in the process.",
        session_tables,
        session_figure,
        _cost,
    ),
    "compression": _Section(
        "Loss behind compressed chunks",
        "The loss of the text behind a chunk, with what each method leaves of the chunk at its own positions in all "
        "layers; all methods on the same documents, compared with the loss behind the whole chunk (`full`).",
        compression_tables,
        compression_picture,
        compression_lines,
    ),
    "decoding": _Section(
        "Decoding with a bounded cache",
        "The text's own next tokens are decoded behind a prompt, one by one, with the full cache and a part of it: "
        "`tova` keeps what the last token attends to most, `sinks` the first 4 tokens and the last ones, `window` the "
        "last ones alone. All caches see the same tokens.",
        decoding_tables,
        decoding_figure,
        decoding_lines,
    ),
    "passkey": _Section(
        "Numbers in the middle of long prompts",
        "A fact in the middle of a text is asked for at its end, in prompts longer than the model was trained for, or "
        "is taken to be trained for: by the plain model, by the plain model with the last tokens alone, and by HOMER.",
        passkey_tables,
        passkey_figure,
        _answers,
    ),
    "layers": _Section(
        "Layers that remember",
        "Facts are planted in chunks of a text, which are encoded once in all layers, and asked for with the K-V of "
        "one set of layers at a time. The search takes layer after layer away, guided by the log-probability of the "
        "answers to a few facts. Facts that it did not see choose the smallest of its sets that keeps the recall of "
        "all, and others again confirm the choice.",
        layer_tables,
        layers_figure,
        layer_lines,
    ),
}
_BESIDE_PAPER = """## Beside the figures of MemLong's paper

The paper's figures (arXiv 2408.16967) are of models of 3 to 7 billion weights, trained with retrieval on 0.5 billion
tokens; those measured here are of kvbank-small (2.2 million) and SmolLM2 (135 million, untrained for a memory). Only
what a memory changes in one model can be compared, and not the figures of different models.
"""
_HEAD = """# Results

What a memory is worth, measured by `kvbank eval` and `kvbank layers`. This page is written by a program from the JSON
documents in [measured](measured), each of which a command printed:
`python -m model_worker.evaluate.results docs/measured docs` writes the page anew. Every command below prints its
document with `--json`. Files and folders are named without the place where they lay.
"""


def page(documents: Mapping[str, _Document]) -> str:
    """Return the page in Markdown. documents: by the name of their file, without its suffix."""
    return "\n".join([_HEAD, *_body(documents)])


def _body(documents: Mapping[str, _Document]) -> Iterator[str]:
    for kind, section in _SECTIONS.items():
        own = {name: found for name, found in documents.items() if found["evaluation"] == kind}
        if own:
            yield f"## {section.title}\n\n{textwrap.fill(section.about, _WIDTH)}\n"
        for name, found in own.items():
            yield f"    {found['command']}\n"
            for table in section.tables(found):
                yield f"{table.markdown()}\n"
            yield f"![{section.figure(found).title}]({_picture(name)})\n"
            yield "\n".join(f"{line[0].upper()}{line[1:]}." for line in section.costs(found)) + "\n"
    if tables := paper_tables([*documents.values()]):
        yield _BESIDE_PAPER
        yield from (f"{table.markdown()}\n" for table in tables)


def figures(documents: Mapping[str, _Document]) -> dict[str, Figure]:
    """Return the figures of the page by file name."""
    return {_picture(name): _SECTIONS[found["evaluation"]].figure(found) for name, found in documents.items()}


def _picture(name: str) -> str:
    return f"results-{name}.svg"


def documents_in(folder: Path) -> dict[str, _Document]:
    """Return the documents of the page in a folder, by the names of their files."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return {
        name: document
        for name, document in found.items()
        if isinstance(document, dict) and document.get("evaluation") in _SECTIONS
    }


if __name__ == "__main__":
    measured, docs = map(Path, sys.argv[1:3])
    known = documents_in(measured)
    (docs / PAGE).write_text(page(known), encoding="utf-8")
    for file, figure in figures(known).items():
        (docs / file).write_text(draw(figure), encoding="utf-8")
