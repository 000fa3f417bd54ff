"""What the row of a forgetting says. This file owns that it says nothing of what was forgotten: ids, numbers and
checksums alone."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from memory_service.domain.forgetting import ForgottenChunk, Receipt

# Microseconds for which receipts are kept, and branches of sessions that were forgotten are known.
KEPT_US = 30 * 86_400 * 1_000_000
_COUNTED = ("turns", "tokens", "bytes", "places", "turns_kept", "chunks_to_make_again")
_CHUNKS = ', "chunks": '


class Pending(NamedTuple):
    """A forgetting that is not done. subject: names what was asked for. work: what is to be done, of ids and numbers,
    without the ids of chunks; its `kind` says how it is read."""

    receipt_id: str
    tenant: str
    subject: str
    work: Mapping[str, Any]


def of_tenant(name: str) -> str:
    """Return the subject of the forgetting of a tenant."""
    return f"tenant {name}"


def counts_of(receipt: Receipt) -> str:
    """Return what a receipt counts, as JSON, its chunks last."""
    numbers = json.dumps({name: getattr(receipt, name) for name in _COUNTED})
    return f"{numbers[:-1]}{_CHUNKS}{_text_of(receipt.chunks)}}}"


def receipt_of(receipt_id: str, time: int, key_id: str, target: str, counts: str) -> Receipt:
    """Make a receipt of what its row says. counts: as `counts_of` makes them, or an earlier version, with its chunks
    elsewhere."""
    numbers, last, chunks = counts.partition(_CHUNKS)
    found = json.loads(f"{numbers}}}" if last else counts)
    named = _chunks_of(chunks[:-1] if last else json.dumps(found.pop("chunks")))
    return Receipt(receipt_id, time, key_id, target, named, **found)


# A receipt names thousands of chunks, and when these are all that it names they stay the same from step to step.
@lru_cache(2)
def _text_of(chunks: tuple[ForgottenChunk, ...]) -> str:
    return json.dumps(chunks)


@lru_cache(2)
def _chunks_of(text: str) -> tuple[ForgottenChunk, ...]:
    return tuple(map(ForgottenChunk._make, json.loads(text)))
