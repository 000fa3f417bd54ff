"""What forgetting asks of an engine's statements. An engine has a module of functions for each protocol here; a
function that changes rows runs in a transaction that changes, one that only reads also in one that reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import Connection

from memory_service.domain.forgetting import Receipt
from memory_service.storage.access.rows import AccessRows
from memory_service.storage.forgetting.parts import Part
from memory_service.storage.forgetting.receipt_row import Pending
from memory_service.storage.sessions.rows import Rows
from memory_service.storage.sessions.turn_row import Gone


class ReceiptRows(Protocol):
    """The rows of what was forgotten. What is being forgotten is written down before anything of it goes, and its row
    is done only when all is gone: so what a kill has interrupted is found."""

    def insert(
        self, connection: Connection, tenant: str, subject: str, receipt: Receipt, work: Mapping[str, Any]
    ) -> Pending:
        """Write down what is to be forgotten, and drop what was kept long enough. subject: names what was asked for.
        work: its `ids` are those of chunks; see `ids_of`."""

    def ids_of(self, connection: Connection, receipt_id: str) -> list[int]:
        """Return the ids of the chunks that are to be forgotten."""

    def get(self, connection: Connection, receipt_id: str) -> Receipt:
        """Read the receipt of an id."""

    def save(self, connection: Connection, receipt: Receipt) -> None:
        """Replace what a receipt counts."""

    def done(self, connection: Connection, receipt_id: str) -> None:
        """Note that all is gone."""

    def drop(self, connection: Connection, receipt_id: str) -> None:
        """Drop the receipt of an id."""

    def earlier(self, connection: Connection, tenant: str, subject: str, but: str = "") -> Receipt | None:
        """Return the newest receipt of what was asked for before; None where it was not. but: the id of one that does
        not count."""

    def pending(self, connection: Connection) -> list[Pending]:
        """Return what is not done, oldest first."""


class ForgottenTurnRows(Protocol):
    """The rows of turns and branches, as forgetting asks for them."""

    def ends(self, connection: Connection, branch: str, first: int, last: int) -> list[tuple[int, int]]:
        """Return the tokens of the session before and up to each of two turns of a branch, as far as they are there."""

    def is_part(self, connection: Connection, branch: str, number: int) -> bool:
        """Tell whether a turn has a part of a message whose answer is in a later one."""

    def behind(self, connection: Connection, branch: str, first: int) -> list[Part]:
        """Return the parts of branches that go on behind a turn of a branch, or a later one."""

    def having(self, connection: Connection, branch: str, first: int, behind: Sequence[str]) -> dict[str, str]:
        """Return id and tenant of the sessions that go on with a branch, and have the turn `first` of it, or go on with
        one of the branches behind."""

    def note_gone(self, connection: Connection, branch: str, start: int, now: int) -> None:
        """Note that the tokens of a branch from an offset on are gone for good."""


class TenantRows(Protocol):
    """The rows of a tenant that is forgotten."""

    def delete_sessions(self, connection: Connection, name: str) -> tuple[int, list[str]]:
        """Delete the sessions of a tenant, their windows, and the receipts of what it had forgotten; return how many
        sessions there were, and the names of the files of the windows. Turns and branches are left."""

    def clear_some_turns(self, connection: Connection, tenant: str, most: int) -> Gone:
        """Delete at most `most` turns of a tenant whose sessions are gone."""

    def clear_branches(self, connection: Connection, tenant: str) -> None:
        """Delete the branches of a tenant whose turns are gone."""

    def banks_of(self, connection: Connection, tenant: str) -> list[tuple[int, str]]:
        """Return id and uid of each bank of a tenant."""


@dataclass(frozen=True, slots=True)
class ForgettingRows:
    """The statements of an engine for what it forgets."""

    sessions: Rows
    access: AccessRows
    receipts: ReceiptRows
    turns: ForgottenTurnRows
    tenants: TenantRows
