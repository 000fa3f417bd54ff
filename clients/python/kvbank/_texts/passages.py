"""Texts are cut into passages here, each of which is embedded and stored as one chunk."""

import re
from collections.abc import Iterator

# Letters of a passage: a paragraph or two.
LONGEST = 1000
# Where a passage may end, the best first: behind a paragraph, a sentence (of any of the scripts that mark its end), a
# line, a word.
_ENDS = tuple(
    re.compile(pattern) for pattern in (r"\n\s*\n", r"[.!?…]['\")\]»”’]*\s+|[。！？।؟۔]['\")\]»”’]*\s*", r"\n", r"\s+")
)


def passages(text: str, longest: int = LONGEST) -> Iterator[tuple[int, str]]:
    """Yield the passages of a text with the offset of each, in letters.

    Joined they are the text again, but for passages of blanks alone, which are left out.

    longest: the most letters of a passage. A passage ends behind the last paragraph that fits, else behind a sentence,
    a line or a word, unless it would be shorter than half of `longest`.
    """
    start = 0
    while start < len(text):
        end = len(text) if len(text) - start <= longest else start + _length(text[start : start + longest])
        if not text[start:end].isspace():
            yield start, text[start:end]
        start = end


def _length(window: str) -> int:
    """Return how many letters of a window, which the text goes on behind, make a passage."""
    for end in _ENDS:
        found = None
        for found in end.finditer(window, len(window) // 2):  # noqa: B007 (the last one counts)
            pass
        if found is not None:
            return found.end()
    return len(window)
