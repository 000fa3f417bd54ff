"""One transaction's change of one bank. This file owns that a bank's row is locked before anything of the bank is
changed, so that its changes come one after the other, in all services, and that each has the next number."""

import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from sqlalchemy import Connection

from memory_service.domain.model import Bank, Usage
from memory_service.storage.base import Vectors
from memory_service.storage.chunks.removed import Removed
from memory_service.storage.postgres.rows import bank_rows, change_rows
from memory_service.storage.postgres.rows.bank_rows import Head
from memory_service.storage.postgres.rows.change_rows import Changed, Kind, Part


class Mark(NamedTuple):
    """What a transaction had changed at some moment; see `Changing.back_to`."""

    bank: Bank
    parts: int
    grown: Mapping[str, int]


@dataclass(slots=True)
class Changing:
    """A bank whose row is locked by a transaction, and what that has changed of it.

    bank: the bank, with the usage that its row has. seq: the number that this change gets. last_mark: the mark of the
    change before this one; own_mark: that of this one. vectors: the embeddings of chunks that are added.
    """

    connection: Connection
    bank: Bank
    seq: int
    last_mark: int
    own_mark: int = field(default_factory=lambda: secrets.randbits(63))
    parts: list[Part] = field(default_factory=list)
    grown: Counter[str] = field(default_factory=Counter)
    vectors: dict[int, bytes] = field(default_factory=dict)

    @property
    def usage(self) -> Usage:
        """Return what the bank holds now."""
        grown = {name: getattr(self.bank.usage, name) + by for name, by in self.grown.items()}
        return replace(self.bank.usage, **grown)

    def tell(self, kind: Kind, chunk_ids: Sequence[int] = ()) -> None:
        """Note a part of the change, for all who follow the bank."""
        if self.parts and self.parts[-1].kind == kind == "added":
            chunk_ids = [*self.parts.pop().chunk_ids, *chunk_ids]
        self.parts.append(Part(kind, list(chunk_ids)))

    def removed(self, gone: Removed, counter: str) -> None:
        """Note that chunks were removed, and count them in `counter` of the bank (chunks_deleted, ...)."""
        if gone.ids:
            self.tell("removed", gone.ids)
            self.grown.update({"chunks": -len(gone.ids), "tokens": -gone.tokens, "bytes": -gone.bytes})
            self.grown[counter] += len(gone.ids)

    def mark(self) -> Mark:
        """Return what was changed so far, for `back_to`."""
        return Mark(self.bank, len(self.parts), dict(self.grown))

    def back_to(self, mark: Mark) -> None:
        """Forget what was changed since; the caller has taken back the rows."""
        self.bank = mark.bank
        del self.parts[mark.parts :]
        self.grown = Counter(mark.grown)

    def write_usage(self) -> None:
        """Let the row say what the bank holds now, for statements that go by it."""
        bank_rows.grow(self.connection, self.bank.bank_id, dict(self.grown))
        self.bank = replace(self.bank, usage=self.usage)
        self.grown.clear()

    def write(self, now: int) -> Changed | None:
        """Write the usage, and what was changed; this is the last step of a transaction. None is returned where nothing
        was. now: microseconds since 1970."""
        if not self.parts:
            return None
        bank_rows.advance(self.connection, self.bank.bank_id, self.seq, self.own_mark, dict(self.grown))
        changed = Changed(self.seq, self.parts, self.own_mark)
        change_rows.append(self.connection, self.bank.bank_id, changed, now)
        return changed

    def vectors_of(self, chunk_ids: Sequence[int]) -> Vectors:
        """Return the embeddings [n, d] of chunks that were added."""
        data = b"".join(self.vectors[chunk_id] for chunk_id in chunk_ids)
        return np.frombuffer(data, "<f4").reshape(len(chunk_ids), -1)


def begin(connection: Connection, bank: Bank) -> Changing | None:
    """Lock a bank, to change it; None where it is not there (any more)."""
    return begun(connection, bank, bank_rows.locked(connection, bank.bank_id))


def begun(connection: Connection, bank: Bank, found: tuple[Bank, Head] | None) -> Changing | None:
    """Return the change of a bank of whose id a row was found and locked; None where the bank is not there. A database
    that was put back to an earlier time gives the ids of banks again: the row may be that of another one."""
    if found is None or found[0].uid != bank.uid:
        return None
    return Changing(connection, found[0], found[1].seq + 1, found[1].mark)
