"""The RPCs of sessions in short words, spoken through the stubs alone."""

from collections.abc import Sequence
from typing import Any

import grpc
import xxhash
from google.protobuf.duration_pb2 import Duration

from kvbank.v1 import session_pb2 as pb
from kvbank.wire.frames import encode
from kvbank.wire.stub import make_stub


def seconds(number: float) -> Duration:
    """Return a span of time."""
    span = Duration()
    span.FromMicroseconds(round(number * 1_000_000))
    return span


def turn(text: str, tokens: Sequence[int] = (1, 2, 3), *, key: str = "", **fields: Any) -> pb.Turn:
    """Make a turn of a question and its answer."""
    items = [
        pb.Item(id="i1", role="user", text=text),
        pb.Item(id="i2", role="assistant", text=f"{text}!", json=f'{{"said": "{text}"}}'),
    ]
    said = {"status": pb.TURN_STATUS_COMPLETED, "items": items, "prompt_tokens": len(tokens) - 1, **fields}
    return pb.Turn(token_ids=tokens, key=key, **said)


class SessionCaller:
    """Short words for the RPCs of sessions."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = make_stub(channel)

    def create(self, *, ttl: float | None = None, **fields: Any) -> pb.Session:
        """Make a session of some fields; ttl in seconds."""
        request = pb.CreateSessionRequest(session=pb.Session(**fields), ttl=None if ttl is None else seconds(ttl))
        found: pb.Session = self.stub.CreateSession(request).session
        return found

    def get(self, session_id: str = "", **fields: Any) -> pb.Session:
        """Read a session by its id, or by its name."""
        request = pb.GetSessionRequest(**({"session_id": session_id} if session_id else fields))
        found: pb.Session = self.stub.GetSession(request).session
        return found

    def listed(self, page_size: int = 0, **metadata: str) -> list[pb.Session]:
        """Read all sessions, page by page."""
        found: list[pb.Session] = []
        token, first = "", True
        while token or first:
            request = pb.ListSessionsRequest(page_size=page_size, page_token=token, metadata=metadata)
            page = self.stub.ListSessions(request)
            found, token, first = [*found, *page.sessions], page.next_page_token, False
        return found

    def update(self, session_id: str, **fields: Any) -> pb.Session:
        """Change fields of a session."""
        found: pb.Session = self.stub.UpdateSession(pb.UpdateSessionRequest(session_id=session_id, **fields)).session
        return found

    def acquire(self, session_id: str, holder: str = "w1", ttl: float | None = None) -> pb.Lease:
        """Take the lease of a session; ttl in seconds."""
        span = None if ttl is None else seconds(ttl)
        request = pb.AcquireLeaseRequest(session_id=session_id, holder=holder, ttl=span)
        found: pb.Lease = self.stub.AcquireLease(request).session.lease
        return found

    def renew(self, session_id: str, epoch: int, ttl: float | None = None) -> pb.Lease:
        """Renew the lease of a session."""
        span = None if ttl is None else seconds(ttl)
        request = pb.RenewLeaseRequest(session_id=session_id, epoch=epoch, ttl=span)
        found: pb.Lease = self.stub.RenewLease(request).lease
        return found

    def release(self, session_id: str, epoch: int) -> None:
        """End the lease of a session."""
        self.stub.ReleaseLease(pb.ReleaseLeaseRequest(session_id=session_id, epoch=epoch))

    def append(self, session_id: str, epoch: int, follows: int, *turns: pb.Turn) -> pb.AppendTurnsResponse:
        """Append turns to a session."""
        request = pb.AppendTurnsRequest(session_id=session_id, epoch=epoch, follows=follows, turns=turns)
        found: pb.AppendTurnsResponse = self.stub.AppendTurns(request)
        return found

    def turns(self, session_id: str, after: int = 0, page_size: int = 0, *, token_ids: bool = False) -> list[pb.Turn]:
        """Read the turns of a session, page by page."""
        return self._turns(pb.ListTurnsRequest(session_id=session_id, page_size=page_size, token_ids=token_ids), after)

    def turns_to(self, key: str, after: int = 0, page_size: int = 0) -> list[pb.Turn]:
        """Read the turns up to the one of a key, page by page."""
        return self._turns(pb.ListTurnsRequest(turn_key=key, page_size=page_size), after)

    def _turns(self, request: pb.ListTurnsRequest, after: int) -> list[pb.Turn]:
        found: list[pb.Turn] = []
        while True:
            request.after = after
            page = self.stub.ListTurns(request)
            found, after = [*found, *page.turns], page.next_after
            if not after:
                return found

    def texts(self, session_id: str) -> list[str]:
        """Read what was asked in each turn of a session."""
        return [each.items[0].text for each in self.turns(session_id)]

    def turn(self, key: str, *, token_ids: bool = False) -> pb.Turn:
        """Read a turn by its key."""
        found: pb.Turn = self.stub.GetTurn(pb.GetTurnRequest(key=key, token_ids=token_ids)).turn
        return found

    def fork(self, session_id: str = "", **fields: Any) -> pb.Session:
        """Fork a session at a turn."""
        found: pb.Session = self.stub.ForkSession(pb.ForkSessionRequest(session_id=session_id, **fields)).session
        return found

    def rewind(self, session_id: str, epoch: int, turn: int) -> pb.Session:
        """Rewind a session to a turn."""
        request = pb.RewindSessionRequest(session_id=session_id, epoch=epoch, turn=turn)
        found: pb.Session = self.stub.RewindSession(request).session
        return found

    def forget(self, session_id: str) -> pb.Receipt:
        """Delete a session with its turns."""
        found: pb.Receipt = self.stub.Forget(pb.ForgetRequest(session_id=session_id)).receipt
        return found

    def forget_turns(self, session_id: str, first: int, last: int) -> pb.Receipt:
        """Forget turns of a session for good."""
        turns = pb.ForgetRequest.TurnRange(session_id=session_id, first=first, last=last)
        found: pb.Receipt = self.stub.Forget(pb.ForgetRequest(turns=turns)).receipt
        return found

    def keep(self, session_id: str, epoch: int, at: int, data: bytes, **header: Any) -> None:
        """Keep a window after the turn `at`, in some frames."""
        said = {"stamp": "s", "size": len(data), "checksum": xxhash.xxh3_64_intdigest(data), **header}
        first = pb.WindowHeader(session_id=session_id, epoch=epoch, turn=at, **said)
        step = len(data) // 3 + 1
        frames = [encode([data[begin : begin + step]]) for begin in range(0, len(data), step)]
        assert len(list(self.stub.KeepWindow(iter([pb.KeepWindowRequest(header=first), *frames])))) == 1

    def window(self, session_id: str) -> tuple[int, str, bytes] | None:
        """Read the window of a session: its turn, its stamp, and the bytes, whose checksum is compared."""
        parts = list(self.stub.ReadWindow(pb.ReadWindowRequest(session_id=session_id)))
        if not parts:
            return None
        header, data = parts[0].header, b"".join(parts[1:])
        assert (len(data), xxhash.xxh3_64_intdigest(data)) == (header.size, header.checksum)
        return header.turn, header.stamp, data

    def talk(self, session_id: str, epoch: int, follows: int, *texts: str) -> pb.Session:
        """Append a turn of three tokens for each text, one by one."""
        session = pb.Session()
        for number, text in enumerate(texts, follows):
            session = self.append(session_id, epoch, number, turn(text)).session
        return session
