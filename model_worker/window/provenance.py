"""What a bank says of a chunk that it gave, for people who ask where an answer comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a recalled chunk comes from, as its bank had it when it gave the chunk.

    bank: the bank's name. text: the chunk's text. metadata: the chunk's own. created: when the bank stored the chunk.
    retrievals: how often the bank had counted the chunk as retrieved
    before. score: of the query that found the chunk.
    """

    bank: str
    text: str
    metadata: Mapping[str, str | int | float | bool]
    created: datetime
    retrievals: int
    score: float
