"""What one memory did so far, in counts and times."""

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class MemoryStats:
    """Counts of what a `Memory` did since it was made.

    written: chunks that were stored. gone: chunks out of the spool that had been stored and were gone since, and stayed
    gone. evicted: chunks evicted by this memory's writes, without those that the service evicts afterwards. spooled,
    dropped: chunks that went to the spool, and that were given up. recalls, failed_recalls: those that were answered,
    and those that were not. tokens, stored_tokens: tokens of the chunks before and after compression. bytes_before,
    bytes_after: bytes of their K-V (or soft tokens) before and after compression, without positions. reread_tokens:
    tokens of chunks that were fed again before a prompt (`recall="reread"`). recall_seconds: how long each of the last
    recalls took.
    """

    written: int = 0
    gone: int = 0
    evicted: int = 0
    spooled: int = 0
    dropped: int = 0
    recalls: int = 0
    failed_recalls: int = 0
    tokens: int = 0
    stored_tokens: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    reread_tokens: int = 0
    recall_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=4096))
