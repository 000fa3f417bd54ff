"""Sessions at the wire: who has one, what is appended and read, who may see it."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

import kvbank
from kvbank.v1 import session_pb2 as pb
from memory_service.domain.limits import Limits
from memory_service.domain.tenants import TenantQuota
from tests.support import keyed
from tests.support.clocks import SECOND, Hands
from tests.support.refusals import Refusals
from tests.support.sessions import SessionCaller, seconds, turn

NOT_FOUND, EXISTS = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS
PRECONDITION, INVALID = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture
def sessions(serving: Callable[..., Any]) -> SessionCaller:
    """Start a server, and call it of sessions."""
    return SessionCaller(serving().channel)


# Sessions


def test_a_session_is_what_was_said_of_it_and_outlives_the_server(serving: Callable[..., Any]) -> None:
    caller = serving()
    caller.create("notes")
    sessions = SessionCaller(caller.channel)
    said = {
        "name": "a talk",
        "bank": "notes",
        "reads": ["docs", "faq"],
        "reader_digest": "r",
        "settings": {"model": "m"},
        "metadata": {"user": "u"},
    }
    made = sessions.create(**said)
    assert {field: getattr(made, field) for field in said} == said
    assert (len(made.session_id), made.head, made.tokens) == (32, 0, 0)
    assert made.create_time == made.update_time
    assert not made.HasField("expire_time")
    assert not made.HasField("lease")
    assert not made.HasField("forked_from")
    assert [len(each.branch) for each in made.stretches] == [16]
    assert not made.stretches[0].HasField("start_before")
    assert sessions.get(made.session_id) == sessions.get(name="a talk") == made
    epoch = sessions.acquire(made.session_id).epoch
    sessions.append(made.session_id, epoch, 0, turn("hello"))
    sessions.release(made.session_id, epoch)
    before, turns = sessions.get(made.session_id), sessions.turns(made.session_id, token_ids=True)
    sessions = SessionCaller(serving().channel)
    assert sessions.get(made.session_id) == before
    assert sessions.turns(made.session_id, token_ids=True) == turns


def test_a_session_without_a_bank_gets_the_name_of_one(sessions: SessionCaller, refused: Refusals) -> None:
    made = sessions.create()
    assert made.bank == f"session-{made.session_id[:16]}"
    with refused("BANK_NOT_FOUND", NOT_FOUND):
        sessions.create(bank="nowhere")


def test_a_name_is_one_sessions(sessions: SessionCaller, refused: Refusals) -> None:
    first, other = sessions.create(name="a"), sessions.create(name="b")
    assert len({sessions.create().session_id for _ in range(3)}) == 3
    for call in (
        lambda: sessions.create(name="a"),
        lambda: sessions.update(other.session_id, name="a"),
        lambda: sessions.fork(other.session_id, name="a"),
    ):
        with refused("SESSION_EXISTS", EXISTS) as refusal:
            call()
        assert dict(refusal.info.metadata) == {"session": "a"}
    assert sessions.update(first.session_id, name="").name == ""
    assert sessions.update(other.session_id, name="a").name == "a"
    assert sessions.get(name="a").session_id == other.session_id


def test_what_changes_of_a_session_and_what_stays(sessions: SessionCaller) -> None:
    made = sessions.create(name="a", metadata={"k": "v"}, settings={"model": "m"}, reads=["docs"])
    assert sessions.update(made.session_id) == made
    changed = sessions.update(
        made.session_id,
        metadata=pb.UpdateSessionRequest.Pairs(pairs={"other": "w"}),
        settings=pb.UpdateSessionRequest.Pairs(),
        reads=pb.UpdateSessionRequest.Banks(names=["faq"]),
        ttl=seconds(60),
    )
    assert (changed.metadata, changed.settings, list(changed.reads)) == ({"other": "w"}, {}, ["faq"])
    assert changed.expire_time.ToMicroseconds() >= made.create_time.ToMicroseconds() + 60 * SECOND
    assert (changed.name, changed.bank, changed.update_time) == (made.name, made.bank, made.update_time)
    assert not sessions.update(made.session_id, ttl=seconds(0)).HasField("expire_time")


def test_sessions_come_in_pages_newest_change_first(serving: Callable[..., Any]) -> None:
    hands = Hands()
    sessions = SessionCaller(serving(clock=hands.clock()).channel)
    made = []
    for number in range(7):
        if number % 2:  # some have the same time
            hands.go_on(SECOND)
        made.append(sessions.create(metadata={"odd": str(number % 2), "one": "1"}).session_id)
    hands.go_on(SECOND)
    sessions.append(made[2], sessions.acquire(made[2]).epoch, 0, turn("hello"))
    found = [each.session_id for each in sessions.listed(page_size=2)]
    assert found[0] == made[2]
    assert sorted(found) == sorted(made)
    assert [each.session_id for each in sessions.listed()] == found
    times = [each.update_time.ToMicroseconds() for each in sessions.listed(page_size=1)]
    assert times == sorted(times, reverse=True)
    assert {each.session_id for each in sessions.listed(odd="1", one="1")} == {made[1], made[3], made[5]}
    assert sessions.listed(odd="1", one="2") == []
    assert sessions.listed(**{'"': "1"}) == []


def test_a_session_expires_after_its_last_turn(serving: Callable[..., Any], refused: Refusals) -> None:
    hands = Hands()
    sessions = SessionCaller(serving(clock=hands.clock()).channel)
    made = sessions.create(name="a", ttl=10)
    epoch = sessions.acquire(made.session_id, ttl=60).epoch
    hands.go_on(8 * SECOND)
    longer = sessions.append(made.session_id, epoch, 0, turn("hello")).session
    assert longer.expire_time.ToMicroseconds() == hands.wall + 10 * SECOND
    hands.go_on(10 * SECOND - 1)
    assert sessions.get(name="a").head == 1
    hands.go_on(1)
    for call in (
        lambda: sessions.get(made.session_id),
        lambda: sessions.get(name="a"),
        lambda: sessions.turns(made.session_id),
        lambda: sessions.append(made.session_id, epoch, 1, turn("too late")),
        lambda: sessions.acquire(made.session_id),
        lambda: sessions.forget(made.session_id),
    ):
        with refused("SESSION_NOT_FOUND", NOT_FOUND):
            call()
    assert sessions.listed() == []
    assert sessions.create(name="a").session_id != made.session_id


NO_SESSIONS: list[dict[str, Any]] = [
    {"name": "n" * 201},
    {"name": " a"},
    {"metadata": {str(number): "" for number in range(21)}},
    {"metadata": {"k" * 65: ""}},
    {"metadata": {"k": "v" * 513}},
    {"metadata": {"k": "v\0"}},
    {"settings": {"k": "v" * 16384}},
    {"reads": ["a", "a"]},
    {"reads": [""]},
    {"reader_digest": "r" * 1025},
    {"ttl": 1e12},
]


def test_what_no_session_can_be(sessions: SessionCaller, refused: Refusals) -> None:
    for fields in NO_SESSIONS:
        with refused("INVALID_FIELD", INVALID):
            sessions.create(**fields)
    assert sessions.listed() == []


# Leases


def test_one_worker_has_a_session_at_a_time(serving: Callable[..., Any], refused: Refusals) -> None:
    hands = Hands()
    sessions = SessionCaller(serving(clock=hands.clock()).channel)
    session = sessions.create().session_id
    first = sessions.acquire(session, "w1", ttl=10)
    assert (first.holder, first.epoch) == ("w1", 1)
    assert first.expire_time.ToMicroseconds() == hands.wall + 10 * SECOND
    assert sessions.get(session).lease == first
    hands.go_on(4 * SECOND)
    with refused("LEASE_HELD", PRECONDITION) as refusal:
        sessions.acquire(session, "w2")
    assert dict(refusal.info.metadata) == {"session": session, "holder": "w1"}
    assert retry_after(lambda: sessions.acquire(session, "w2")) == 6.0
    assert sessions.renew(session, 1).expire_time.ToMicroseconds() == hands.wall + 10 * SECOND
    assert sessions.acquire(session, "w1").epoch == 2  # the same holder, perhaps started anew
    for call in (
        lambda: sessions.renew(session, 1),
        lambda: sessions.release(session, 1),
        lambda: sessions.append(session, 1, 0, turn("hello")),
        lambda: sessions.rewind(session, 1, 0),
    ):
        with refused("LEASE_LOST", PRECONDITION) as refusal:
            call()
        assert dict(refusal.info.metadata) == {"session": session, "epoch": "1"}
    sessions.release(session, 2)
    assert not sessions.get(session).HasField("lease")
    sessions.release(session, 2)  # a call that is made again
    assert sessions.acquire(session, "w2").epoch == 3


def retry_after(call: Callable[[], object]) -> float:
    """Return the seconds after which a call that is refused can be made again, as it is told."""
    retry = error_details_pb2.RetryInfo()
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status = rpc_status.from_call(caught.value)
    assert status is not None
    assert any(detail.Unpack(retry) for detail in status.details)
    return retry.retry_delay.ToMicroseconds() / SECOND


def test_a_lease_ends_by_itself_and_its_worker_is_fenced_off(serving: Callable[..., Any], refused: Refusals) -> None:
    hands = Hands()
    sessions = SessionCaller(serving(clock=hands.clock()).channel)
    session = sessions.create().session_id
    sessions.acquire(session, "w1", ttl=10)
    hands.go_on(8 * SECOND)
    sessions.append(session, 1, 0, turn("first"))  # renews
    hands.go_on(10 * SECOND - 1)
    sessions.append(session, 1, 1, turn("second"))
    hands.go_on(10 * SECOND)
    assert not sessions.get(session).HasField("lease")
    for call in (lambda: sessions.append(session, 1, 2, turn("third")), lambda: sessions.renew(session, 1)):
        with refused("LEASE_LOST", PRECONDITION):
            call()
    assert sessions.acquire(session, "w2").epoch == 2
    with refused("LEASE_LOST", PRECONDITION):
        sessions.append(session, 1, 2, turn("third"))
    sessions.append(session, 2, 2, turn("of another"))
    assert sessions.texts(session) == ["first", "second", "of another"]


def test_an_epoch_is_given_once_also_over_a_restart(serving: Callable[..., Any]) -> None:
    sessions = SessionCaller(serving().channel)
    session = sessions.create().session_id
    assert sessions.acquire(session).epoch == 1
    sessions = SessionCaller(serving().channel)
    assert sessions.get(session).lease.epoch == 1
    assert sessions.acquire(session).epoch == 2


def test_what_no_lease_can_be(sessions: SessionCaller, refused: Refusals) -> None:
    session = sessions.create().session_id
    for holder, ttl in (("", None), ("h" * 201, None), ("w", 0.5), ("w", 601.0)):
        with refused("INVALID_FIELD", INVALID):
            sessions.acquire(session, holder, ttl)
    epoch = sessions.acquire(session).epoch
    for ttl in (0.5, 601.0):
        with refused("INVALID_FIELD", INVALID):
            sessions.renew(session, epoch, ttl)


# Turns


def test_turns_are_numbered_and_read_as_they_were_appended(sessions: SessionCaller) -> None:
    session = sessions.create().session_id
    epoch = sessions.acquire(session).epoch
    given = [
        turn(
            "first", [1, 2**32 - 1, 7], usage={"total": 5, "less": -1}, metadata={"a": "b", "c": "v" * 16_384}, kept=2
        ),
        turn('zw\u00f6lf \U0001f600 \0 "', range(300), key="k-2", status=pb.TURN_STATUS_INCOMPLETE),
        pb.Turn(status=pb.TURN_STATUS_PART),
    ]
    answer = sessions.append(session, epoch, 0, *given)
    assert [(each.number, each.start, each.token_count) for each in answer.turns] == [
        (1, 0, 3),
        (2, 3, 300),
        (3, 303, 0),
    ]
    assert all(not each.items and not each.token_ids for each in answer.turns)
    assert (answer.session.head, answer.session.tokens, answer.session.lease.epoch) == (3, 303, epoch)
    whole = sessions.turns(session, token_ids=True)
    for one, read, made in zip(given, whole, answer.turns, strict=True):
        assert (read.items, read.token_ids, read.usage, read.metadata) == (
            one.items,
            one.token_ids,
            one.usage,
            one.metadata,
        )
        assert (read.status, read.prompt_tokens, read.kept) == (one.status, one.prompt_tokens, one.kept)
        assert (read.number, read.start, read.key) == (made.number, made.start, made.key)
        assert read.session_id == session
        assert sessions.turn(made.key, token_ids=True) == read
    assert answer.turns[1].key == "k-2"
    assert len({each.key for each in whole}) == 3
    assert all(not each.token_ids for each in sessions.turns(session))
    for page_size in (1, 2, 3):
        assert [each.number for each in sessions.turns(session, after=1, page_size=page_size)] == [2, 3]
    assert sessions.turns(session, after=3) == sessions.turns(session, after=9) == []


def test_turns_follow_the_last_one(sessions: SessionCaller, refused: Refusals) -> None:
    session = sessions.create().session_id
    epoch = sessions.acquire(session).epoch
    sessions.talk(session, epoch, 0, "a", "b")
    for follows in (-1, 0, 1, 3):
        with refused("TURN_CONFLICT", PRECONDITION) as refusal:
            sessions.append(session, epoch, follows, turn("c"))
        assert dict(refusal.info.metadata) == {"session": session, "head": "2"}
    assert sessions.texts(session) == ["a", "b"]


def test_a_turn_that_is_appended_again_is_there_once(sessions: SessionCaller, refused: Refusals) -> None:
    session, other = sessions.create().session_id, sessions.create().session_id
    epoch = sessions.acquire(session).epoch
    sessions.acquire(other)
    given = [turn("a", key="ka"), turn("b", key="kb")]
    first = sessions.append(session, epoch, 0, *given)
    again = sessions.append(session, epoch, 0, *given)
    assert list(again.turns) == list(first.turns)
    assert again.session.head == 2
    assert list(sessions.append(session, epoch, 1, given[1]).turns) == [first.turns[1]]
    sessions.append(session, epoch, 2, turn("c"))
    assert list(sessions.append(session, epoch, 0, *given).turns) == list(first.turns)
    for into, follows, turns in (
        (session, 0, [turn("a?", key="ka"), given[1]]),  # other content
        (session, 3, given),  # another place
        (session, 1, [given[1], turn("new")]),  # some are new
        (other, 0, given),  # another session
    ):
        with refused("KEY_REUSED", EXISTS):
            sessions.append(into, epoch, follows, *turns)
    assert sessions.texts(session) == ["a", "b", "c"]
    assert sessions.texts(other) == []


def test_turns_that_are_refused_leave_nothing(sessions: SessionCaller, refused: Refusals) -> None:
    session = sessions.create().session_id
    epoch = sessions.acquire(session).epoch
    for turns in (
        [],
        [turn("x") for _ in range(101)],
        [turn("x", key="k" * 65)],
        [turn("x", key="k"), turn("y", key="k")],
        [turn("x", status=pb.TURN_STATUS_UNSPECIFIED)],
        [turn("x", status=pb.TURN_STATUS_FORGOTTEN)],
        [turn("x", status=17)],
        [turn("x", prompt_tokens=4)],
        [turn("x", prompt_tokens=-1)],
        [turn("x", kept=-1)],
        [turn("x", [1] * 262_145)],
        [turn("x", metadata={str(number): "" for number in range(17)})],
        [turn("x", metadata={"trace": "v" * 16_385})],
        [turn("x", metadata={"a": "é" * 16_384, "b": "é" * 16_384})],
        [turn("x", usage={str(number): 1 for number in range(65)})],
        [turn("x", items=[pb.Item(id="i" * 65)])],
        [turn("x", items=[pb.Item()] * 1001)],
        [turn("x" * 700_000)],
        [turn("good"), turn("x", kept=-1)],
    ):
        with refused("INVALID_FIELD", INVALID):
            sessions.append(session, epoch, 0, *turns)
    assert sessions.get(session).head == 0
    assert sessions.turns(session) == []


def test_pages_of_large_turns_are_shorter(sessions: SessionCaller) -> None:
    session = sessions.create().session_id
    epoch = sessions.acquire(session).epoch
    for number in range(4):
        sessions.append(session, epoch, number, turn("x" * 250_000, range(50_000)))
    page = sessions.stub.ListTurns(pb.ListTurnsRequest(session_id=session, token_ids=True))
    assert 0 < len(page.turns) < 4
    assert page.next_after == len(page.turns)
    assert [each.number for each in sessions.turns(session, token_ids=True)] == [1, 2, 3, 4]
    # What is said beside the words of a turn counts too.
    metadata = {f"k{number}": "é" * 512 for number in range(16)}
    for follows in (4, 104, 204):
        sessions.append(session, epoch, follows, *[turn("x", metadata=metadata)] * 100)
    page = sessions.stub.ListTurns(pb.ListTurnsRequest(session_id=session, after=4, page_size=1000))
    assert len(page.turns) < 300
    assert page.ByteSize() < 4 * 1024 * 1024  # the smallest message that a service may be set to


# Who may


def test_another_tenants_session_is_as_if_it_were_not_there(serving: Callable[..., Any]) -> None:
    serving(limits=Limits(wrong_key_s=0.0))
    address = serving.server.address  # type: ignore[attr-defined]
    with kvbank.connect(address) as owner:
        operator = owner.access.create_key("operator").secret
    with kvbank.connect(address, api_key=operator) as client:
        for tenant in ("red", "blue"):
            client.access.create_tenant(tenant)
        keys = {tenant: client.access.create_key("write", tenant=tenant).secret for tenant in ("red", "blue")}
        some = client.access.create_key("write", tenant="red", banks=["team-*"]).secret
    red, blue, few = (SessionCaller(keyed.channel(address, key)) for key in (keys["red"], keys["blue"], some))
    made = red.create(name="a")
    epoch = red.acquire(made.session_id).epoch
    key = red.append(made.session_id, epoch, 0, turn("secret", key="the-key")).turns[0].key
    nothing = "0" * 32
    for stranger in (blue, few):
        assert stranger.listed() == []
        for call in (
            lambda name, of=stranger: of.get(name),
            lambda name, of=stranger: of.update(name, name="b"),
            lambda name, of=stranger: of.fork(name),
            lambda name, of=stranger: of.rewind(name, epoch, 0),
            lambda name, of=stranger: of.acquire(name),
            lambda name, of=stranger: of.renew(name, epoch),
            lambda name, of=stranger: of.release(name, epoch),
            lambda name, of=stranger: of.append(name, epoch, 1, turn("b")),
            lambda name, of=stranger: of.turns(name),
            lambda name, of=stranger: of.forget(name),
        ):
            assert said(call, made.session_id) == said(call, nothing)
            assert said(call, nothing)[0] == "SESSION_NOT_FOUND"
        assert said(lambda name, of=stranger: of.get(name=name), "a")[0] == "SESSION_NOT_FOUND"
        assert said(lambda name, of=stranger: of.turn(name), key) == said(
            lambda name, of=stranger: of.turn(name), "none"
        )
        assert said(lambda name, of=stranger: of.fork(turn_key=name), key)[0] == "TURN_NOT_FOUND"
        assert said(lambda name, of=stranger: of.turns_to(name), key)[0] == "TURN_NOT_FOUND"
    assert red.get(made.session_id).head == 1
    assert blue.create(name="a").name == "a"
    # A key of some banks makes sessions in those alone.
    for fields in ({}, {"bank": "other"}, {"reads": ["other"]}):
        assert said(lambda _, given=fields: few.create(**given), "")[0] == "PERMISSION_DENIED"


def said(call: Callable[[str], object], name: str) -> tuple[str, str]:
    """Return reason and text with which a call is refused, with the name that it is about left out."""
    with pytest.raises(grpc.RpcError) as caught:
        call(name)
    status = rpc_status.from_call(caught.value)
    info = error_details_pb2.ErrorInfo()
    assert status is not None
    assert status.details[0].Unpack(info)
    return info.reason, status.message.replace(name, "NAME") if name else status.message


def test_turns_count_as_bytes_of_their_tenant(serving: Callable[..., Any], refused: Refusals) -> None:
    caller = serving(max_sessions=2)
    sessions = SessionCaller(caller.channel)
    access = serving.server.banks.engine.access  # type: ignore[attr-defined]
    session = sessions.create().session_id
    epoch = sessions.acquire(session).epoch
    sessions.append(session, epoch, 0, turn("x" * 10_000))
    held = access.tenant_usage("default").bytes
    assert 30_000 < held < 31_000  # the text is in it three times
    access.set_tenant_quota("default", TenantQuota(bytes=held + 5_000))
    with refused("QUOTA_EXCEEDED", EXHAUSTED) as refusal:
        sessions.append(session, epoch, 1, turn("x" * 10_000))
    assert refusal.info.metadata["subject"] == "tenant:default"
    sessions.append(session, epoch, 1, turn("short"))
    sessions.create()
    with refused("QUOTA_EXCEEDED", EXHAUSTED) as refusal:
        sessions.fork(session)
    assert refusal.info.metadata["unit"] == "sessions"
    sessions.forget(session)
    assert access.tenant_usage("default").bytes == 0
    again = sessions.create().session_id
    sessions.append(again, sessions.acquire(again).epoch, 0, turn("x" * 10_000))


def test_texts_of_any_writing_count_as_the_bytes_that_they_are(serving: Callable[..., Any]) -> None:
    sessions = SessionCaller(serving().channel)
    access = serving.server.banks.engine.access  # type: ignore[attr-defined]
    session = sessions.create().session_id
    epoch, item = sessions.acquire(session).epoch, pb.Item(id="i", role="user", text="\u4e2d\u6587\U0001f680" * 1000)
    sessions.append(session, epoch, 0, pb.Turn(token_ids=[1], status=pb.TURN_STATUS_COMPLETED, items=[item], key="k"))
    assert 10_000 < access.tenant_usage("default").bytes < 11_000
    assert sessions.turn("k").items[0].text == item.text


def test_windows_count_as_bytes_of_their_tenant(serving: Callable[..., Any], refused: Refusals) -> None:
    sessions = SessionCaller(serving().channel)
    access = serving.server.banks.engine.access  # type: ignore[attr-defined]
    session = sessions.create().session_id
    epoch = sessions.acquire(session).epoch
    sessions.append(session, epoch, 0, turn("a"), turn("b"))
    turns = access.tenant_usage("default").bytes
    access.set_tenant_quota("default", TenantQuota(bytes=turns + 5_000))
    for at, size in ((1, 3_000), (2, 4_000)):
        sessions.keep(session, epoch, at, b"x" * size)
        assert access.tenant_usage("default").bytes == turns + size
    with refused("QUOTA_EXCEEDED", EXHAUSTED) as refusal:
        sessions.keep(session, epoch, 2, b"y" * 5_001)
    assert refusal.info.metadata["subject"] == "tenant:default"
    header = pb.WindowHeader(session_id=session, epoch=epoch, turn=2, stamp="s", size=5_001)
    with refused("QUOTA_EXCEEDED", EXHAUSTED):  # before any byte comes
        list(sessions.stub.KeepWindow(iter([pb.KeepWindowRequest(header=header)])))
    assert sessions.window(session) == (2, "s", b"x" * 4_000)
    with refused("QUOTA_EXCEEDED", EXHAUSTED):
        sessions.append(session, epoch, 2, turn("x" * 1_000))
    sessions.rewind(session, epoch, 1)
    sessions.append(session, epoch, 1, turn("x" * 1_000))
    sessions = SessionCaller(serving().channel)  # the sums are made anew
    with refused("QUOTA_EXCEEDED", EXHAUSTED):
        sessions.keep(session, epoch, 2, b"y" * 4_000)
    sessions.keep(session, epoch, 2, b"y" * 1_000)
    sessions.forget(session)
    access = serving.server.banks.engine.access  # type: ignore[attr-defined]
    assert access.tenant_usage("default").bytes == 0


def test_a_key_of_some_banks_sees_the_sessions_of_those_page_by_page(serving: Callable[..., Any]) -> None:
    caller = serving(limits=Limits(wrong_key_s=0.0))
    owner, address = SessionCaller(caller.channel), serving.server.address  # type: ignore[attr-defined]
    for bank in ("team-a", "team-b", "other"):
        caller.create(bank)
    made = [owner.create(bank=("team-a", "other", "team-b")[number % 3]).session_id for number in range(9)]
    with kvbank.connect(address) as client:
        secret = client.access.create_key("read", banks=["team-[!b]", "ot[gh]er"]).secret
    few = SessionCaller(keyed.channel(address, secret))
    for size in (1, 4, 0):
        assert [each.session_id for each in few.listed(size)] == [made[at] for at in (7, 6, 4, 3, 1, 0)]


def test_a_tenant_with_sessions_is_deleted_by_force_alone(serving: Callable[..., Any]) -> None:
    serving(limits=Limits(wrong_key_s=0.0))
    address = serving.server.address  # type: ignore[attr-defined]
    with kvbank.connect(address) as owner:
        operator = owner.access.create_key("operator").secret
    with kvbank.connect(address, api_key=operator) as client:
        client.access.create_tenant("red")
        red = SessionCaller(keyed.channel(address, client.access.create_key("write", tenant="red").secret))
        session = red.create(name="a").session_id
        red.append(session, red.acquire(session).epoch, 0, turn("hello", key="k"))
        with pytest.raises(kvbank.FailedPrecondition) as caught:
            client.access.delete_tenant("red")
        assert caught.value.reason == "TENANT_NOT_EMPTY"
        client.access.delete_tenant("red", force=True)
        client.access.create_tenant("red")
        red = SessionCaller(keyed.channel(address, client.access.create_key("write", tenant="red").secret))
        assert red.listed() == []
        assert said(red.turn, "k")[0] == "TURN_NOT_FOUND"
