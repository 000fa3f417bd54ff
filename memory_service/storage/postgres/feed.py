"""The followers of a store that several services change. This file owns that followers learn of every change of a bank
once and in order, whichever service has made it, and that what they know of a bank is that of one number of its
changes: the position. Each change has a mark, so that a database which was put back to an earlier time, or has lost its
last transactions, is noticed, whatever was committed since; what is derived from a bank whose changes are others than
those that were told begins anew.

A service tells its followers of its own changes before it acknowledges them, and of those of others before it answers
from what is derived (`catch_up`). Nothing is told of a bank before this service has touched it: until then the
followers have nothing of it. Where a service was away for so long that the changes behind its position are not in the
database any more, its followers forget what they have of the bank.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from sqlalchemy import Connection

from memory_service.domain.model import Bank
from memory_service.observe.metrics import DatabaseMetrics
from memory_service.storage.base import Vectors
from memory_service.storage.followers import Followers
from memory_service.storage.postgres.changing import Changing
from memory_service.storage.postgres.database import Database
from memory_service.storage.postgres.rows import bank_rows, change_rows, chunk_rows
from memory_service.storage.postgres.rows.bank_rows import Head
from memory_service.storage.postgres.rows.change_rows import Changed

T = TypeVar("T")
# Chunks that followers are told of at once.
_SOME = 1000


class Known(NamedTuple):
    """A bank as the followers know it: what it said of itself when the transaction of the number `seq`, with this mark,
    was the last one that had changed it. Its usage is that of some earlier time."""

    bank: Bank
    seq: int
    mark: int


@dataclass(eq=False, slots=True)
class _Place:
    """How far the followers know a bank. position: the number of the last change that they know, with its mark; None
    while they know nothing. gone: whether it was dropped. read: the bank as it was read with one of its changes behind
    which it has said nothing else of itself; None where no such is known."""

    bank: Bank
    lock: "threading.RLock" = field(default_factory=threading.RLock)
    position: int | None = None
    mark: int = 0
    gone: bool = False
    read: Bank | None = None


class Feed:
    """Tells followers what is committed. Threads share it."""

    def __init__(
        self, database: Database, followers: Followers, lost: Callable[[], object], metrics: DatabaseMetrics
    ) -> None:
        """Tell followers of a database. lost: is called where that has lost what was told of it, or has given."""
        self._database, self._metrics = database, metrics
        self._followers = followers
        self.lost = lost
        self._lock = threading.Lock()
        self._places: dict[int, _Place] = {}
        # Ids of banks by tenant and name, as these were when a bank was last read; some may be other ones by now.
        self._ids: dict[tuple[str, str], int] = {}

    def _place(self, bank: Bank) -> _Place:
        with self._lock:
            place = self._places.setdefault(bank.bank_id, _Place(bank))
        if place.bank.uid != bank.uid:
            # The database has lost a bank that this service knows, and has given its id to another one.
            with place.lock:
                self._drop(place)
            return self._place(bank)
        return place

    # What this service has changed

    def created(self, bank: Bank) -> None:
        """Tell that this service has made a bank."""
        place = self._place(bank)
        with place.lock:
            if place.position is None:
                place.position = 0
                self._followers.changed(bank)

    def begins(self, changing: Changing) -> None:
        """Learn, within its transaction, that this service is about to change a bank: followers learn of that, and of
        all that comes after it."""
        place = self._place(changing.bank)
        # Without the lock of the place, for which nobody waits who has locked a row: its holder may wait for the row.
        with self._lock:
            if place.position is None:
                # The position last: whoever looks without the lock takes the place for one of which nothing is known.
                place.mark, place.position = changing.last_mark, changing.seq - 1

    def committed(self, changing: Changing, changed: Changed | None, bank: Bank | None = None) -> None:
        """Tell what this service has changed of a bank, and what others have changed before. bank: as it is now, where
        that was changed."""
        if changed is None:
            return
        place = self._place(changing.bank)
        with place.lock:
            if place.position is None or (place.position, place.mark) == (changed.seq, changed.mark):
                return
            if (place.position, place.mark) == (changed.seq - 1, changing.last_mark):
                if bank is not None:
                    place.bank = bank
                self._tell(place, changed, changing.vectors_of)
            else:
                self._bring_up_now(place, there=True)

    def dropped(self, bank: Bank) -> None:
        """Tell that a bank is deleted."""
        place = self._place(bank)
        with place.lock:
            self._drop(place)

    # What others have changed

    def catch_up(self, banks: Sequence[Bank]) -> None:
        """Return when the followers know all that was committed of these banks."""
        ids = [bank.bank_id for bank in banks]
        heads = self._database.ask(partial(bank_rows.heads, bank_ids=ids))
        self.bring_up(banks, [heads.get(bank_id) for bank_id in ids])

    def bring_up(self, banks: Sequence[Bank], heads: Sequence[Head | None]) -> None:
        """Return when the followers know all that was committed of these banks. heads: how far their changes went just
        now; None for a bank that is gone."""
        for bank, head in zip(banks, heads, strict=True):
            place = self._place(bank)
            if head is not None and (place.position, place.mark) == (head.seq, head.mark):
                continue
            with place.lock:
                self._bring_up_now(place, there=head is not None)

    def read(self, bank: Bank, head: Head) -> None:
        """Learn what a bank says of itself, which was read together with how far its changes went."""
        place = self._place(bank)
        if place.read is None:
            with place.lock:
                if (place.position, place.mark) == (head.seq, head.mark):
                    place.read = bank
                    with self._lock:
                        self._ids[bank.tenant, bank.name] = bank.bank_id

    def known(self, tenant: str, name: str) -> Known | None:
        """Return a bank of a tenant as the followers know it; None where they do not."""
        with self._lock:
            place = self._places.get(self._ids.get((tenant, name), 0))
        if place is None:
            return None
        # Before what was read, which is forgotten before the position moves on from it.
        position, mark = place.position, place.mark
        bank = place.read
        if bank is None or position is None or (bank.tenant, bank.name) != (tenant, name):
            return None
        return Known(bank, position, mark)

    def look_after(self) -> None:
        """Tell of banks that other services have deleted, and note how far this service is behind. Call this now and
        then: no call comes for these banks."""
        with self._lock:
            places = list(self._places.values())
        ids = [place.bank.bank_id for place in places]
        there = self._database.ask(partial(bank_rows.heads, bank_ids=ids))
        behind = 0
        for place in places:
            head = there.get(place.bank.bank_id)
            if head is None:
                with place.lock:
                    self._drop(place)
            elif place.position is not None:
                behind = max(behind, head.seq - place.position)
        self._metrics.behind.set(behind)

    @contextmanager
    def at_one_moment(self, bank: Bank, begun: Callable[[], None]) -> Iterator[Connection]:
        """Lend a connection that sees the rows of the moment at which `begun` is called, when the followers know all
        changes that it sees and no others."""
        place = self._place(bank)
        with self._database.read() as connection:
            with place.lock:
                self._bring_up(place, connection)
                begun()
            yield connection

    def in_order(self, bank: Bank, action: Callable[[], T]) -> T:
        """Call an action while nothing is told of a bank."""
        with self._place(bank).lock:
            return action()

    def _bring_up_now(self, place: _Place, *, there: bool) -> None:
        """Tell what the followers do not know yet, with as few questions as possible. there: whether the bank was there
        just now. The caller has the lock of the place."""
        # As the tenant for whom the connection that is taken has worked, mostly.
        database = self._database.of(place.bank.tenant)
        if there and place.position is not None and database.ask(partial(self._told_what_is_behind, place)):
            return
        with database.read(to_the_end=True) as connection:
            self._bring_up(place, connection)

    def _told_what_is_behind(self, place: _Place, connection: Connection) -> bool:
        """Tell all changes behind the position of a place, and return True; False, where the database has not the
        change of the position, or has one behind it of what the bank says of itself: then a closer look is needed.

        Each statement sees the rows of its own moment: a chunk that has gone since it was added is left out, and its
        removal is told later.
        """
        assert place.position is not None
        found = change_rows.since(connection, place.bank.bank_id, place.position)
        if not found or (found[0].seq, found[0].mark) != (place.position, place.mark):
            return False
        for changed in found[1:]:
            if any(part.kind == "bank" for part in changed.parts):
                return False
            self._tell(place, changed, None, connection)
        return True

    def _bring_up(self, place: _Place, connection: Connection) -> None:
        """Tell what a connection sees that the followers do not know yet. The caller has the lock of the place."""
        head = bank_rows.heads(connection, [place.bank.bank_id]).get(place.bank.bank_id)
        if head is None:
            self._drop(place)
        elif place.position is None:
            with self._lock:
                place.mark, place.position = head.mark, head.seq
        elif (place.position, place.mark) != (head.seq, head.mark):
            missed = self._missed(place, head, connection)
            if missed is None:
                self._metrics.read_anew.inc()
                self._followers.dropped(place.bank)
                self._refresh(place, connection)
            for changed in missed or ():
                if any(part.kind == "bank" for part in changed.parts):
                    self._refresh(place, connection)
                self._tell(place, changed, None, connection)
            place.position, place.mark = head.seq, head.mark

    def _missed(self, place: _Place, head: Head, connection: Connection) -> list[Changed] | None:
        """Return the changes behind the position of a place; None where these cannot be known. The database does not
        have them any more; or it has not the change that was told last: then it was put back to an earlier time, or the
        connection began before this service first changed the bank."""
        assert place.position is not None
        if place.position == head.trimmed == 0 and place.mark == 0:  # nothing was changed by then
            return change_rows.since(connection, place.bank.bank_id, 1)
        if head.trimmed < place.position:
            found = change_rows.since(connection, place.bank.bank_id, place.position)
            # A service of the revision before has written no mark.
            if found and found[0].seq == place.position and found[0].mark in (place.mark, 0):
                return found[1:]
            self.lost()
        return None

    def _refresh(self, place: _Place, connection: Connection) -> None:
        place.bank = bank_rows.get(connection, place.bank.bank_id) or place.bank
        self._unread(place)
        self._followers.changed(place.bank)

    def _unread(self, place: _Place) -> None:
        """Forget what was read of a bank, which says something else of itself, or is gone."""
        bank, place.read = place.read, None
        if bank is not None:
            with self._lock:
                # Another bank may have its name by now.
                if self._ids.get((bank.tenant, bank.name)) == bank.bank_id:
                    del self._ids[bank.tenant, bank.name]

    def _drop(self, place: _Place) -> None:
        self._unread(place)
        if not place.gone:
            place.gone = True
            self._followers.dropped(place.bank)
        with self._lock:
            if self._places.get(place.bank.bank_id) is place:
                del self._places[place.bank.bank_id]

    def _tell(
        self,
        place: _Place,
        changed: Changed,
        vectors_of: Callable[[Sequence[int]], Vectors] | None,
        connection: Connection | None = None,
    ) -> None:
        """Tell the parts of one change. vectors_of: returns the embeddings of chunks that are added; where it is None,
        they are read, as far as these chunks are still there."""
        # All is read before anything is told: a part that is told again would be in an index twice.
        added = [
            list(self._added(place.bank, part.chunk_ids, vectors_of, connection)) if part.kind == "added" else []
            for part in changed.parts
        ]
        for (kind, chunk_ids), some in zip(changed.parts, added, strict=True):
            for ids, vectors in some:
                self._followers.added(place.bank, ids, vectors)
            if kind == "removed":
                self._followers.removed(place.bank, chunk_ids)
            elif kind == "altered":
                self._followers.altered(place.bank, chunk_ids)
            elif kind == "bank":
                self._unread(place)
                if vectors_of is not None:
                    self._followers.changed(place.bank)
        place.position, place.mark = changed.seq, changed.mark

    @staticmethod
    def _added(
        bank: Bank,
        chunk_ids: Sequence[int],
        vectors_of: Callable[[Sequence[int]], Vectors] | None,
        connection: Connection | None,
    ) -> Iterator[tuple[Sequence[int], Vectors]]:
        """Yield ids of chunks that were added, with their embeddings; see `_tell`."""
        if vectors_of is not None:
            yield chunk_ids, vectors_of(chunk_ids)
        elif connection is not None:
            for begin in range(0, len(chunk_ids), _SOME):
                some = np.array(sorted(chunk_ids[begin : begin + _SOME]), np.int64)
                ids, vectors = chunk_rows.vectors(connection, bank, some)
                if len(ids):
                    yield ids.tolist(), vectors
