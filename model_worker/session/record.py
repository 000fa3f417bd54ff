"""A session as its worker holds it: the lease, and the line of turns that the service has.

The service has the truth. This file owns the rule of what a worker may believe: as long as it holds one lease, and
every append was answered, the turns are those that it knows. After anything else (an append without an answer, a lease
that had ended) it reads session and turns again before the next turn.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate

import kvbank
from model_worker.session.lease import Lease

_FIRST_S = 10.0  # for the first answer of the service in a turn, so that one that is away is noticed before the reading


class SessionRecord:
    """The session `info` of a service, with its turns.

    info: as the service said last. turns: all of them, with their token ids; a forgotten one has none.
    forgotten_meanwhile: numbers of turns that were forgotten elsewhere while they were known here; the user of the
    record clears them once nothing is left of them. aside: entered while the service is waited for, before and behind a
    turn: there others may have the model.
    """

    def __init__(self, client: kvbank.Client, info: kvbank.Session, lease: Lease):
        self.client, self.info, self.lease = client, info, lease
        self.turns: list[kvbank.Turn] = []
        self.forgotten_meanwhile: set[int] = set()
        self.aside: Callable[[], AbstractContextManager[None]] = nullcontext
        self._sure = False

    @property
    def tokens(self) -> int:
        """Return the number of tokens of all turns, of forgotten ones too."""
        return self.turns[-1].start + self.turns[-1].token_count if self.turns else 0

    @property
    def ends(self) -> Iterator[int]:
        """Yield the offsets at which turns end."""
        return accumulate(turn.token_count for turn in self.turns)

    @property
    def last_said(self) -> kvbank.Turn | None:
        """Return the last turn of which the model has seen something; None before the first."""
        return next((turn for turn in reversed(self.turns) if turn.status != "forgotten"), None)

    def go_on(self) -> bool:
        """Make sure that the lease is held and the turns are known, before a turn; return whether they may be others.

        Raises kvbank.LeaseHeld where another worker has the session, and other errors of the service.
        """
        with self.aside():
            return self._goes_on()

    def _goes_on(self) -> bool:
        if self._sure and not self.lease.lost:
            try:
                self.lease.renew(_FIRST_S)
                return False
            except kvbank.LeaseLost:
                pass
        epoch, head = self.lease.epoch, self.info.head
        self.info = self.lease.take()
        if self._sure and self.lease.epoch == epoch + 1 and self.info.head == head:
            return False
        self.read()
        return True

    def read(self) -> None:
        """Read all turns from the service."""
        before = self.turns
        self.turns = list(self.client.sessions.turns(self.info.session_id, token_ids=True))
        pairs = zip(before, self.turns, strict=False)
        self.forgotten_meanwhile |= {now.number for was, now in pairs if was.status != "forgotten" == now.status}
        self._sure = True

    def append(self, turn: kvbank.Turn) -> kvbank.Turn:
        """Append a turn, which is durable when this returns, and return it as the service has it.

        Raises kvbank.LeaseLost, kvbank.TurnConflict and other errors of the service.
        """
        self.lease.check()
        with self._unsure(), self.aside():
            appended = self.client.sessions.append(
                self.info.session_id, [turn], epoch=self.lease.epoch, follows=self.info.head
            )
        [turn], self.info = appended
        self.turns.append(turn)
        self.lease.was_renewed()
        return turn

    def rewind(self, turn: int) -> None:
        """Let the session go on behind a turn, 0 for none. Raises kvbank.TurnNotFound, LeaseLost and others."""
        with self._unsure(), self.aside():
            self.info = self.client.sessions.rewind(self.info.session_id, turn, epoch=self.lease.epoch)
        del self.turns[turn:]

    def forget(self, first: int, last: int) -> kvbank.Receipt:
        """Forget turns for good, both bounds included. The lease is taken anew, which forgetting may have ended."""
        with self._unsure(), self.aside():
            receipt = self.client.sessions.forget(self.info.session_id, first=first, last=last)
            self.info = self.lease.take()
        self.read()
        self.forgotten_meanwhile -= set(range(first, last + 1))
        return receipt

    def set(self, **settings: str) -> None:
        """Change settings of the session; those that are not named stay."""
        wanted = {**self.info.settings, **settings}
        if wanted != dict(self.info.settings):
            with self.aside():
                self.info = self.client.sessions.update(self.info.session_id, settings=wanted)

    @contextmanager
    def _unsure(self) -> Iterator[None]:
        """Note that the turns may be others where the block raises."""
        self._sure = False
        yield
        self._sure = True
