"""Embedders: text to unit vectors by which chunks are found.

The default hashes words and character n-grams: no weights, no download, the same numbers on every worker. Any local
encoder folder of transformers is the other choice.
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from model_worker.errors import InputError, ModelNotFound

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
    A text without a word gives the zero vector, which matches nothing.
    """

    def __init__(self, dimension: int = 1024):
        self.dimension = dimension
        self.digest = xxhash.xxh3_128_hexdigest(f"lexical-1 words pairs grams d={dimension}".encode())

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        return np.stack([self._embed(text) for text in texts]) if texts else np.zeros((0, self.dimension), np.float32)

    def _embed(self, text: str) -> NDArray[np.float32]:
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


class EncoderEmbedder:
    """Mean-pooled last hidden state of a local encoder, normalised."""

    def __init__(self, folder: str | Path):
        import torch
        from transformers import AutoModel, AutoTokenizer

        from model_worker.digest import reader_of

        if not (Path(folder) / "config.json").is_file():
            raise ModelNotFound(f"{folder} is not the folder of an encoder: it has no config.json")
        self._torch = torch
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).eval()
        self.dimension = int(self._model.config.hidden_size)
        self.digest = xxhash.xxh3_128_hexdigest(f"mean {reader_of(self._model, self._tokenizer).digest}".encode())

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        with self._torch.no_grad():
            batch = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            hidden = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            return self._torch.nn.functional.normalize(mean, dim=-1).float().numpy()  # type: ignore[no-any-return]


def embedder(spec: str) -> Embedder:
    """`lexical`, `lexical:d=4096`, or the folder of an encoder."""
    if spec == "lexical":
        return LexicalEmbedder()
    if spec.startswith("lexical:"):
        match = re.fullmatch(r"lexical:d=([1-9]\d{0,5})", spec)
        if not match:
            raise InputError(f"embedder {spec!r}: write lexical:d=DIMENSION")
        return LexicalEmbedder(int(match[1]))
    return EncoderEmbedder(spec)
