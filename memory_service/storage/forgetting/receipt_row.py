"""What the row of a forgetting says. This file owns that it says nothing of what was forgotten: ids, numbers and
checksums alone."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from memory_service.domain.forgetting import ForgottenChunk, Receipt

# Microseconds for which receipts are kept, and branches of sessions that were forgotten are known.
KEPT_US = 30 * 86_400 * 1_000_000
_COUNTED = ("chunks", "turns", "tokens", "bytes", "places", "turns_kept", "chunks_to_make_again")


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
    """Return what a receipt counts, as JSON."""
    said = asdict(receipt)
    chunks = [(each.bank, each.chunk_id, each.checksum) for each in receipt.chunks]
    return json.dumps({name: said[name] for name in _COUNTED} | {"chunks": chunks})


def receipt_of(receipt_id: str, time: int, key_id: str, target: str, counts: str) -> Receipt:
    """Make a receipt of what its row says. counts: as `counts_of` makes them."""
    found = json.loads(counts)
    chunks = tuple(ForgottenChunk(*each) for each in found.pop("chunks"))
    return Receipt(receipt_id, time, key_id, target, chunks, **found)
