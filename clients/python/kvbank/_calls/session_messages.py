"""Messages of sessions are made here: requests out of what a caller states, and models out of answers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from types import EllipsisType
from typing import Any, TypeAlias

from google.protobuf.duration_pb2 import Duration

from kvbank import _session_models as m
from kvbank._arguments import choice, each, instance, invalid, text, texts_by_text
from kvbank._calls import times
from kvbank._calls.answers import odd, read_time, understood
from kvbank._calls.enums import numbers, word
from kvbank._calls.messages import build
from kvbank._exceptions import SessionExists
from kvbank._models import Stretch
from kvbank.v1 import service_pb2
from kvbank.v1 import session_pb2 as pb

# Turns that were appended, and their session.
Appended: TypeAlias = tuple[list[m.Turn], m.Session]


def create(fields: Mapping[str, Any], ttl: timedelta | None) -> pb.CreateSessionRequest:
    """Return the request for a new session. fields: those of `Session` that a caller sets; None is left out. Errors:
    InvalidArgument."""
    session = build(pb.Session, **{name: value for name, value in fields.items() if value is not None})
    return pb.CreateSessionRequest(session=session, ttl=_ttl(ttl))


def get(session_id: str | None, name: str | None) -> pb.GetSessionRequest:
    """Return the request for a session by its id or its name. Errors: InvalidArgument unless it is one of them."""
    if (session_id is None) == (name is None):
        raise invalid("session_id", "expected a session_id or a name, and not both")
    return build(pb.GetSessionRequest, session_id=session_id, name=name)


def update(
    session_id: str,
    *,
    name: str | None,
    metadata: Mapping[str, str] | None,
    settings: Mapping[str, str] | None,
    reads: Iterable[str] | None,
    ttl: timedelta | EllipsisType | None,
) -> pb.UpdateSessionRequest:
    """Return the request that changes what is given. ttl: None is for ever, `...` leaves it. Errors:
    InvalidArgument."""
    request: pb.UpdateSessionRequest = build(pb.UpdateSessionRequest, session_id=session_id, name=name)
    for field, pairs in (("metadata", metadata), ("settings", settings)):
        if pairs is not None:
            getattr(request, field).CopyFrom(pb.UpdateSessionRequest.Pairs(pairs=texts_by_text(field, pairs)))
    if reads is not None:
        request.reads.CopyFrom(pb.UpdateSessionRequest.Banks(names=each("reads", reads, text)))
    if not isinstance(ttl, EllipsisType):
        request.ttl.CopyFrom(_ttl(ttl) or Duration())
    return request


def fork(
    session_id: str, name: str, turn: int | None, turn_key: str | None, metadata: Mapping[str, str] | None
) -> pb.ForkSessionRequest:
    """Return the request for a session that has the turns of another. Errors: InvalidArgument."""
    if turn is not None and turn_key is not None:
        raise invalid("turn", "expected a turn or a turn_key, and not both")
    given = {"turn_key": turn_key, "metadata": metadata}
    more = {field: value for field, value in given.items() if value is not None}
    return build(pb.ForkSessionRequest, session_id=session_id, name=name, turn=turn, **more)


def lease(kind: Any, ttl: timedelta | None, **fields: Any) -> Any:
    """Return a request for a lease, or to renew one; `kind` says which. Errors: InvalidArgument."""
    return build(kind, ttl=_ttl(ttl), **fields)


def append(session_id: str, turns: Sequence[m.Turn], epoch: int, follows: int) -> pb.AppendTurnsRequest:
    """Return the request that appends turns. Errors: InvalidArgument."""
    if not turns:
        raise invalid("turns", "expected some turns, got none")
    fields = {"epoch": epoch, "follows": follows, "turns": list(map(_turn, turns))}
    return build(pb.AppendTurnsRequest, session_id=session_id, **fields)


def given_turns(turns: Iterable[m.Turn]) -> list[m.Turn]:
    """Return turns of a caller as a list. Errors: InvalidArgument for what is no turn."""
    return each("turns", turns, lambda field, turn: instance(field, turn, m.Turn))


def _turn(turn: m.Turn) -> pb.Turn:
    if not turn.key:  # the service would make one, and a call that is made again another
        raise invalid("turns", "expected turns with a key, got one whose key is empty; leave it out to have one made")
    made: pb.Turn = build(
        pb.Turn,
        status=choice("status", turn.status, numbers(pb.TurnStatus)),
        items=[pb.Item(id=item.id, role=item.role, text=item.text, json=item.json) for item in turn.items],
        prompt_tokens=turn.prompt_tokens,
        kept=turn.kept,
        usage=turn.usage,
        metadata=turn.metadata,
        key=turn.key,
    )
    made.token_ids.extend(turn.token_ids)  # which the turn has checked
    return made


def forget(session_id: str, first: int | None, last: int | None) -> pb.ForgetRequest:
    """Return the request to forget turns, or a whole session where both bounds are None. Errors: InvalidArgument."""
    if first is None and last is None:
        return build(pb.ForgetRequest, session_id=session_id)
    only = first if last is None else last
    turns = build(pb.ForgetRequest.TurnRange, session_id=session_id, first=only if first is None else first, last=only)
    if turns.first > turns.last:
        raise invalid("first", f"expected a turn that is not behind the last one, {turns.last}, got {turns.first}")
    return pb.ForgetRequest(turns=turns)


def forget_tenant(name: str) -> pb.ForgetRequest:
    """Return the request to forget a tenant. Errors: InvalidArgument."""
    return build(pb.ForgetRequest, tenant=name)


def _ttl(ttl: timedelta | None) -> Duration | None:
    return None if ttl is None else times.span("ttl", ttl)


# Answers


@understood()
def session(message: pb.Session) -> m.Session:
    """Return the session of an answer. Errors: Internal (ODD_ANSWER)."""
    if not message.stretches or any(not each.HasField("start_before") for each in message.stretches[:-1]):
        raise odd("it has a session without stretches, or one that goes on behind its end")
    point = message.forked_from
    return m.Session(
        session_id=message.session_id,
        name=message.name,
        bank=message.bank,
        reads=tuple(message.reads),
        reader_digest=message.reader_digest,
        settings=dict(message.settings),
        metadata=dict(message.metadata),
        head=message.head,
        tokens=message.tokens,
        forked_from=m.TurnPoint(point.session_id, point.turn) if message.HasField("forked_from") else None,
        create_time=read_time(message.create_time),
        update_time=read_time(message.update_time),
        expire_time=times.optional(message, "expire_time"),
        lease=read_lease(message.lease) if message.HasField("lease") else None,
        stretches=tuple(map(_stretch, message.stretches)),
    )


def _stretch(message: service_pb2.Stretch) -> Stretch:
    return Stretch(message.branch, message.start_before if message.HasField("start_before") else None)


@understood()
def read_lease(message: pb.Lease) -> m.Lease:
    """Return the lease of an answer. Errors: Internal (ODD_ANSWER)."""
    return m.Lease(message.holder, message.epoch, read_time(message.expire_time))


@understood()
def acquired(message: pb.AcquireLeaseResponse) -> m.Session:
    """Return a session with the lease that was got. Errors: Internal (ODD_ANSWER)."""
    if not message.session.HasField("lease"):
        raise odd("it has no lease")
    return session(message.session)


@understood()
def turn(message: pb.Turn) -> m.Turn:
    """Return the turn of an answer. Errors: Internal (ODD_ANSWER)."""
    return m.Turn(
        [m.Item(item.role, item.text, item.json, item.id) for item in message.items],
        message.token_ids,
        **_fields(message),
        prompt_tokens=message.prompt_tokens,
        kept=message.kept,
        status=word(pb.TurnStatus, message.status),
        usage=dict(message.usage),
        metadata=dict(message.metadata),
    )


def turns(page: pb.ListTurnsResponse) -> list[m.Turn]:
    """Return the turns of a page. Errors: Internal (ODD_ANSWER)."""
    return list(map(turn, page.turns))


def _fields(message: pb.Turn) -> dict[str, Any]:
    """Return what the service sets of a turn."""
    return {
        "key": message.key,
        "number": message.number,
        "start": message.start,
        "token_count": message.token_count,
        "create_time": read_time(message.create_time),
        "session_id": message.session_id,
    }


@understood()
def appended(given: Sequence[m.Turn], message: pb.AppendTurnsResponse) -> Appended:
    """Return the turns that were given as they are now, and their session. Errors: Internal (ODD_ANSWER)."""
    if [each.key for each in given] != [each.key for each in message.turns]:
        raise odd("it has other turns than were appended")
    turns = [replace(turn, **_fields(each)) for turn, each in zip(given, message.turns, strict=True)]
    return turns, session(message.session)


def created_before(error: SessionExists, found: m.Session, asked: pb.Session) -> m.Session:
    """Return a session that an attempt whose connection broke has made, as it was asked for; raise `error` where it is
    another one of this name."""
    made = (found.reader_digest, dict(found.settings), dict(found.metadata), list(found.reads))
    wanted = (asked.reader_digest, dict(asked.settings), dict(asked.metadata), list(asked.reads))
    if found.head or made != wanted or (asked.bank and asked.bank != found.bank):
        raise error
    return found


def forked_before(error: SessionExists, found: m.Session, asked: pb.ForkSessionRequest) -> m.Session:
    """Return a fork that an attempt whose connection broke has made; raise `error` where it is another session of this
    name."""
    point = found.forked_from
    if point is None or (asked.HasField("turn") and point.turn != asked.turn):
        raise error
    if point.session_id != asked.session_id and not asked.turn_key:
        raise error
    return found


@understood()
def receipt(message: pb.Receipt) -> m.Receipt:
    """Return what was forgotten. Errors: Internal (ODD_ANSWER)."""
    return m.Receipt(
        receipt_id=message.receipt_id,
        time=read_time(message.time),
        key_id=message.key_id,
        target=message.target,
        chunks=tuple(m.ForgottenChunk(each.bank, each.chunk_id, each.checksum) for each in message.chunks),
        turns=message.turns,
        tokens=message.tokens,
        bytes=message.bytes,
        places=dict(message.places),
        turns_kept=message.turns_kept,
        chunks_to_make_again=message.chunks_to_make_again,
        remains=message.remains,
    )
