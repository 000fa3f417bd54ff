"""The sessions of a service, for the asyncio client; each method has the docstring of `Sessions`."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Mapping
from datetime import timedelta
from functools import partial
from types import EllipsisType

from kvbank import _session_models as m
from kvbank._calls import session_file
from kvbank._calls import session_messages as messages
from kvbank._calls.messages import build
from kvbank._calls.session_window import Measured, Received, Sent
from kvbank._calls.steps import Run
from kvbank._exceptions import LeaseLost, ServiceError, SessionExists
from kvbank._sessions import Sessions
from kvbank._transport.async_caller import AsyncCaller
from kvbank._transport.loop import SMALL_BYTES, apart, is_longer
from kvbank.v1 import session_pb2 as pb

# Token ids that are checked at once; more are checked in a thread.
_SMALL_IDS = 5000


class AsyncSessions:
    """Keeps conversations that any worker continues, as `Sessions` does, with
    coroutines; `AsyncClient.sessions` is one."""

    def __init__(self, caller: AsyncCaller) -> None:
        """Ask over the connection of a client."""
        self._caller = caller

    async def create(
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
        fields = {"name": name, "bank": bank, "reads": reads, "reader_digest": reader_digest}
        request = messages.create({**fields, "settings": settings, "metadata": metadata}, ttl)
        attempts = self._caller.attempts(timeout)
        try:
            return messages.session((await self._caller.repeated("CreateSession", request, attempts)).session)
        except SessionExists as error:
            if not attempts.unsure:
                raise
            return messages.created_before(error, await self.get(name=name, timeout=timeout), request.session)

    async def get(
        self, session_id: str | None = None, *, name: str | None = None, timeout: float | None = None
    ) -> m.Session:
        return messages.session(
            (await self._caller.call("GetSession", messages.get(session_id, name), timeout)).session
        )

    async def list(
        self, metadata: Mapping[str, str] | None = None, *, timeout: float | None = None
    ) -> AsyncIterator[m.Session]:
        request = build(pb.ListSessionsRequest, metadata={} if metadata is None else metadata)
        async for page in self._caller.pages("ListSessions", request, timeout):
            for message in page.sessions:
                yield messages.session(message)

    async def update(
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
        request = messages.update(session_id, name=name, metadata=metadata, settings=settings, reads=reads, ttl=ttl)
        return messages.session((await self._caller.call("UpdateSession", request, timeout)).session)

    async def fork(
        self,
        session_id: str,
        *,
        name: str = "",
        turn: int | None = None,
        turn_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> m.Session:
        request, attempts = messages.fork(session_id, name, turn, turn_key, metadata), self._caller.attempts(timeout)
        try:
            return messages.session((await self._caller.repeated("ForkSession", request, attempts)).session)
        except SessionExists as error:
            if not attempts.unsure:
                raise
            return messages.forked_before(error, await self.get(name=name, timeout=timeout), request)

    async def rewind(self, session_id: str, turn: int, *, epoch: int, timeout: float | None = None) -> m.Session:
        request = build(pb.RewindSessionRequest, session_id=session_id, epoch=epoch, turn=turn)
        return messages.session((await self._caller.call("RewindSession", request, timeout)).session)

    # Leases

    async def acquire(
        self, session_id: str, holder: str, *, ttl: timedelta | None = None, timeout: float | None = None
    ) -> m.Session:
        request = messages.lease(pb.AcquireLeaseRequest, ttl, session_id=session_id, holder=holder)
        return messages.acquired(await self._caller.call("AcquireLease", request, timeout))

    async def renew(
        self, session_id: str, epoch: int, *, ttl: timedelta | None = None, timeout: float | None = None
    ) -> m.Lease:
        request = messages.lease(pb.RenewLeaseRequest, ttl, session_id=session_id, epoch=epoch)
        return messages.read_lease((await self._caller.call("RenewLease", request, timeout)).lease)

    async def release(self, session_id: str, epoch: int, *, timeout: float | None = None) -> None:
        attempts = self._caller.attempts(timeout)
        request = build(pb.ReleaseLeaseRequest, session_id=session_id, epoch=epoch)
        try:
            await self._caller.repeated("ReleaseLease", request, attempts)
        except LeaseLost:
            if not attempts.unsure:  # else an attempt whose connection broke has ended it
                raise

    # Turns

    async def append(
        self, session_id: str, turns: Iterable[m.Turn], *, epoch: int, follows: int, timeout: float | None = None
    ) -> messages.Appended:
        given = messages.given_turns(turns)
        large = sum(len(turn.token_ids) for turn in given) > _SMALL_IDS
        request = await apart(large, partial(messages.append, session_id, given, epoch, follows))
        return messages.appended(given, await self._caller.call("AppendTurns", request, timeout))

    async def turns(
        self,
        session_id: str,
        after: int = 0,
        *,
        token_ids: bool = False,
        page_size: int = 0,
        timeout: float | None = None,
    ) -> AsyncIterator[m.Turn]:
        fields = {"session_id": session_id, "after": after, "token_ids": token_ids, "page_size": page_size}
        async for turn in self._turns(build(pb.ListTurnsRequest, **fields), timeout):
            yield turn

    async def turns_to(
        self, key: str, after: int = 0, *, token_ids: bool = False, page_size: int = 0, timeout: float | None = None
    ) -> AsyncIterator[m.Turn]:
        fields = {"turn_key": key, "after": after, "token_ids": token_ids, "page_size": page_size}
        async for turn in self._turns(build(pb.ListTurnsRequest, **fields), timeout):
            yield turn

    async def _turns(self, request: pb.ListTurnsRequest, timeout: float | None) -> AsyncIterator[m.Turn]:
        async for page in self._caller.pages("ListTurns", request, timeout):
            large = sum(len(message.token_ids) for message in page.turns) > _SMALL_IDS
            for turn in await apart(large, partial(messages.turns, page)):
                yield turn

    async def turn(self, key: str, *, token_ids: bool = False, timeout: float | None = None) -> m.Turn:
        request = build(pb.GetTurnRequest, key=key, token_ids=token_ids)
        found = (await self._caller.call("GetTurn", request, timeout)).turn
        return await apart(len(found.token_ids) > _SMALL_IDS, partial(messages.turn, found))

    # Windows

    async def keep_window(
        self,
        session_id: str,
        data: bytes | bytearray | memoryview,
        *,
        epoch: int,
        turn: int,
        stamp: str,
        timeout: float | None = None,
    ) -> None:
        made = partial(Sent, session_id, data, epoch=epoch, turn=turn, stamp=stamp)
        sent = await apart(is_longer(data, SMALL_BYTES), made)
        await self._caller.upload("KeepWindow", sent, self._caller.stream_attempts(timeout))

    async def read_window(self, session_id: str, *, timeout: float | None = None) -> m.Window | None:
        request = build(pb.ReadWindowRequest, session_id=session_id)
        return await self._caller.download("ReadWindow", request, self._caller.stream_attempts(timeout), Received)

    async def window_size(self, session_id: str, *, timeout: float | None = None) -> int:
        request = build(pb.ReadWindowRequest, session_id=session_id)
        return await self._caller.download("ReadWindow", request, self._caller.stream_attempts(timeout), Measured)

    # Forgetting

    async def forget(
        self, session_id: str, *, first: int | None = None, last: int | None = None, timeout: float | None = None
    ) -> m.Receipt:
        request = messages.forget(session_id, first, last)
        return messages.receipt((await self._caller.call("Forget", request, timeout)).receipt)

    async def forget_turn(self, key: str, *, timeout: float | None = None) -> m.Receipt:
        request = build(pb.ForgetRequest, turn_key=key)
        return messages.receipt((await self._caller.call("Forget", request, timeout)).receipt)

    # Files

    async def export(
        self,
        session_id: str,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        progress: session_file.Progress | None = None,
        timeout: float | None = None,
    ) -> m.Session:
        session = await self.get(session_id, timeout=timeout)
        with session_file.written(path, session, overwrite, progress) as file:
            async for turn in self.turns(session_id, token_ids=True, timeout=timeout):
                if not await asyncio.to_thread(file.add, turn):
                    break
            file.finish(await self.get(session_id, timeout=timeout))
            await asyncio.to_thread(file.sync)
        return session

    async def import_(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        progress: session_file.Progress | None = None,
        timeout: float | None = None,
    ) -> m.Session:
        run = Run(session_file.importing(path, name, progress))
        step = await asyncio.to_thread(run.begin)
        while step is not None:
            try:
                answer = await getattr(self, step.method)(**step.arguments, timeout=timeout)
            except ServiceError as error:
                step = await asyncio.to_thread(run.failed, error)
            else:
                step = await asyncio.to_thread(run.answered, answer)
        return run.result


for _name, _method in vars(AsyncSessions).items():
    if not _name.startswith("_"):
        _method.__doc__ = getattr(Sessions, _name).__doc__
