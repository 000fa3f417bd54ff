"""The sessions of a service, for the blocking client."""

import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from types import EllipsisType

from kvbank import _session_models as m
from kvbank._calls import session_file
from kvbank._calls import session_messages as messages
from kvbank._calls.messages import build
from kvbank._calls.session_window import Measured, Received, Sent
from kvbank._calls.steps import Run
from kvbank._exceptions import LeaseLost, ServiceError, SessionExists
from kvbank._transport.caller import Caller
from kvbank.v1 import session_pb2 as pb


class Sessions:
    """Keeps conversations that any worker continues; `Client.sessions` is one.

    A session is an append-only line of turns. A worker that wants to append takes its lease, and appends under the
    lease's epoch. Every method takes `timeout` and raises what those of `Client` do, and SessionNotFound for a session
    that there is not, or that the key may not use.
    """

    def __init__(self, caller: Caller) -> None:
        """Ask over the connection of a client."""
        self._caller = caller

    def create(
        self,
        *,
        name: str = "",
        bank: str = "",
        reads: Iterable[str] = (),
        reader_digest: str = "",
        settings: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        ttl: timedelta | None = None,
        timeout: float | None = None,
    ) -> m.Session:
        """Make a session without turns, and return it.

        name: unique within the tenant; "" for a session that is only known by its id.
        bank: where its chunks go, which is there already; "" is one of its own, which its worker makes.
        reads: banks that it may read besides, which need not be there yet (`get_bank` tells): a worker
        leaves out those that are not. reader_digest: of the model whose K-V the bank has.
        settings: what a worker needs to go on; metadata: of the caller's, by which `list` finds it.
        ttl: how long it is kept after its last turn; None is for ever.
        A call that is made again, after its connection broke, may leave a session without a name behind.
        Errors: SessionExists for a session of this name.
        """
        fields = {"name": name, "bank": bank, "reads": reads, "reader_digest": reader_digest}
        request = messages.create({**fields, "settings": settings, "metadata": metadata}, ttl)
        attempts = self._caller.attempts(timeout)
        try:
            return messages.session(self._caller.repeated("CreateSession", request, attempts).session)
        except SessionExists as error:
            if not attempts.unsure:
                raise
            return messages.created_before(error, self.get(name=name, timeout=timeout), request.session)

    def get(self, session_id: str | None = None, *, name: str | None = None, timeout: float | None = None) -> m.Session:
        """Return a session by its id or by its name."""
        return messages.session(self._caller.call("GetSession", messages.get(session_id, name), timeout).session)

    def list(self, metadata: Mapping[str, str] | None = None, *, timeout: float | None = None) -> Iterator[m.Session]:
        """Yield the sessions of the tenant, or those that have all of these metadata, the last changed first. They are
        fetched a page at a time, with `timeout` for each."""
        request = build(pb.ListSessionsRequest, metadata={} if metadata is None else metadata)
        for page in self._caller.pages("ListSessions", request, timeout):
            yield from map(messages.session, page.sessions)

    def update(
        self,
        session_id: str,
        *,
        name: str | None = None,
        metadata: Mapping[str, str] | None = None,
        settings: Mapping[str, str] | None = None,
        reads: Iterable[str] | None = None,
        ttl: timedelta | EllipsisType | None = ...,
        timeout: float | None = None,
    ) -> m.Session:
        """Change what is given, leave the rest, and return the session; metadata, settings and reads are replaced
        whole. ttl: None keeps it for ever. Errors: SessionExists for a name that another session has."""
        request = messages.update(session_id, name=name, metadata=metadata, settings=settings, reads=reads, ttl=ttl)
        return messages.session(self._caller.call("UpdateSession", request, timeout).session)

    def fork(
        self,
        session_id: str,
        *,
        name: str = "",
        turn: int | None = None,
        turn_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> m.Session:
        """Make a session that has the turns of another one, and return it. Nothing is copied, and no lease is needed.

        turn: the last one that it has, by its number; None is the head. turn_key: the same by its key, also one that
        its session was rewound from.
        A call that is made again, after its connection broke, may leave a fork without a name behind.
        Errors: SessionExists, TurnNotFound.
        """
        request, attempts = messages.fork(session_id, name, turn, turn_key, metadata), self._caller.attempts(timeout)
        try:
            return messages.session(self._caller.repeated("ForkSession", request, attempts).session)
        except SessionExists as error:
            if not attempts.unsure:
                raise
            return messages.forked_before(error, self.get(name=name, timeout=timeout), request)

    def rewind(self, session_id: str, turn: int, *, epoch: int, timeout: float | None = None) -> m.Session:
        """Let a session go on behind an earlier turn, and return it; 0 is before the first.

        The turns behind it stay readable by their keys, until they are forgotten. Errors: LeaseLost, TurnNotFound.
        """
        request = build(pb.RewindSessionRequest, session_id=session_id, epoch=epoch, turn=turn)
        return messages.session(self._caller.call("RewindSession", request, timeout).session)

    # Leases

    def acquire(
        self, session_id: str, holder: str, *, ttl: timedelta | None = None, timeout: float | None = None
    ) -> m.Session:
        """Take the lease of a session, and return the session with it.

        holder: what the caller calls itself; who asks again as the same one has the session at once, under a new epoch.
        ttl: 1 s to 10 min; None is 30 s. `renew` and `append` begin it anew.
        Errors: LeaseHeld.
        """
        request = messages.lease(pb.AcquireLeaseRequest, ttl, session_id=session_id, holder=holder)
        return messages.acquired(self._caller.call("AcquireLease", request, timeout))

    def renew(
        self, session_id: str, epoch: int, *, ttl: timedelta | None = None, timeout: float | None = None
    ) -> m.Lease:
        """Begin the time of a lease anew, and return the lease. Errors: LeaseLost."""
        request = messages.lease(pb.RenewLeaseRequest, ttl, session_id=session_id, epoch=epoch)
        return messages.read_lease(self._caller.call("RenewLease", request, timeout).lease)

    def release(self, session_id: str, epoch: int, *, timeout: float | None = None) -> None:
        """End a lease, so that another worker can have the session at once. Errors: LeaseLost."""
        attempts = self._caller.attempts(timeout)
        request = build(pb.ReleaseLeaseRequest, session_id=session_id, epoch=epoch)
        try:
            self._caller.repeated("ReleaseLease", request, attempts)
        except LeaseLost:
            if not attempts.unsure:  # else an attempt whose connection broke has ended it
                raise

    # Turns

    def append(
        self, session_id: str, turns: Iterable[m.Turn], *, epoch: int, follows: int, timeout: float | None = None
    ) -> messages.Appended:
        """Append turns, all or none, which are durable when this returns; return them as they are now, and the session.

        epoch: of the lease, which begins anew. follows: the number of the session's last turn, 0 before the first.
        A turn whose key was appended before is there once, so that a call may be made again.
        Errors: LeaseLost, TurnConflict; AlreadyExists for a key that another turn has.
        """
        given = messages.given_turns(turns)
        request = messages.append(session_id, given, epoch, follows)
        return messages.appended(given, self._caller.call("AppendTurns", request, timeout))

    def turns(
        self,
        session_id: str,
        after: int = 0,
        *,
        token_ids: bool = False,
        page_size: int = 0,
        timeout: float | None = None,
    ) -> Iterator[m.Turn]:
        """Yield the turns of a session behind the one of number `after`, oldest first, also those that it was forked
        from. token_ids: whether the turns have theirs. They are fetched a page at a time, with `timeout` for each.
        page_size: the most turns of a page, up to 1000; 0 is 100."""
        fields = {"session_id": session_id, "after": after, "token_ids": token_ids, "page_size": page_size}
        request = build(pb.ListTurnsRequest, **fields)
        for page in self._caller.pages("ListTurns", request, timeout):
            yield from messages.turns(page)

    def turns_to(
        self, key: str, after: int = 0, *, token_ids: bool = False, page_size: int = 0, timeout: float | None = None
    ) -> Iterator[m.Turn]:
        """Yield the turns up to the one of a key, also one that its session was rewound from, behind the one of number
        `after`. Others: as of `turns`. Errors: TurnNotFound."""
        fields = {"turn_key": key, "after": after, "token_ids": token_ids, "page_size": page_size}
        for page in self._caller.pages("ListTurns", build(pb.ListTurnsRequest, **fields), timeout):
            yield from messages.turns(page)

    def turn(self, key: str, *, token_ids: bool = False, timeout: float | None = None) -> m.Turn:
        """Return a turn by its key, also one that its session was rewound from. Errors: TurnNotFound."""
        return messages.turn(
            self._caller.call("GetTurn", build(pb.GetTurnRequest, key=key, token_ids=token_ids), timeout).turn
        )

    # Windows

    def keep_window(
        self,
        session_id: str,
        data: bytes | bytearray | memoryview,
        *,
        epoch: int,
        turn: int,
        stamp: str,
        timeout: float | None = None,
    ) -> None:
        """Keep the local window of a session in the place of the one before. It is a cache, and not synced to the disk.

        turn: the one after which the window is this. stamp: what a worker must agree with to use it. Errors: LeaseLost.
        """
        sent = Sent(session_id, data, epoch=epoch, turn=turn, stamp=stamp)
        self._caller.upload("KeepWindow", sent, self._caller.stream_attempts(timeout))

    def read_window(self, session_id: str, *, timeout: float | None = None) -> m.Window | None:
        """Return the window that is kept of a session, verified; None where there is none. Errors: DataLoss."""
        request = build(pb.ReadWindowRequest, session_id=session_id)
        return self._caller.download("ReadWindow", request, self._caller.stream_attempts(timeout), Received)

    def window_size(self, session_id: str, *, timeout: float | None = None) -> int:
        """Return the bytes of the window that is kept of a session, without reading them; 0 where there is none."""
        request = build(pb.ReadWindowRequest, session_id=session_id)
        return self._caller.download("ReadWindow", request, self._caller.stream_attempts(timeout), Measured)

    # Forgetting

    def forget(
        self, session_id: str, *, first: int | None = None, last: int | None = None, timeout: float | None = None
    ) -> m.Receipt:
        """Forget turns for good, and return what went: the whole session where neither bound is given.

        first, last: numbers of turns, both included, in all forks too; one of them alone is one turn. Of a whole
        session what its forks have stays. What was forgotten before is answered with the receipt of then, for 30 days.
        Errors: TurnNotFound.
        """
        request = messages.forget(session_id, first, last)
        return messages.receipt(self._caller.call("Forget", request, timeout).receipt)

    def forget_turn(self, key: str, *, timeout: float | None = None) -> m.Receipt:
        """Forget a turn for good by its key, in all forks too and also where its session was rewound from it, and
        return what went; for one that is forgotten already, what went then. Errors: TurnNotFound."""
        request = build(pb.ForgetRequest, turn_key=key)
        return messages.receipt(self._caller.call("Forget", request, timeout).receipt)

    # Files

    def export(
        self,
        session_id: str,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        progress: session_file.Progress | None = None,
        timeout: float | None = None,
    ) -> m.Session:
        """Write a session with all its turns into one file, and return it as it is there.

        The file has no chunks: a worker makes them again from the turns. It is there whole, or not at all, and only its
        owner can read it. overwrite: replace a file that is there. progress: called with the turns that are written,
        and how many there are. timeout: for each page.
        Errors: InvalidArgument for a path that cannot be written; TurnConflict where the session is rewound meanwhile.
        """
        session = self.get(session_id, timeout=timeout)
        with session_file.written(path, session, overwrite, progress) as file:
            for turn in self.turns(session_id, token_ids=True, timeout=timeout):
                if not file.add(turn):
                    break
            file.finish(self.get(session_id, timeout=timeout))
            file.sync()
        return session

    def import_(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        progress: session_file.Progress | None = None,
        timeout: float | None = None,
    ) -> m.Session:
        """Make a session of a file that `export` has written, here or elsewhere, and return it.

        It has a new id and a new bank, which a worker makes from the turns; forgotten turns are left out. When it ends
        early it can be called again with the same file and name, and goes on.

        path: also the folder of a chat session of an earlier version. name: None is the one in the file.
        progress: called with the turns that are there, and how many there will be. timeout: for each call.
        Errors: InvalidArgument for a file that is none; DataLoss, with the line, for one that is damaged;
        SessionExists.
        """
        run = Run(session_file.importing(path, name, progress))
        step = run.begin()
        while step is not None:
            try:
                answer = getattr(self, step.method)(**step.arguments, timeout=timeout)
            except ServiceError as error:
                step = run.failed(error)
            else:
                step = run.answered(answer)
        return run.result
