"""What a measurement cost is counted here: seconds, tokens that the model was fed, bytes that were stored.

Tokens are counted where they enter the decoder, so that none is forgotten and none is counted twice.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from model_worker.attachment.model_parts import decoder_of, plain


@dataclass(slots=True)
class Cost:
    """Seconds that went by, tokens that the model was fed, and bytes of K-V and embeddings that banks took."""

    seconds: float = 0.0
    tokens: int = 0
    stored: int = 0

    def add(self, other: Mapping[str, Any]) -> None:
        """Add the cost that a document of `asdict` tells, of a part that was measured before."""
        self.seconds += other["seconds"]
        self.tokens += other["tokens"]
        self.stored += other["stored"]


@contextmanager
def counted(model: nn.Module, cost: Cost) -> Iterator[Cost]:
    """Add to `cost` the seconds of the block, and the tokens of all rows that the model is fed in it."""

    def fed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        cost.tokens += 0 if ids is None else ids.numel()

    hook = decoder_of(plain(model)).register_forward_pre_hook(fed, with_kwargs=True)
    begin = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds += time.perf_counter() - begin
        hook.remove()
