"""What was forgotten for good, as plain values. This file owns what a receipt says: counts, ids and checksums, and
nothing of what was forgotten."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

# Chunks that a receipt names one by one; of those beyond there is the count in `places`.
MOST_NAMED = 10_000


class ForgottenChunk(NamedTuple):
    """A chunk that was forgotten. checksum: that of its payload, 0 for one that has none."""

    bank: str
    chunk_id: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was forgotten, in counts.

    time: when it was asked for, in microseconds since 1970. key_id: of the key by which it was asked for, "" for the
    owner of the store. target: what was asked for, in a sentence. chunks: the first `MOST_NAMED` of them. places: where
    something went, with how much. turns_kept: turns that stay because forks have them. chunks_to_make_again: those that
    had attended to what was forgotten, and went with it. remains: what no service can clear, and who can, in words; ""
    where all is gone.
    """

    receipt_id: str
    time: int
    key_id: str
    target: str
    chunks: tuple[ForgottenChunk, ...] = ()
    turns: int = 0
    tokens: int = 0
    bytes: int = 0
    places: Mapping[str, int] = field(default_factory=dict)
    turns_kept: int = 0
    chunks_to_make_again: int = 0
    remains: str = ""

    @property
    def is_empty(self) -> bool:
        """Tell whether nothing went."""
        return not (self.turns or any(self.places.values()))

    def plus(
        self,
        *,
        turns: int = 0,
        tokens: int = 0,
        size: int = 0,
        chunks: Sequence[ForgottenChunk] = (),
        kept: int = 0,
        again: int = 0,
        **places: int,
    ) -> "Receipt":
        """Return the receipt with more that went. size: in bytes. places: how much went, by place."""
        return replace(
            self,
            chunks=self.chunks if len(self.chunks) == MOST_NAMED else (*self.chunks, *chunks)[:MOST_NAMED],
            turns=self.turns + turns,
            tokens=self.tokens + tokens,
            bytes=self.bytes + size,
            places=dict(self.places) | {name: self.places.get(name, 0) + count for name, count in places.items()},
            turns_kept=self.turns_kept + kept,
            chunks_to_make_again=self.chunks_to_make_again + again,
        )
