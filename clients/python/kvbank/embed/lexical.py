"""The lexical embedders hash words, word pairs and character n-grams: no weights of a network, no download.

The vectors are the same numbers on every worker. `lexical` counts all features alike, `lexical:idf` counts a feature by
how rare it is (see idf_table.py).
"""

import re
import unicodedata
from itertools import pairwise

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvbank._arguments import integer
from kvbank._exceptions import InvalidArgument
from kvbank.embed.base import Vectors
from kvbank.embed.idf_table import IdfTable, shipped_table

_WORDS = re.compile(r"\w+", re.UNICODE)
LEXICAL = re.compile(r"lexical(?P<idf>:idf)?(?:[:,]d=(?P<dimension>[1-9]\d{0,5}))?")


class LexicalEmbedder:
    """Embeds a text by signed feature hashing of its words, word pairs and character n-grams.

    Each feature counts by the square root of its frequency, and by its weight in `table` where one is given. n-grams
    have 4 characters, in words that are not ASCII 2 and 3 (Korean, Chinese). Shared wording is found, a paraphrase is
    not. Texts are compared in Unicode's form NFKC, in which an accent is the same however it was typed. A text without
    a word gives the zero vector, which matches nothing. version: 1 took texts as they were, and had no table; banks
    that were written with version 1 are still searched by it.
    """

    def __init__(self, dimension: int = 1024, version: int = 2, table: IdfTable | None = None):
        self.dimension, self._version, self._table = integer("dimension", dimension, (1, 2**31 - 1)), version, table
        name, join = ("lexical", ":") if table is None else ("lexical:idf", ",")
        self.name = name if self.dimension == 1024 else f"{name}{join}d={self.dimension}"
        parts = "words pairs grams" + (" nfkc" if version > 1 else "") + (f" idf {table.digest}" if table else "")
        self.digest = xxhash.xxh3_128_hexdigest(f"lexical-{version} {parts} d={dimension}".encode())

    def earlier(self) -> list["LexicalEmbedder"]:
        """Return the earlier forms of this embedder, which older banks were written with."""
        versions = range(1, self._version) if self._table is None else ()
        return [LexicalEmbedder(self.dimension, version) for version in versions]

    def embed(self, texts: list[str]) -> Vectors:
        """Return a row for each of `texts`; a text without a word gives the zero vector."""
        return np.stack([self._embed(text) for text in texts]) if texts else np.zeros((0, self.dimension), np.float32)

    def _embed(self, text: str) -> Vectors:
        _, hashes, values = self._weighed(text)
        vector = np.zeros(self.dimension)
        np.add.at(vector, (hashes % np.uint64(self.dimension)).astype(np.int64), values)
        norm = np.linalg.norm(vector)
        return (vector / norm if norm else vector).astype(np.float32)

    def _weighed(self, text: str) -> tuple[list[str], NDArray[np.uint64], NDArray[np.float64]]:
        """Return the features of a text, each once, with their hashes and their signed weights."""
        text = unicodedata.normalize("NFKC", text) if self._version > 1 else text
        found = features(text)
        hashes, first, counts = np.unique(hashed(found), return_index=True, return_counts=True)
        signs = np.where(hashes >> np.uint64(63), 1.0, -1.0)
        values = signs * np.sqrt(counts)
        names = [found[index] for index in first]
        if self._table is not None:
            values *= self._table.weights(hashes, np.array([name.isascii() for name in names], dtype=bool))
        return names, hashes, values

    def shared(self, query: str, text: str) -> dict[str, float]:
        """Return what the features that two texts share add to the score of one for the other, by feature.

        A feature is a word ("w snow"), a word pair ("p old mill") or an n-gram ("g mill"). What features that fall into
        the same number of the vectors add by chance is in no feature's share.
        """
        names, hashes, values = self._weighed(query)
        _, others, weights = self._weighed(text)
        norms = float(np.linalg.norm(values) * np.linalg.norm(weights))
        _, here, there = np.intersect1d(hashes, others, assume_unique=True, return_indices=True)
        return {names[i]: float(values[i] * weights[j]) / norms for i, j in zip(here, there, strict=True)}


def is_lexical(spec: str) -> bool:
    """Tell whether a spec is written as one of a lexical embedder, whether or not its parts make sense."""
    return spec == "lexical" or spec.startswith("lexical:")


def lexical(spec: str) -> LexicalEmbedder:
    """Return the embedder of `lexical`, `lexical:d=N`, `lexical:idf` or `lexical:idf,d=N`. Errors: InvalidArgument."""
    match = LEXICAL.fullmatch(spec)
    if not match or (match["dimension"] and ("," in spec) != bool(match["idf"])):
        text = f"embedder {spec!r}: write lexical:d=DIMENSION, lexical:idf or lexical:idf,d=DIMENSION"
        raise InvalidArgument(text, reason="INVALID_FIELD", metadata={"field": "embed"})
    return LexicalEmbedder(int(match["dimension"] or 1024), table=shipped_table() if match["idf"] else None)


def features(text: str) -> list[str]:
    """Return the words, word pairs and character n-grams of a text, each as often as it occurs."""
    words = [w.lower() for w in _WORDS.findall(text)]
    found = [f"w {w}" for w in words] + [f"p {a} {b}" for a, b in pairwise(words)]
    for word in words:
        for n in (4,) if word.isascii() else (2, 3):
            found += [f"g {word[i : i + n]}" for i in range(len(word) - n + 1)]
    return found


def hashed(found: list[str]) -> NDArray[np.uint64]:
    """Return the hash of each feature, the same in every process."""
    return np.array([xxhash.xxh3_64_intdigest(feature.encode()) for feature in found], dtype=np.uint64)
