"""The findings of care, and its refusals: problems by kind, totals, the one line of an error."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    # the records
    "database",
    "bank",
    "tenant",
    "usage",
    "record",
    "key",
    "key_missing",
    "expiry",
    "id",
    "orphan_row",
    "session",
    "turn",
    # the payloads
    "payload_missing",
    "payload_damaged",
    "payload_unreadable",
    "payload_mark",
    "orphan_file",
    "set_aside",
    # the index
    "index_damaged",
    "orphan_index",
    # the whole folder
    "open_to_others",
    # a backup
    "manifest",
]

# Is called with a stage and how much of it is done, of how much in all, in a unit of the stage.
Progress = Callable[[str, int, int], None]


class CareError(Exception):
    """The error of work that cannot be done; its text is one line for the operator."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a folder that is not as it should be; `path` is relative to the folder, `bank` is the title of a
    bank (`domain.tenants.bank_title`)."""

    kind: Kind
    detail: str
    bank: str = ""
    chunk_id: int | None = None
    path: str = ""


@dataclass
class Findings:
    """Problems in the order in which they were found, and what was looked at."""

    problems: list[Problem] = field(default_factory=list)
    totals: Counter[str] = field(default_factory=Counter)

    def add(self, kind: Kind, detail: str, *, bank: str = "", chunk_id: int | None = None, path: str = "") -> None:
        """Add one more problem."""
        self.problems.append(Problem(kind, detail, bank, chunk_id, path))


def quiet(stage: str, done: int, total: int) -> None:
    """Ignore the progress of a stage."""
