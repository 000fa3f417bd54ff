"""What the fuzzer sends to SessionService: requests that come as far as their end, about sessions that are there."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import xxhash

from kvbank.v1 import session_pb2 as pb
from tests.support.sessions import SessionCaller, seconds, turn

HOLDER = "fuzz"


@dataclass
class KnownSession:
    """A session with a lease, and the key of its last turn."""

    session_id: str
    epoch: int
    head: int
    key: str


class Known(Protocol):
    """What the fuzzer knows of the service: a session for each method, by its name."""

    sessions: dict[str, KnownSession]


def lay_out(channel: grpc.Channel) -> dict[str, KnownSession]:
    """Make a session for each method, so that what one of them does keeps none of the others from its end."""
    caller, made = SessionCaller(channel), {}
    for method in TEMPLATES:
        session_id = caller.create().session_id
        epoch = caller.acquire(session_id, HOLDER).epoch
        done = caller.append(session_id, epoch, 0, turn("first"), turn("second"))
        made[method] = KnownSession(session_id, epoch, 2, done.turns[-1].key)
    return made


def _append(choose: random.Random, own: KnownSession) -> list[Any]:
    turns = [turn("another", key=choose.randbytes(8).hex()) for _ in range(choose.randint(1, 2))]
    return [pb.AppendTurnsRequest(session_id=own.session_id, epoch=own.epoch, follows=own.head, turns=turns)]


def _keep(choose: random.Random, own: KnownSession) -> list[Any]:
    data = choose.randbytes(choose.choice((1, 500)))
    said = {"turn": own.head, "stamp": "s", "size": len(data), "checksum": xxhash.xxh3_64_intdigest(data)}
    header = pb.WindowHeader(session_id=own.session_id, epoch=own.epoch, **said)
    return [pb.KeepWindowRequest(header=header), pb.KeepWindowRequest(data=data)]


def _forget(choose: random.Random, own: KnownSession) -> list[Any]:
    target: dict[str, Any] = {"session_id": own.session_id}
    if choose.random() < 0.2:
        target = {"turns": {"session_id": own.session_id, "first": 1, "last": choose.randint(1, 3)}}
    return [pb.ForgetRequest(**target)]


def _list_turns(choose: random.Random, own: KnownSession) -> Iterable[Any]:
    named = choose.choice(({"session_id": own.session_id}, {"turn_key": own.key}))
    return [pb.ListTurnsRequest(**named, page_size=5, token_ids=True)]


# For every method how to make what it takes of a session that is its own.
_OF_A_SESSION: dict[str, Callable[[random.Random, KnownSession], Iterable[Any]]] = {
    "CreateSession": lambda choose, _: [pb.CreateSessionRequest(session={"metadata": {"a": "b"}}, ttl=seconds(3600))],
    "GetSession": lambda _, own: [pb.GetSessionRequest(session_id=own.session_id)],
    "ListSessions": lambda *_: [pb.ListSessionsRequest(page_size=5)],
    "UpdateSession": lambda _, own: [
        pb.UpdateSessionRequest(session_id=own.session_id, metadata={"pairs": {"a": "c"}}, ttl=seconds(3600))
    ],
    "ForkSession": lambda choose, own: [pb.ForkSessionRequest(session_id=own.session_id, turn=choose.randint(0, 2))],
    "RewindSession": lambda choose, own: [
        pb.RewindSessionRequest(session_id=own.session_id, epoch=own.epoch, turn=choose.randint(0, 2))
    ],
    "AcquireLease": lambda _, own: [pb.AcquireLeaseRequest(session_id=own.session_id, holder=HOLDER, ttl=seconds(60))],
    "RenewLease": lambda _, own: [pb.RenewLeaseRequest(session_id=own.session_id, epoch=own.epoch)],
    "ReleaseLease": lambda _, own: [pb.ReleaseLeaseRequest(session_id=own.session_id, epoch=own.epoch)],
    "AppendTurns": _append,
    "ListTurns": _list_turns,
    "GetTurn": lambda _, own: [pb.GetTurnRequest(key=own.key)],
    "KeepWindow": _keep,
    "ReadWindow": lambda _, own: [pb.ReadWindowRequest(session_id=own.session_id)],
    "Forget": _forget,
}


def _template(method: str) -> Callable[[random.Random, Known], Iterable[Any]]:
    return lambda choose, known: _OF_A_SESSION[method](choose, known.sessions[method])


TEMPLATES = {method: _template(method) for method in _OF_A_SESSION}
