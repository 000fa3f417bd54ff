"""The losses of documents become a report here: the gain of each memory, pooled, by document and by rare word.

A gain is the loss without a memory less the loss with it, in nats a token, of the same tokens. Its interval over blocks
takes groups of neighbouring blocks as independent (`GROUP` tokens); its interval over documents takes documents as
independent, by Student's t.
"""

from collections.abc import Mapping, Sequence
from math import exp
from typing import Any

import torch
from torch import Tensor

from model_worker.evaluate.interval import interval_of_few
from model_worker.evaluate.last_seen import bin_of, bins
from model_worker.evaluate.perplexity import NONE, blocks_of

GROUP = 512
_Part = Mapping[str, Any]


def part(name: str, history: int, losses: Mapping[str, Tensor], words: Sequence[Any], scored_from: int) -> _Part:
    """Return what is kept of a measured document, as plain values.

    words: rare words (`last_seen.Seen`) among the scored tokens, which begin at `scored_from`.
    """
    nats = {memory: [round(value, 5) for value in own.tolist()] for memory, own in losses.items()}
    seen = [(word.first - scored_from, word.stop - scored_from, word.distance) for word in words]
    return {"text": name, "history": history, "nats": nats, "words": seen}


def gains(parts: Sequence[_Part]) -> list[dict[str, Any]]:
    """Return a row for each memory: its loss, and its gain over no memory with both intervals."""
    rows: list[dict[str, Any]] = []
    for memory in _memories(parts):
        own = [_nats(part, memory) for part in parts]
        nats = float(torch.cat(own).mean())
        rows.append({"memory": memory, "nats": nats, "perplexity": exp(nats)})
        if memory != NONE:
            rows[-1] |= _gain([_nats(part, NONE) - with_it for part, with_it in zip(parts, own, strict=True)])
    return rows


def _gain(differences: Sequence[Tensor]) -> dict[str, Any]:
    """Return mean and half widths of paired differences, one tensor of tokens for each document."""
    groups = interval_of_few(torch.cat([blocks_of(own, min(GROUP, len(own))) for own in differences]))
    documents = interval_of_few(torch.stack([own.mean() for own in differences]))
    return {
        "gain": float(torch.cat(list(differences)).mean()),
        "width_blocks": groups.known_width,
        "width_documents": documents.known_width,
    }


def by_document(parts: Sequence[_Part]) -> list[dict[str, Any]]:
    """Return a row for each document: its loss without a memory, and the gain of each memory over blocks."""
    rows = []
    for part in parts:
        none = _nats(part, NONE)
        row: dict[str, Any] = {"text": part["text"], "history": part["history"], "scored": len(none)}
        row["nats"] = float(none.mean())
        row["gains"] = [
            {"memory": memory, **_gain([none - _nats(part, memory)])} for memory in part["nats"] if memory != NONE
        ]
        rows.append(row)
    return rows


def by_distance(parts: Sequence[_Part], edges: Sequence[int]) -> list[dict[str, Any]]:
    """Return the gain in nats a word of rare words, by how many tokens ago each was last seen, for each memory.

    edges: of the bins, ascending, in tokens. The interval is over words.
    """
    rows = []
    for name in bins(edges):
        for memory in _memories(parts):
            found = [
                float(difference[first:stop].sum())
                for part in parts
                for difference in [_nats(part, NONE) - _nats(part, memory)]
                for first, stop, distance in part["words"]
                if bin_of(distance, edges) == name
            ]
            if found and memory != NONE:
                own = interval_of_few(torch.tensor(found, dtype=torch.float64))
                rows.append(
                    {"seen": name, "memory": memory, "words": len(found), "gain": own.mean, "width": own.known_width}
                )
    return rows


def _memories(parts: Sequence[_Part]) -> list[str]:
    """Return the memories that all documents were measured with, in the order of the first."""
    return [memory for memory in parts[0]["nats"] if all(memory in part["nats"] for part in parts)]


def _nats(part: _Part, memory: str) -> Tensor:
    return torch.tensor(part["nats"][memory], dtype=torch.float64)
