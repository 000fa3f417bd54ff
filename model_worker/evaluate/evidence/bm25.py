"""BM25 (Robertson and Walker 1994; Robertson and Zaragoza 2009): the yardstick of every search by words.

The words are those of the lexical embedder, in lower case. k1 = 1.5 and b = 0.75; the inverse document frequency is
log(1 + (N - n + 0.5) / (n + 0.5)), which unlike the first form is never negative.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_K1, _B = 1.5, 0.75
_WORDS = re.compile(r"\w+", re.UNICODE)


class Bm25:
    """Scores passages by the words that they share with a query."""

    def __init__(self, passages: Sequence[str]):
        counts = [Counter(_words(passage)) for passage in passages]
        lengths = np.array([count.total() for count in counts], np.float64)
        self._count = len(passages)
        self._penalty = _K1 * (1 - _B + _B * lengths / max(lengths.mean(), 1e-9))
        self._places: dict[str, list[tuple[int, int]]] = {}
        for place, count in enumerate(counts):
            for word, often in count.items():
                self._places.setdefault(word, []).append((place, often))

    def scores(self, query: str) -> NDArray[np.float64]:
        """Return the score of each passage; a word that stands twice in the query counts twice."""
        found = np.zeros(self._count)
        for word in _words(query):
            held = self._places.get(word, [])
            rarity = math.log(1 + (self._count - len(held) + 0.5) / (len(held) + 0.5))
            for place, often in held:
                found[place] += rarity * often * (_K1 + 1) / (often + self._penalty[place])
        return found


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(unicodedata.normalize("NFKC", text))]
