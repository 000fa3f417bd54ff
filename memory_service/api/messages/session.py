"""Messages of sessions and turns become values of the domain here, and values messages."""

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np

from kvbank.v1 import service_pb2
from kvbank.v1 import session_pb2 as pb
from kvbank.wire import enums
from memory_service.api.messages.convert import timestamp
from memory_service.domain.errors import invalid
from memory_service.domain.forgetting import Receipt
from memory_service.domain.sessions import Item, Lease, Session, Stretch, Turn, TurnStatus

_NUMBERS: Mapping[str, Any] = enums.numbers(pb.TurnStatus, get_args(TurnStatus))
_STATUSES: Mapping[int, TurnStatus] = {_NUMBERS[status]: status for status in get_args(TurnStatus)}
# A token of ListSessions: a time and the id of a session.
_LONGEST_TOKEN = 64


def session_message(session: Session, lease: Lease | None) -> pb.Session:
    """Make the message of a session. lease: the one that it is under now."""
    made = pb.Session(
        session_id=session.session_id,
        name=session.name,
        bank=session.bank,
        reads=session.reads,
        reader_digest=session.reader_digest,
        settings=session.settings,
        metadata=session.metadata,
        head=session.head,
        tokens=session.tokens,
        create_time=timestamp(session.created),
        update_time=timestamp(session.updated),
        stretches=map(_stretch_message, session.stretches),
    )
    if session.forked_from is not None:
        made.forked_from.session_id, made.forked_from.turn = session.forked_from.session_id, session.forked_from.turn
    if session.expires is not None:
        made.expire_time.CopyFrom(timestamp(session.expires))
    if lease is not None:
        made.lease.CopyFrom(lease_message(lease))
    return made


def lease_message(lease: Lease) -> pb.Lease:
    """Make the message of a lease."""
    return pb.Lease(holder=lease.holder, epoch=lease.epoch, expire_time=timestamp(lease.expires))


def _stretch_message(stretch: Stretch) -> service_pb2.Stretch:
    return service_pb2.Stretch(branch=stretch.branch, start_before=stretch.end)


def turn(message: pb.Turn) -> Turn:
    """Read a turn that is to be appended. Errors: INVALID_FIELD."""
    if message.status not in _STATUSES:
        raise invalid("turns.status", "must be COMPLETED, INCOMPLETE or PART")
    ids = np.asarray(message.token_ids, "<u4")
    return Turn(
        status=_STATUSES[message.status],
        items=tuple(Item(item.id, item.role, item.text, item.json) for item in message.items),
        token_ids=ids.tobytes(),
        prompt_tokens=message.prompt_tokens,
        kept=message.kept,
        usage=dict(message.usage),
        metadata=dict(message.metadata),
        key=message.key,
        token_count=len(ids),
    )


def turn_message(turn: Turn, *, short: bool = False) -> pb.Turn:
    """Make the message of a turn, with its token ids where they were read. short: without its items."""
    return pb.Turn(
        number=turn.number,
        start=turn.start,
        status=_NUMBERS[turn.status],
        items=[]
        if short
        else [pb.Item(id=item.id, role=item.role, text=item.text, json=item.json) for item in turn.items],
        token_ids=[] if short else np.frombuffer(turn.token_ids, "<u4").tolist(),
        token_count=turn.token_count,
        prompt_tokens=turn.prompt_tokens,
        kept=turn.kept,
        usage=turn.usage,
        create_time=timestamp(turn.created),
        metadata=turn.metadata,
        key=turn.key,
        session_id=turn.session_id,
    )


def receipt_message(receipt: Receipt) -> pb.Receipt:
    """Make the message of a receipt."""
    return pb.Receipt(
        receipt_id=receipt.receipt_id,
        time=timestamp(receipt.time),
        key_id=receipt.key_id,
        target=receipt.target,
        chunks=[pb.ForgottenChunk(bank=c.bank, chunk_id=c.chunk_id, checksum=c.checksum) for c in receipt.chunks],
        turns=receipt.turns,
        tokens=receipt.tokens,
        bytes=receipt.bytes,
        places={name: count for name, count in receipt.places.items() if count},
        turns_kept=receipt.turns_kept,
        chunks_to_make_again=receipt.chunks_to_make_again,
        remains=receipt.remains,
    )


def place_of(token: str) -> tuple[int, str] | None:
    """Read a page token: the time of change and the id of the last session of the page before; None for the first
    page. Errors: INVALID_FIELD."""
    if not token:
        return None
    time, _, session_id = token.partition("-")
    if not (len(token) <= _LONGEST_TOKEN and time.isascii() and time.isdecimal() and len(time) < 19):
        raise invalid("page_token", "is not one that this service gave")
    return int(time), session_id


def token_of(session: Session) -> str:
    """Make the token of the page behind a session."""
    return f"{session.updated}-{session.session_id}"
