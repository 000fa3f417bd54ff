"""A look at a bank that is taken for what the followers know of it. This file owns that the database is asked whether
the bank is that together with what is read of it, in one message: to ask first would cost a message of its own."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from memory_service.domain.model import Bank, Chunk
from memory_service.storage.base import Ids, Vectors
from memory_service.storage.chunks.counts import Unwritten
from memory_service.storage.postgres.feed import Known
from memory_service.storage.postgres.rows import bank_rows, chunk_rows
from memory_service.storage.postgres.view import PostgresView

# Chunks of which whole rows are read where vectors are asked for.
_FEW = 64


class ForesightView(PostgresView):
    """A view of a bank as it is known, each read of which may show the rows of its own moment."""

    def __init__(self, connection: Connection, unwritten: Unwritten, known: Known) -> None:
        """Look through a connection that is in no transaction. unwritten: see `PostgresView`."""
        super().__init__(connection, unwritten)
        self._question = bank_rows.unchanged_values(*known, unwritten.now)
        # Whether the bank is as it is known; None before the database has said it.
        self._unchanged: bool | None = None
        # The rows that were read, by chunk id.
        self._rows: dict[int, tuple[Any, ...]] = {}

    def vectors(self, bank: Bank, ids: Ids) -> tuple[Ids, Vectors]:
        """Return those of the ids that are there, ascending, and their embeddings [m, d]; see `View.vectors`. The rows
        of a few chunks are kept. Errors: FlawedError."""
        return super().vectors(bank, ids) if len(ids) > _FEW else self._read(bank, ids.tolist())

    def seen(self, bank: Bank, chunk_ids: Sequence[int]) -> list[Chunk]:
        """Return those of the chunks whose rows were read, or are read together with the question about the bank; see
        `View.seen`. Errors: FlawedError."""
        if self._unchanged is None and 0 < len(chunk_ids) <= _FEW:
            self._read(bank, chunk_ids)
        rows = [self._rows[chunk_id] for chunk_id in chunk_ids if chunk_id in self._rows]
        return chunk_rows.made(rows, bank, self._unwritten)

    def holds(self) -> bool:
        """Tell whether the bank was as it is known, and no chunk of it had expired, when this was asked first, which
        was after the view had begun."""
        if self._unchanged is None:
            self._unchanged = bank_rows.is_unchanged(self._connection, self._question)
        return self._unchanged

    def _read(self, bank: Bank, chunk_ids: Sequence[int]) -> tuple[Ids, Vectors]:
        """Read whole rows, keep those that are short, and return ids and embeddings as `vectors` does."""
        found = chunk_rows.beside(self._connection, bank, chunk_ids, self._question)
        self._rows.update(found.rows)
        if self._unchanged is None:
            self._unchanged = found.unchanged
        return found.ids, found.vectors
