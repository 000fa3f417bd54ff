"""Two embedders as one: meaning and wording both count."""

from itertools import product

import numpy as np
import xxhash

from model_worker.arguments import finite
from model_worker.embed.base import Embedder, Vectors, earlier_forms, embedded, embedded_queries, name_of, unit
from model_worker.errors import InputError

# The share of the first embedder's cosine, measured with lexical:idf and MiniLM (docs/worker.md).
WEIGHT = 0.2


class HybridEmbedder:
    """Embeds a text so that the inner product of two rows is `weight` x first cosine + (1 - weight) x second cosine.

    A row is the rows of the two embedders, at unit length and times the roots of the weights, one behind the other. A
    text in which an embedder sees nothing has zeros in that part and a row that is shorter than 1, so that the missing
    cosine counts as 0; the row is not stretched, which would give the other cosine more weight than in other chunks.
    Raises InputError for a weight that is not between 0 and 1.
    """

    def __init__(self, first: Embedder, second: Embedder, weight: float = WEIGHT):
        self.first, self.second, self.weight = first, second, finite("weight", weight, above=0.0)
        if self.weight >= 1:
            raise InputError(f"weight is between 0 and 1, not {weight:g}")
        self.dimension = first.dimension + second.dimension
        self.name = f"hybrid:{name_of(first)}+{name_of(second)},w={self.weight:g}"
        described = f"hybrid-1 {self.weight!r} {first.digest} {second.digest}"
        self.digest = xxhash.xxh3_128_hexdigest(described.encode())

    def earlier(self) -> list["HybridEmbedder"]:
        """Return the hybrids of the earlier forms of the two embedders."""
        forms = product(*([part, *earlier_forms(part)] for part in (self.first, self.second)))
        return [HybridEmbedder(first, second, self.weight) for first, second in forms][1:]

    def embed(self, texts: list[str]) -> Vectors:
        """Return a row for each of `texts`."""
        return self._joined(embedded(self.first, texts), embedded(self.second, texts))

    def embed_queries(self, texts: list[str]) -> Vectors:
        """Return a row for each of `texts`, which are searched for."""
        return self._joined(embedded_queries(self.first, texts), embedded_queries(self.second, texts))

    def _joined(self, first: Vectors, second: Vectors) -> Vectors:
        parts = unit(first) * np.sqrt(self.weight), unit(second) * np.sqrt(1 - self.weight)
        return np.concatenate(parts, axis=1).astype(np.float32)
