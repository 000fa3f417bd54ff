"""Embedders turn texts into the unit vectors by which chunks are found.

The default one hashes words and character n-grams: no weights, no download, the same numbers on every worker. A local
encoder of transformers (`encoder.py`) is the other choice.
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
from torch import Tensor

from model_worker.arguments import whole
from model_worker.errors import InputError
from model_worker.remember.encoder import EncoderEmbedder

_WORDS = re.compile(r"\w+", re.UNICODE)


class Embedder(Protocol):
    """Maps texts to `[n, dimension]` float32 rows of unit length. `digest` names the function it computes."""

    dimension: int
    digest: str

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        """Return a row for each of `texts`, in their order."""


class LexicalEmbedder:
    """Embeds a text by signed feature hashing of its words, word pairs and character n-grams.

    Each feature counts by the square root of its frequency. n-grams have 4 characters, in words that are not ASCII 2
    and 3 (Korean, Chinese). Shared wording is found, a paraphrase is not. Texts are compared in Unicode's form NFKC, in
    which an accent is the same however it was typed. A text without a word gives the zero vector, which matches
    nothing. version: 1 took texts as they were; banks that were written with version 1 are still searched by it.
    """

    def __init__(self, dimension: int = 1024, version: int = 2):
        self.dimension, self._version = whole("dimension", dimension), version
        parts = "words pairs grams" + (" nfkc" if version > 1 else "")
        self.digest = xxhash.xxh3_128_hexdigest(f"lexical-{version} {parts} d={dimension}".encode())

    def earlier(self) -> list["LexicalEmbedder"]:
        """Return the earlier forms of this embedder, which older banks were written with."""
        return [LexicalEmbedder(self.dimension, version) for version in range(1, self._version)]

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        """Return a row for each of `texts`; a text without a word gives the zero vector."""
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
    """Return the form of `embedder` that has `digest`, the embedder digest of a bank; `embedder` where none has it."""
    if embedder.digest == digest:
        return embedder
    earlier: Callable[[], Iterable[Embedder]] = getattr(embedder, "earlier", tuple)
    return next((form for form in earlier() if form.digest == digest), embedder)


def embedder(spec: str | os.PathLike[str] | Embedder) -> Embedder:
    """Make the embedder of a name, or of an encoder's folder; an embedder comes back as it is.

    spec: `lexical`, `lexical:d=4096` (the dimension), or a folder. Raises InputError for a name or an object that is
    none, ModelNotFound for a folder without an encoder.
    """
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


def embedded(embedder: Embedder, texts: list[str]) -> NDArray[np.float32]:
    """Return the vectors of `texts`, `[n, dimension]` float32.

    Raises InputError for an embedder that gives anything else than finite numbers of that shape.
    """
    found: object = embedder.embed(texts)
    if isinstance(found, Tensor):
        found = found.detach().float().cpu().numpy()
    try:
        vectors = np.asarray(found, np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"the embedder returned what is no array of numbers: {error}") from None
    if vectors.shape != (len(texts), embedder.dimension) or not np.isfinite(vectors).all():
        raise InputError(
            f"the embedder returned an array of shape {vectors.shape}; finite numbers of shape "
            f"({len(texts)}, {embedder.dimension}) are expected"
        )
    return vectors
