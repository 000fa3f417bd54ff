"""Which tokens are forgotten: turns of branches, and the chunks that have their tokens, or had attended to them."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from memory_service.domain.sessions import BRANCH
from memory_service.domain.validate import LARGEST_INT64

# Why a chunk goes: its tokens are forgotten, or it had attended to such.
Why = Literal["of them", "attended"]


class Span(NamedTuple):
    """Turns of one branch, by their numbers, both included, and the tokens of the session before the first and up to
    the last."""

    branch: str
    first: int
    last: int
    begin: int
    end: int


class Part(NamedTuple):
    """The tokens of a branch between two offsets of its session."""

    branch: str
    begin: int
    end: int = LARGEST_INT64


class Chosen(NamedTuple):
    """Chunks that go, by id: those of forgotten tokens, and those that had attended to them."""

    of_them: list[int]
    attended: list[int]


class Forgotten(NamedTuple):
    """Parts of branches whose tokens are forgotten, and parts behind those, whose tokens were seen together with
    them."""

    parts: Sequence[Part]
    behind: Sequence[Part] = ()

    @property
    def branches(self) -> list[str]:
        """Return the names of all branches."""
        return [part.branch for part in (*self.parts, *self.behind)]

    def why(self, branch: object, start: int, length: int, context: object) -> Why | None:
        """Return why a chunk goes; None for one that stays. context: that of its producer."""
        if any(part.branch == branch and start < part.end and start + length > part.begin for part in self.parts):
            return "of them"
        if context == "window" and any(part.branch == branch and start >= part.begin for part in self.behind):
            return "attended"
        return None

    def why_of_row(self, row: Mapping[str, Any]) -> Why | None:
        """Do as `why` for a row of `chunks` with its contents, as quarantine keeps it. Errors: ValueError, TypeError,
        KeyError for one that cannot be read."""
        producer: Mapping[str, Any] = {}
        with suppress(KeyError, IndexError):
            producer = json.loads(row["payload"] or "[]")[1]
        branch = json.loads(row["meta"]).get(BRANCH)
        return self.why(branch, int(row["start"]), int(row["original_length"]), producer.get("context"))
