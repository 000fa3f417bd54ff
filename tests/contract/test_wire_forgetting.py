"""Forgetting at the wire: what is left of turns, who is refused afterwards, and who may forget what. That no file has a
byte of it is looked for in `tests/local/test_forgetting.py`."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest

import kvbank
from kvbank.v1 import session_pb2 as pb
from memory_service.domain.limits import Limits, Pauses
from tests.support.clocks import SECOND, Hands
from tests.support.forgettable import Secret, Talk, chunk_of
from tests.support.refusals import Refusals
from tests.support.sessions import SessionCaller, seconds, turn

NOT_FOUND, INVALID = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT
PRECONDITION, DENIED = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.PERMISSION_DENIED


@pytest.fixture
def talk(serving: Callable[..., Any]) -> Talk:
    return Talk.begun(serving(), 1, 5)


def test_a_worker_that_has_forgotten_turns_in_its_mind_is_refused(talk: Talk, refused: Refusals) -> None:
    sessions, session = talk.sessions, talk.session_id
    branch = sessions.get(session).stretches[-1].branch
    fork = sessions.fork(session, turn=3).session_id
    other = sessions.fork(session, turn=1).session_id
    epochs = {name: sessions.acquire(name, ttl=600).epoch for name in (fork, other)}
    sessions.forget_turns(session, 2, 2)
    for name, epoch, head in ((session, talk.epoch, 5), (fork, epochs[fork], 3)):
        with refused("LEASE_LOST", PRECONDITION):
            sessions.append(name, epoch, head, turn("x"))
        with refused("LEASE_LOST", PRECONDITION):
            sessions.keep(name, epoch, head, b"window")
    sessions.append(other, epochs[other], 1, turn("y"))
    late = chunk_of(talk.caller, talk.secrets[1], 12, branch=branch)
    with refused("TURN_FORGOTTEN", PRECONDITION):
        talk.caller.write(late, bank=talk.bank)
    assert talk.ids[0] in talk.caller.ids(talk.bank)
    assert set(talk.ids[1:]).isdisjoint(talk.caller.ids(talk.bank))
    # What goes on without the turn is written under the key that it had before.
    again = chunk_of(talk.caller, talk.secrets[2], 24, branch=branch)
    again[0].idempotency_key = (3).to_bytes(16, "big")
    (ack,) = talk.caller.write(again, bank=talk.bank)
    assert not ack.replayed
    epoch = sessions.acquire(session, ttl=600).epoch
    sessions.append(session, epoch, 5, turn("goes on"))
    # Forgotten again, nothing more goes, and nobody loses the lease.
    sessions.forget_turns(session, 2, 2)
    sessions.renew(session, epoch)


def test_chunks_of_a_session_that_is_gone_are_not_written_any_more(talk: Talk, refused: Refusals) -> None:
    branch, bank = talk.sessions.get(talk.session_id).stretches[-1].branch, talk.bank
    fork = talk.sessions.fork(talk.session_id, turn=3).session_id
    talk.sessions.forget(talk.session_id)
    with refused("TURN_FORGOTTEN", PRECONDITION):
        talk.caller.write(chunk_of(talk.caller, Secret.made(70), 36, branch=branch), bank=bank)
    talk.caller.write(chunk_of(talk.caller, Secret.made(71), 24, branch=branch), bank=bank)
    assert len(talk.sessions.turns(fork)) == 3


def test_a_turn_is_forgotten_by_its_key(talk: Talk, refused: Refusals) -> None:
    sessions, session = talk.sessions, talk.session_id
    key = sessions.turns(session)[3].key
    sessions.rewind(session, talk.epoch, 3)
    receipt = sessions.stub.Forget(pb.ForgetRequest(turn_key=key)).receipt
    assert (receipt.turns, receipt.tokens, receipt.key_id) == (1, 12, "")
    assert talk.ids[3] not in talk.caller.ids(talk.bank)
    with refused("TURN_NOT_FOUND", NOT_FOUND):
        sessions.turn(key)
    assert sessions.stub.Forget(pb.ForgetRequest(turn_key=key)).receipt == receipt
    with refused("TURN_NOT_FOUND", NOT_FOUND):
        sessions.stub.Forget(pb.ForgetRequest(turn_key="no such key"))
    assert sessions.texts(session) == [secret.text for secret in talk.secrets[:3]]


def test_a_message_in_parts_goes_whole(serving: Callable[..., Any]) -> None:
    sessions = SessionCaller(serving().channel)
    session = sessions.create().session_id
    epoch = sessions.acquire(session, ttl=600).epoch
    part = {"status": pb.TURN_STATUS_PART}
    sessions.append(session, epoch, 0, turn("a"), turn("p", **part), turn("q", **part), turn("whole"), turn("z"))
    key = sessions.turns(session)[3].key
    fork = sessions.fork(session, turn=3).session_id
    for numbers in ((2, 2), (4, 4)):
        copy = sessions.fork(session).session_id
        assert sessions.forget_turns(copy, *numbers).turns == (3 if numbers == (2, 2) else 0)
    assert [each.number for each in sessions.turns(session) if each.items] == [1, 5]
    assert [each.number for each in sessions.turns(fork) if each.items] == [1]
    assert key not in {each.key for each in sessions.turns(session)}
    sessions.forget(session)


def test_what_cannot_be_forgotten(talk: Talk, refused: Refusals) -> None:
    for first, last in ((0, 1), (5, 6), (6, 6)):
        with refused("TURN_NOT_FOUND", NOT_FOUND):
            talk.sessions.forget_turns(talk.session_id, first, last)
    with refused("INVALID_FIELD", INVALID):
        talk.sessions.forget_turns(talk.session_id, 3, 2)
    for missing in ("no such session", "0" * 32):
        with refused("SESSION_NOT_FOUND", NOT_FOUND):
            talk.sessions.forget_turns(missing, 1, 1)
        with refused("SESSION_NOT_FOUND", NOT_FOUND):
            talk.sessions.forget(missing)
    with refused("INVALID_FIELD", INVALID):
        talk.sessions.stub.Forget(pb.ForgetRequest())
    with refused("TENANT_NOT_FOUND", NOT_FOUND):
        talk.sessions.stub.Forget(pb.ForgetRequest(tenant="red"))
    with refused("TENANT_NOT_EMPTY", PRECONDITION):
        talk.sessions.stub.Forget(pb.ForgetRequest(tenant="default"))
    with refused("BANK_NOT_FOUND", NOT_FOUND):
        talk.sessions.stub.Forget(pb.ForgetRequest(chunks=pb.ForgetRequest.BankChunks(bank="none")))
    assert len(talk.caller.ids(talk.bank)) == 5


def test_the_turn_of_an_expired_session_is_left_to_the_fork_that_has_it(
    serving: Callable[..., Any], refused: Refusals
) -> None:
    """Ask by the key of the turn, which no caller may read any more by its own session."""
    hands = Hands()
    sessions = SessionCaller(serving(clock=hands.clock(), pauses=Pauses(left_out={"expiry"})).channel)
    made = sessions.create(ttl=10).session_id
    sessions.append(made, sessions.acquire(made).epoch, 0, turn("x", key="k"))
    fork = sessions.fork(made).session_id
    sessions.update(fork, ttl=seconds(1000))
    hands.go_on(10 * SECOND)
    with refused("TURN_NOT_FOUND", NOT_FOUND):
        sessions.stub.Forget(pb.ForgetRequest(turn_key="k"))
    assert sessions.texts(fork) == ["x"]


def test_what_each_role_may_forget(serving: Callable[..., Any]) -> None:
    serving(limits=Limits(wrong_key_s=0.0))
    address = serving.server.address  # type: ignore[attr-defined]
    with kvbank.connect(address) as owner:
        operator = owner.access.create_key("operator").secret
    with kvbank.connect(address, api_key=operator) as client:
        client.access.create_tenant("red")
        keys = {role: client.access.create_key(role, tenant="red").secret for role in ("read", "write")}
        some = client.access.create_key("write", tenant="red", banks=["other-*"]).secret
    with kvbank.connect(address, api_key=keys["write"]) as writer:
        made = writer.sessions.create(name="talk").session_id
        lease = writer.sessions.acquire(made, "w").lease
        assert lease is not None
        writer.sessions.append(made, [kvbank.Turn(token_ids=[1, 2])], epoch=lease.epoch, follows=0)
        key_id = writer.access.whoami().key_id
    for forget, refusal in FORGOTTEN.items():
        assert outcomes_of_a_gone_session(address, keys["write"], some, forget) == ["", refusal]
    everything: dict[str, Callable[[kvbank.Client], object]] = {
        "turns": lambda client: client.sessions.forget(made, first=1),
        "session": lambda client: client.sessions.forget(made),
        "chunks": lambda client: client.forget_chunks("none", kvbank.Filter()),
        "tenant": lambda client: client.access.forget_tenant("red"),
    }

    def outcomes(key: str) -> dict[str, str]:
        with kvbank.connect(address, api_key=key) as client:
            return {name: reason(lambda ask=ask: ask(client)) for name, ask in everything.items()}

    assert set(outcomes(keys["read"]).values()) == {"PERMISSION_DENIED"}
    hidden = {"turns": "SESSION_NOT_FOUND", "session": "SESSION_NOT_FOUND", "chunks": "PERMISSION_DENIED"}
    assert outcomes(some) == hidden | {"tenant": "PERMISSION_DENIED"}
    denied = dict.fromkeys(("turns", "session", "chunks"), "PERMISSION_DENIED")
    with kvbank.connect(address, api_key=keys["write"]) as writer:
        assert writer.sessions.forget(made, first=1).key_id == key_id
    assert outcomes(keys["write"]) == {
        "turns": "",
        "session": "",
        "chunks": "BANK_NOT_FOUND",
        "tenant": "PERMISSION_DENIED",
    }
    assert outcomes(operator) == denied | {"tenant": ""}


Forget = Callable[[kvbank.Client, str], object]
# What is forgotten of a session that has one turn, whose key is the session's id; and the refusal to those who may not
# learn that it was there.
FORGOTTEN: dict[Forget, str] = {
    lambda client, gone: client.sessions.forget(gone, first=1): "SESSION_NOT_FOUND",
    lambda client, gone: client.sessions.forget_turn(gone): "TURN_NOT_FOUND",
    lambda client, gone: client.sessions.forget(gone): "SESSION_NOT_FOUND",
}


def outcomes_of_a_gone_session(address: str, key: str, some: str, forget: Forget) -> list[str]:
    """Forget something of a session, then all of it, and return how it is answered to be asked for the first again with
    its key, and with one of some banks."""
    with kvbank.connect(address, api_key=key) as writer, kvbank.connect(address, api_key=some) as other:
        gone = writer.sessions.create().session_id
        lease = writer.sessions.acquire(gone, "w").lease
        assert lease is not None
        writer.sessions.append(gone, [kvbank.Turn(token_ids=[1], key=gone)], epoch=lease.epoch, follows=0)
        forget(writer, gone)
        writer.sessions.forget(gone)
        return [reason(lambda client=client: forget(client, gone)) for client in (writer, other)]  # type: ignore[misc]


def reason(ask: Callable[[], object]) -> str:
    """Return the reason of the refusal of a call, "" where it is answered."""
    try:
        ask()
    except kvbank.ServiceError as error:
        return error.reason
    return ""
