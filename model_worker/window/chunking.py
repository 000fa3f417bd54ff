"""A text is cut into chunks here: a chunk is the unit that is written, retrieved, counted and evicted."""

from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from typing import Any

from model_worker.errors import InputError

_ENDS = (".", "!", "?", "。", "\n")


def chunks(
    token_ids: Sequence[int], size: int, ends: frozenset[int] = frozenset(), cuts: Collection[int] = ()
) -> Iterator[list[int]]:
    """Cut token ids into consecutive pieces of at most `size` tokens.

    A piece ends before the first of the places `cuts` in `token_ids` that it reaches, as before the next turn of a
    conversation. Where it reaches none, it ends behind the last token of `ends` in its second half, so that a sentence
    is rarely cut; where no such token is there, the piece has `size` tokens. Raises InputError for a size below 1.
    """
    if size < 1:
        raise InputError(f"a chunk has at least 1 token, not {size}")
    begin = 0
    while begin < len(token_ids):
        stop = min(begin + size, len(token_ids))
        if reached := [cut for cut in cuts if begin < cut <= stop]:
            stop = min(reached)
        elif stop < len(token_ids):
            half = begin + (size + 1) // 2
            stop = next((i + 1 for i in range(stop - 1, half - 1, -1) if token_ids[i] in ends), stop)
        yield list(token_ids[begin:stop])
        begin = stop


@lru_cache(maxsize=8)
def sentence_ends(tokenizer: Any) -> frozenset[int]:
    """Find the ids of the tokens that end a sentence or a line, in the tokenizer's vocabulary."""
    ids = list(tokenizer.get_vocab().values())
    texts = tokenizer.batch_decode([[i] for i in ids])
    return frozenset(i for i, text in zip(ids, texts, strict=True) if text.rstrip(" ").endswith(_ENDS))
