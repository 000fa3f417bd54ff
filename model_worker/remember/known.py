"""What a bank has of a document already, so that a document is read again from its first difference on."""

from collections.abc import Iterable
from dataclasses import dataclass

import kvbank
from model_worker.remember.document import SOURCE


@dataclass(frozen=True, slots=True)
class Known:
    """What a bank has of a document.

    chunks: how many of its first chunks are there. tokens: how many tokens they have. others: ids of chunks under its
    name that are not among them, which an earlier state of the document has left.
    """

    chunks: int
    tokens: int
    others: list[int]


def known_of(client: kvbank.Client, bank: str, source: str, chunks: Iterable[list[int]]) -> Known:
    """Return what a bank has of the document `source`. chunks: the token ids of all its chunks, in order."""
    there, others = dict[int, kvbank.Chunk](), list[int]()
    for chunk in client.list_chunks(bank, filter=kvbank.Filter(metadata={SOURCE: source})):
        if (before := there.get(chunk.start)) is not None:
            others.append(before.chunk_id)
        there[chunk.start] = chunk
    count = tokens = 0
    for ids in chunks:
        found = there.get(tokens)
        if found is None or list(found.token_ids) != ids:
            break
        del there[tokens]
        count, tokens = count + 1, tokens + len(ids)
    return Known(count, tokens, [*others, *(chunk.chunk_id for chunk in there.values())])
