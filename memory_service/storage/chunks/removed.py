"""What is known of chunks that were removed from a bank."""

from collections.abc import Mapping
from typing import NamedTuple

from memory_service.domain.model import EvictionReason, Unit

# Microseconds for which the key of a chunk that is gone stays known.
SPENT_KEY_US = 24 * 3600 * 1_000_000


class Removed(NamedTuple):
    """Chunks that were removed, and what they had taken."""

    ids: list[int]
    tokens: int
    bytes: int
    # How many were evicted for each reason; nothing for a removal.
    reasons: Mapping[EvictionReason, int] = {}

    def size(self, unit: Unit) -> int:
        """Return what the chunks had taken, in the unit of a capacity."""
        return {"chunks": len(self.ids), "tokens": self.tokens, "bytes": self.bytes}[unit]
