"""An embedder that notes the texts it is given: chunks that are written, and what a memory is asked for."""

import numpy as np
from numpy.typing import NDArray

from kvbank.embed.lexical import LexicalEmbedder


class NotingEmbedder(LexicalEmbedder):
    """The lexical embedder, which notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        """Note the texts and embed them."""
        self.noted += texts
        return super().embed(texts)
