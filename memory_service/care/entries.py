"""What the records say of every chunk, page by page. This file owns that rows are not trusted: one that cannot be used
has a flaw."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row

from memory_service.care.folder import Folder
from memory_service.domain.model import Payload
from memory_service.domain.tenants import bank_title
from memory_service.storage.local.records import bank_rows, row_flaws

_PAGE = 512
_BANKS = "SELECT bank_id, uid, tenant, name, chunks FROM banks ORDER BY bank_id"
_PAGES = "WHERE c.bank_id = ? AND c.chunk_id > ? AND c.chunk_id <= ? ORDER BY c.chunk_id LIMIT ?"


@dataclass(frozen=True, slots=True)
class BankEntry:
    """A bank of some tenant as its row says it, with its number of chunks of a moment ago; `dimension` is None where
    the row cannot be read."""

    bank_id: int
    uid: str
    tenant: str
    name: str
    dimension: int | None
    chunks: int

    @property
    def title(self) -> str:
        """Return how the bank is called for people; see `bank_title`."""
        return bank_title(self.tenant, self.name)


@dataclass(frozen=True, slots=True)
class Entry:
    """A chunk as its row says it. Where the row has a `flaw` (a sentence), nothing else of it can be relied on."""

    bank: BankEntry
    chunk_id: int
    payload: Payload | None
    flaw: str = ""


def banks(folder: Folder) -> list[BankEntry]:
    """Read every bank that is not being deleted."""
    with folder.read() as connection:
        rows = connection.exec_driver_sql(_BANKS).all()
        dimensions = [_dimension(connection, row.bank_id) for row in rows]
    return [
        BankEntry(row.bank_id, row.uid, row.tenant, row.name, dimension, row.chunks)
        for row, dimension in zip(rows, dimensions, strict=True)
    ]


def pages(folder: Folder, bank: BankEntry, *, whole: bool) -> Iterator[list[Entry]]:
    """Yield pages of the chunks that a bank has now, ascending by id; what is written later is left out, so that this
    ends.

    whole: whether to look at their text, token ids and embedding too, and so at the checksums of their rows.
    """
    statement = f"{row_flaws.WHOLE if whole else row_flaws.NARROW} {_PAGES}"
    with folder.read() as connection:
        last = connection.exec_driver_sql("SELECT max(chunk_id) FROM chunks WHERE bank_id = ?", (bank.bank_id,))
        end = last.scalar() or 0
    after = -(2**63)
    while True:
        with folder.read() as connection:
            # One after the other: a text may have megabytes.
            rows = connection.exec_driver_sql(statement, (bank.bank_id, after, end, _PAGE))
            page = [_entry(bank, row) for row in rows]
        if not page:
            return
        yield page
        after = page[-1].chunk_id


def _dimension(connection: Connection, bank_id: int) -> int | None:
    try:
        bank = bank_rows.get(connection, bank_id)
        return None if bank is None else int(bank.embedding.dimension)
    except (ValueError, KeyError, TypeError):
        return None


def _entry(bank: BankEntry, row: Row[Any]) -> Entry:
    payload, flaw = row_flaws.checked(row._mapping, bank.uid, bank.dimension)
    return Entry(bank, row.chunk_id, payload, flaw)
