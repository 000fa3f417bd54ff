"""How long ago each rare word of a text was last seen, in tokens: memory should help with words seen long ago.

A word is rare that has at least four letters and occurs at most `MOST` times in the document. The module is pure.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from model_worker.user_text import encode_text, readable

MOST, LEAST_LETTERS = 8, 4
_WORDS = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Words:
    """The tokens of a text, and where its words stand among them.

    ids: token ids. spans: first token and token behind the last of each word, ascending. words: in small letters.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    words: list[str]

    def between(self, begin: int, end: int) -> "Words":
        """Return the tokens from `begin` to before `end`, with the words that stand wholly in them."""
        inside = [index for index, (first, stop) in enumerate(self.spans) if begin <= first and stop <= end]
        spans = [(self.spans[index][0] - begin, self.spans[index][1] - begin) for index in inside]
        return Words(self.ids[begin:end], spans, [self.words[index] for index in inside])


def words_of(tokenizer: Any, text: str) -> Words:
    """Return the tokens and words of a text; without words where the tokenizer does not say where its tokens stand."""
    text = readable(text)
    ids = encode_text(tokenizer, text)
    if not getattr(tokenizer, "is_fast", False):
        return Words(ids, [], [])
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if list(made["input_ids"]) != ids:  # a control token stood in the text
        return Words(ids, [], [])
    ends = [end for _, end in made["offset_mapping"]]
    spans, words, at = [], [], 0
    for match in _WORDS.finditer(text):
        while at < len(ends) and ends[at] <= match.start():
            at += 1
        stop = at
        while stop < len(ends) and ends[stop] < match.end():
            stop += 1
        if stop < len(ends):
            spans.append((at, stop + 1))
            words.append(match[0].lower())
    return Words(ids, spans, words)


@dataclass(frozen=True, slots=True)
class Seen:
    """A rare word at the tokens from `first` to before `stop`; `distance` tokens after it was last seen, or never."""

    first: int
    stop: int
    distance: int | None


def rare_words(text: Words, begin: int) -> list[Seen]:
    """Return the rare words of a document from the token `begin` on, with how long ago each was last seen."""
    counts = Counter(text.words)
    last: dict[str, int] = {}
    found = []
    for word, (first, stop) in zip(text.words, text.spans, strict=True):
        if counts[word] <= MOST and len(word) >= LEAST_LETTERS and word.isalpha():
            if first >= begin:
                found.append(Seen(first, stop, first - last[word] + 1 if word in last else None))
            last[word] = stop
    return found


def bin_of(distance: int | None, edges: Sequence[int]) -> str:
    """Return the name of the bin of a distance. edges: ascending, in tokens."""
    if distance is None:
        return "never seen"
    return next((name for name, edge in zip(bins(edges), edges, strict=False) if distance < edge), bins(edges)[-2])


def bins(edges: Sequence[int]) -> list[str]:
    """Return the names of all bins between `edges` and beyond them, nearest first, and the one of unseen words."""
    between = [f"{low:,} to {high:,}" for low, high in pairwise(edges)]
    return [f"below {edges[0]:,}", *between, f"{edges[-1]:,} and more", "never seen"]
