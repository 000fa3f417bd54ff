"""What a request has cost, in tokens, and how that follows from the turn of its answer (pure).

The figures of an answer are those that its caller was told, whenever and wherever they are asked for again: what a turn
does not say of itself stands beside it, as `Before`.
"""

from dataclasses import dataclass, replace

import kvbank


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request. prompt: what the model had before it when it answered.

    cached: those of them that were not fed in this request: they stood in the window, or were recalled. written: tokens
    that the request has written to the memory.
    """

    prompt: int
    completion: int
    cached: int = 0
    written: int = 0


@dataclass(frozen=True, slots=True)
class Before:
    """What a request did in its session before the turn of its answer, in tokens.

    tokens: of the session, before the request. again: fed again, because the window had to be made anew. told: fed of
    turns that took place elsewhere. stood: what stood before the first of those; None where there was none. written: to
    the memory, before the answer's own turn was there.
    """

    tokens: int
    again: int = 0
    told: int = 0
    stood: int | None = None
    written: int = 0

    def and_told(self, turn: kvbank.Turn) -> "Before":
        """Return the same with a turn more that was told."""
        count = turn.usage
        return replace(
            self,
            told=self.told + count["prompt_tokens"] + count["output_tokens"],
            stood=count["cached_tokens"] if self.stood is None else self.stood,
        )

    def usage(self, turn: kvbank.Turn) -> Usage:
        """Return the tokens of the request whose answer is a turn."""
        count = turn.usage
        stood = count["cached_tokens"] if self.stood is None else self.stood
        cached = max(0, min(stood, self.tokens) - self.again)
        return Usage(
            prompt=cached + self.again + self.told + count["prompt_tokens"],
            completion=count["output_tokens"],
            cached=cached,
            written=self.written + count["cache_write_tokens"],
        )
