"""The service of kvbank.v1 for sessions: for each RPC a message comes in, an operation runs, a message goes out."""

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from kvbank.v1 import session_pb2 as pb
from kvbank.v1 import session_pb2_grpc
from kvbank.wire.frames import FRAME_BYTES, encode
from memory_service.access.tenants import Tenants
from memory_service.api.calls.handlers import HandledService, Handling, asked, current_caller, streaming, unary, wide
from memory_service.api.messages import session as convert
from memory_service.api.messages.access import microseconds
from memory_service.api.messages.convert import filter_
from memory_service.api.messages.paging import page_size
from memory_service.api.messages.parsing import Received
from memory_service.api.streams.chunk_frames import frames
from memory_service.api.streams.pace import in_pace
from memory_service.domain.access import Caller
from memory_service.domain.errors import ServiceError, invalid
from memory_service.domain.forgetting import Receipt
from memory_service.domain.limits import STANDARD
from memory_service.domain.sessions import LEASE_US, Session, Window, new_session_id, own_bank
from memory_service.observe import request as requests
from memory_service.operations.banks import Banks
from memory_service.operations.forgetting import Forgetting
from memory_service.operations.sessions import Sessions
from memory_service.storage.base import Engine, NewWindow, Source


class SessionService(HandledService, session_pb2_grpc.SessionServiceServicer):
    """The RPCs of kvbank.v1.SessionService; the proto says what each of them promises."""

    def __init__(
        self,
        handling: Handling,
        engine: Engine,
        banks: Banks,
        tenants: Tenants,
        stalled: float = STANDARD.stalled_s,
    ) -> None:
        """Serve the RPCs over an engine. stalled: the seconds that a caller who sends a window may be behind the least
        rate of bytes."""
        super().__init__(handling)
        self._sessions, self._tenants, self._stalled = Sessions(engine), tenants, stalled
        self._forgetting = Forgetting(engine, banks, self._sessions)

    # Sessions

    @unary
    def CreateSession(self, caller: Caller, request: pb.CreateSessionRequest) -> pb.CreateSessionResponse:  # noqa: N802
        """Make a session without turns."""
        said, session_id = request.session, new_session_id()
        new = Session(
            session_id,
            said.name,
            said.bank or own_bank(session_id),
            tuple(said.reads),
            said.reader_digest,
            dict(said.settings),
            dict(said.metadata),
            microseconds("ttl", request.ttl),
            caller.tenant,
        )
        return pb.CreateSessionResponse(session=self._message(self._sessions.create(caller, new)))

    @unary
    def GetSession(self, caller: Caller, request: pb.GetSessionRequest) -> pb.GetSessionResponse:  # noqa: N802
        """Answer with one session."""
        asked = request.WhichOneof("session")
        if asked is None:
            raise invalid("session_id", "or name is required")
        found = self._sessions.get(caller, request.session_id) if asked == "session_id" else None
        return pb.GetSessionResponse(session=self._message(found or self._sessions.named(caller, request.name)))

    @wide
    def ListSessions(self, caller: Caller, request: pb.ListSessionsRequest) -> pb.ListSessionsResponse:  # noqa: N802
        """Answer with a page of sessions, newest change first."""
        before, size = convert.place_of(request.page_token), page_size(request.page_size)
        found, more = self._sessions.newest(caller, before, dict(request.metadata), size)
        token = convert.token_of(found[-1]) if more else ""
        return pb.ListSessionsResponse(sessions=map(self._message, found), next_page_token=token)

    @unary
    def UpdateSession(self, caller: Caller, request: pb.UpdateSessionRequest) -> pb.UpdateSessionResponse:  # noqa: N802
        """Replace what the request says of a session."""
        changes: dict[str, Any] = {}
        if request.HasField("name"):
            changes["name"] = request.name
        for field in ("metadata", "settings"):
            if request.HasField(field):
                changes[field] = dict(getattr(request, field).pairs)
        if request.HasField("reads"):
            changes["reads"] = tuple(request.reads.names)
        if request.HasField("ttl"):
            changes["ttl"] = microseconds("ttl", request.ttl)
        return pb.UpdateSessionResponse(
            session=self._message(self._sessions.update(caller, request.session_id, changes))
        )

    @unary
    def ForkSession(self, caller: Caller, request: pb.ForkSessionRequest) -> pb.ForkSessionResponse:  # noqa: N802
        """Begin a session with the turns of another up to one of them."""
        session_id = new_session_id()
        new = Session(
            session_id, request.name, own_bank(session_id), metadata=dict(request.metadata), tenant=caller.tenant
        )
        if request.turn_key:
            made = self._sessions.fork_at(caller, new, request.turn_key)
        else:
            turn = request.turn if request.HasField("turn") else None
            made = self._sessions.fork(caller, new, request.session_id, turn)
        return pb.ForkSessionResponse(session=self._message(made))

    @unary
    def RewindSession(self, caller: Caller, request: pb.RewindSessionRequest) -> pb.RewindSessionResponse:  # noqa: N802
        """Let a session go on behind an earlier turn."""
        made = self._sessions.rewind(caller, request.session_id, request.epoch, request.turn)
        return pb.RewindSessionResponse(session=self._message(made))

    # Leases

    @unary
    def AcquireLease(self, caller: Caller, request: pb.AcquireLeaseRequest) -> pb.AcquireLeaseResponse:  # noqa: N802
        """Give a session to a worker."""
        ttl = microseconds("ttl", request.ttl) if request.HasField("ttl") else LEASE_US
        made = self._sessions.acquire(caller, request.session_id, request.holder, ttl)
        return pb.AcquireLeaseResponse(session=self._message(made))

    @unary
    def RenewLease(self, caller: Caller, request: pb.RenewLeaseRequest) -> pb.RenewLeaseResponse:  # noqa: N802
        """Let a lease begin anew."""
        ttl = microseconds("ttl", request.ttl) if request.HasField("ttl") else None
        made = self._sessions.renew(caller, request.session_id, request.epoch, ttl)
        return pb.RenewLeaseResponse(lease=None if made.lease is None else convert.lease_message(made.lease))

    @unary
    def ReleaseLease(self, caller: Caller, request: pb.ReleaseLeaseRequest) -> pb.ReleaseLeaseResponse:  # noqa: N802
        """End the lease of a session."""
        self._sessions.release(caller, request.session_id, request.epoch)
        return pb.ReleaseLeaseResponse()

    # Turns

    @unary
    def AppendTurns(self, caller: Caller, request: pb.AppendTurnsRequest) -> pb.AppendTurnsResponse:  # noqa: N802
        """Add turns to a session, durably, and renew its lease."""
        given = [convert.turn(each) for each in request.turns]
        turns, session = self._sessions.append(caller, request.session_id, request.epoch, request.follows, given)
        made = [convert.turn_message(each, short=True) for each in turns]
        return pb.AppendTurnsResponse(turns=made, session=self._message(session))

    @wide
    def ListTurns(self, caller: Caller, request: pb.ListTurnsRequest) -> pb.ListTurnsResponse:  # noqa: N802
        """Answer with a page of turns, oldest first."""
        if request.after < 0:
            raise invalid("after", "must not be negative; 0 begins with the first turn")
        size = page_size(request.page_size)
        if request.turn_key:
            page = self._sessions.turns_to(caller, request.turn_key, request.after, size, token_ids=request.token_ids)
        else:
            page = self._sessions.turns(caller, request.session_id, request.after, size, token_ids=request.token_ids)
        found, more = page
        after = found[-1].number if more else 0
        return pb.ListTurnsResponse(turns=map(convert.turn_message, found), next_after=after)

    @wide
    def GetTurn(self, caller: Caller, request: pb.GetTurnRequest) -> pb.GetTurnResponse:  # noqa: N802
        """Answer with one turn."""
        found = self._sessions.turn(caller, request.key, token_ids=request.token_ids)
        return pb.GetTurnResponse(turn=convert.turn_message(found))

    # Windows

    @streaming
    async def KeepWindow(self, sent: AsyncIterator[Received]) -> AsyncIterator[pb.KeepWindowResponse]:  # noqa: N802
        """Keep the window of a session, whose bytes come behind its header."""
        new: list[NewWindow] = []
        try:
            async for frame in frames(in_pace(sent, self._stalled), self.handling.threads.run):
                if isinstance(frame, memoryview):
                    if not new:
                        raise invalid("header", "is missing")
                    await self._to_its_end(new[0].add, frame)
                elif new:
                    raise invalid("header", "comes once, before the bytes")
                else:
                    await self._to_its_end(self._begin_window, frame.header, new)
            if not new:
                raise invalid("header", "is missing")
            await self._to_its_end(new[0].keep)
            yield pb.KeepWindowResponse()
        finally:
            for window in new:
                window.close()

    async def _to_its_end(self, step: Callable[..., None], *arguments: Any) -> None:
        """Take a step of a new window in a thread. Where the caller goes, this returns only when the thread has ended,
        so that a window is never closed under it, or left open by it."""
        async with self.handling.threads.turn("KeepWindow", short=True) as turn:
            await turn.run_to_its_end(step, *arguments)

    def _begin_window(self, header: pb.WindowHeader, new: list[NewWindow]) -> None:
        """Begin a window, and put it into `new`."""
        if request := requests.current():
            request.of(header)
        window = Window(header.session_id, header.turn, header.stamp, header.size, header.checksum)
        new.append(self._sessions.new_window(current_caller(), window, header.epoch))
        self.handling.pauses.reach("window opened")

    @streaming
    async def ReadWindow(self, received: Received) -> AsyncIterator[bytes]:  # noqa: N802
        """Answer with the window of a session: a header, then its bytes; with nothing where there is none."""
        run, found = self.handling.threads.run, list[tuple[Window, Source]]()
        try:
            async with self.handling.threads.turn("ReadWindow") as turn:
                # To its end, so that what it opens is closed also where the caller goes meanwhile.
                await turn.run_to_its_end(self._open_window, received, found)
            if not found:
                return
            window, source = found[0]
            header = pb.WindowHeader(
                session_id=window.session_id,
                turn=window.turn,
                stamp=window.stamp,
                size=window.size,
                checksum=window.checksum,
            )
            yield pb.ReadWindowResponse(header=header).SerializeToString()
            for at in range(0, window.size, FRAME_BYTES):
                yield await run(_frame, source, at, min(FRAME_BYTES, window.size - at))
        finally:
            for _, source in found:
                source.close()

    def _open_window(self, received: Received, found: list[tuple[Window, Source]]) -> None:
        """Open a window, and put it into `found`, if there is one."""
        caller, request = asked(received)
        if (window := self._sessions.window(caller, request.session_id)) is not None:
            found.append(window)
            self.handling.pauses.reach("window opened")

    # Deletion

    @wide
    def Forget(self, caller: Caller, request: pb.ForgetRequest) -> pb.ForgetResponse:  # noqa: N802
        """Delete something for good, and answer when no file has a byte of it."""
        forget = self._forget_targets.get(request.WhichOneof("target") or "")
        if forget is None:
            raise invalid("target", "is required")
        receipt = forget(caller, request)
        if noted := requests.current():
            noted.receipt = receipt.receipt_id
        return pb.ForgetResponse(receipt=convert.receipt_message(receipt))

    @property
    def _forget_targets(self) -> Mapping[str, Callable[[Caller, pb.ForgetRequest], Receipt]]:
        forgetting = self._forgetting
        return {
            "turns": lambda caller, asked: forgetting.turns(
                caller, asked.turns.session_id, asked.turns.first, asked.turns.last
            ),
            "turn_key": lambda caller, asked: forgetting.turn(caller, asked.turn_key),
            "session_id": lambda caller, asked: forgetting.session(caller, asked.session_id),
            "chunks": lambda caller, asked: forgetting.chunks(caller, asked.chunks.bank, filter_(asked.chunks.filter)),
            "tenant": lambda caller, asked: self._tenants.forget(caller, asked.tenant),
        }

    def _message(self, session: Session) -> pb.Session:
        return convert.session_message(session, self._sessions.lease_of(session))


def _frame(source: Source, offset: int, length: int) -> bytes:
    """Read a piece of a window, and make the frame of it. Errors: STORAGE_ERROR where the file has become shorter."""
    piece = bytearray(length)
    if source.read_at(memoryview(piece), offset) != length:
        raise ServiceError("STORAGE_ERROR", "the file of a window has become shorter", errno="EIO")
    return encode([memoryview(piece)])
