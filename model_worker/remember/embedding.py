"""Embedders: text to unit vectors by which chunks are found.

The default hashes words and character n-grams: no weights, no download, the same numbers on every worker. Any local
encoder folder of transformers is the other choice.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from model_worker.arguments import whole
from model_worker.errors import InputError
from model_worker.remember.encoder import EncoderEmbedder

_WORDS = re.compile(r"\w+", re.UNICODE)


class Embedder(Protocol):
    """Maps texts to `[n, dimension]` float32 rows of unit length. `digest` names the function it computes."""

    dimension: int
    digest: str

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        """Rows in the order of `texts`."""


class LexicalEmbedder:
    """Signed feature hashing of words, word pairs and character n-grams, square-root term frequency.

    n-grams: 4 characters; for words that are not ASCII 2 and 3 (Korean, Chinese). Finds shared wording, not paraphrase.
    Texts are compared in Unicode's form NFKC, in which an accent is the same however it was typed. A text without a
    word gives the zero vector, which matches nothing.
    version: 1 took texts as they were; banks that were written with it are still searched by it.
    """

    def __init__(self, dimension: int = 1024, version: int = 2):
        self.dimension, self._version = whole("dimension", dimension), version
        parts = "words pairs grams" + (" nfkc" if version > 1 else "")
        self.digest = xxhash.xxh3_128_hexdigest(f"lexical-{version} {parts} d={dimension}".encode())

    def earlier(self) -> list["LexicalEmbedder"]:
        """Earlier forms of this embedder, that banks may have been written with."""
        return [LexicalEmbedder(self.dimension, version) for version in range(1, self._version)]

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        return np.stack([self._embed(text) for text in texts]) if texts else np.zeros((0, self.dimension), np.float32)

    def _embed(self, text: str) -> NDArray[np.float32]:
        text = unicodedata.normalize("NFKC", text) if self._version > 1 else text
        hashes = np.array([xxhash.xxh3_64_intdigest(f.encode()) for f in _features(text)], dtype=np.uint64)
        features, counts = np.unique(hashes, return_counts=True)
        signs = np.where(features >> np.uint64(63), 1.0, -1.0)
        vector = np.zeros(self.dimension)
        np.add.at(vector, (features % np.uint64(self.dimension)).astype(np.int64), signs * np.sqrt(counts))
        norm = np.linalg.norm(vector)
        return (vector / norm if norm else vector).astype(np.float32)


def _features(text: str) -> list[str]:
    words = [w.lower() for w in _WORDS.findall(text)]
    features = [f"w {w}" for w in words] + [f"p {a} {b}" for a, b in pairwise(words)]
    for word in words:
        for n in (4,) if word.isascii() else (2, 3):
            features += [f"g {word[i : i + n]}" for i in range(len(word) - n + 1)]
    return features


def of_bank(embedder: Embedder, digest: str) -> Embedder:
    """The embedder that a bank of this embedder digest is searched by: an earlier form of `embedder`, or it itself."""
    if embedder.digest == digest:
        return embedder
    earlier: Callable[[], Iterable[Embedder]] = getattr(embedder, "earlier", tuple)
    return next((form for form in earlier() if form.digest == digest), embedder)


def embedder(spec: str | os.PathLike[str] | Embedder) -> Embedder:
    """`lexical`, `lexical:d=4096`, the folder of an encoder, or an embedder as it is."""
    if isinstance(spec, os.PathLike):
        return EncoderEmbedder(Path(spec))
    if not isinstance(spec, str):
        missing = [name for name in ("embed", "dimension", "digest") if not hasattr(spec, name)]
        if missing:
            raise InputError(f"embed is a string, a path or an embedder; a {type(spec).__name__} has no {missing[0]}")
        return spec
    if spec == "lexical":
        return LexicalEmbedder()
    if spec.startswith("lexical:"):
        match = re.fullmatch(r"lexical:d=([1-9]\d{0,5})", spec)
        if not match:
            raise InputError(f"embedder {spec!r}: write lexical:d=DIMENSION")
        return LexicalEmbedder(int(match[1]))
    return EncoderEmbedder(spec)
