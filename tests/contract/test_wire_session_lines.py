"""Forks and rewinds of sessions at the wire, the stretches that they leave, and the windows of sessions."""

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import xxhash

from kvbank.v1 import service_pb2
from kvbank.v1 import session_pb2 as pb
from kvbank.wire.frames import encode
from memory_service.domain import cancellation
from memory_service.domain.limits import Limits, Pauses
from tests.support.kept_windows import KeptWindows
from tests.support.refusals import Refusals
from tests.support.sessions import SessionCaller, turn
from tests.support.waiting import wait_until

NOT_FOUND, EXISTS = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS
PRECONDITION, INVALID = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def sessions(serving: Callable[..., Any]) -> SessionCaller:
    """Start a server, and call it of sessions."""
    return SessionCaller(serving().channel)


def begun(sessions: SessionCaller, *texts: str, **fields: Any) -> tuple[str, int]:
    """Make a session with some turns; return its id and the epoch of its lease."""
    session = sessions.create(**fields).session_id
    epoch = sessions.acquire(session).epoch
    sessions.talk(session, epoch, 0, *texts)
    return session, epoch


def stretches(session: pb.Session) -> list[int | None]:
    """Return where the stretches of a session end."""
    return [each.start_before if each.HasField("start_before") else None for each in session.stretches]


# Forks


def test_a_fork_has_the_turns_before_it_and_goes_its_own_way(sessions: SessionCaller, refused: Refusals) -> None:
    said = {"settings": {"model": "m"}, "reads": ["docs"], "reader_digest": "r"}
    session, epoch = begun(sessions, "a", "b", "c", name="talk", metadata={"k": "v"}, ttl=60, **said)
    whole = sessions.get(session)
    fork = sessions.fork(session, turn=2, name="other", metadata={"m": "w"})
    assert (fork.name, fork.metadata, fork.bank) == ("other", {"m": "w"}, whole.bank)
    assert {field: getattr(fork, field) for field in said} == said
    assert (fork.forked_from.session_id, fork.forked_from.turn) == (session, 2)
    assert (fork.head, fork.tokens, fork.HasField("lease"), fork.HasField("expire_time")) == (2, 6, False, True)
    assert stretches(fork) == [6, None]
    assert fork.stretches[0].branch == whole.stretches[0].branch
    mine = sessions.acquire(fork.session_id, "w2").epoch
    sessions.talk(fork.session_id, mine, 2, "x", "y")
    sessions.talk(session, epoch, 3, "d")
    assert sessions.texts(fork.session_id) == ["a", "b", "x", "y"]
    assert sessions.texts(session) == ["a", "b", "c", "d"]
    assert [each.start for each in sessions.turns(fork.session_id)] == [0, 3, 6, 9]
    assert [each.session_id for each in sessions.turns(fork.session_id)] == [session] * 2 + [fork.session_id] * 2
    assert [each.number for each in sessions.turns(fork.session_id, after=1, page_size=1)] == [2, 3, 4]
    assert stretches(sessions.fork(session)) == [12, None]
    assert stretches(sessions.fork(session, turn=0)) == [None]
    for at in (5, -1):
        with refused("TURN_NOT_FOUND", NOT_FOUND):
            sessions.fork(session, turn=at)


def test_forks_of_forks_share_what_they_have_alike(sessions: SessionCaller) -> None:
    session, _ = begun(sessions, "a", "b")
    last, texts, branches = session, ["a", "b"], 1
    for generation in range(4):
        last = sessions.fork(last).session_id
        if generation % 2:  # the others have no turns of their own, and leave no stretch
            sessions.talk(last, sessions.acquire(last).epoch, len(texts), f"of {generation}")
            texts.append(f"of {generation}")
            branches += 1
    assert sessions.texts(last) == texts
    assert len(sessions.get(last).stretches) == branches
    early = sessions.fork(last, turn=1)
    assert stretches(early) == [3, None]
    assert sessions.texts(early.session_id) == ["a"]


def test_a_turn_is_found_and_forked_from_by_its_key(sessions: SessionCaller, refused: Refusals) -> None:
    session, epoch = begun(sessions, "a", "b")
    sessions.append(session, epoch, 2, turn("c", key="kc"), turn("d"))
    sessions.rewind(session, epoch, 1)
    sessions.talk(session, epoch, 1, "else")
    assert sessions.turn("kc").items[0].text == "c"
    fork = sessions.fork(turn_key="kc", name="back")
    assert sessions.texts(fork.session_id) == ["a", "b", "c"]
    assert (fork.forked_from.session_id, fork.forked_from.turn) == (session, 3)
    assert sessions.texts(session) == ["a", "else"]
    with refused("TURN_NOT_FOUND", NOT_FOUND):
        sessions.fork(turn_key="no such key")


def test_the_turns_up_to_one_are_read_by_its_key(sessions: SessionCaller, refused: Refusals) -> None:
    """Rewind a session and its fork: the turns before each turn stay those that it was said behind."""
    session, epoch = begun(sessions, "a", "b")
    sessions.append(session, epoch, 2, turn("c", key="line c"), turn("d"))
    fork = sessions.fork(session, turn=2).session_id
    other = sessions.acquire(fork).epoch
    sessions.append(fork, other, 2, turn("x", key="line x"))
    for each, own in ((session, epoch), (fork, other)):
        sessions.rewind(each, own, 1)
        sessions.talk(each, own, 1, "else")
    for page_size in (0, 1, 2):
        assert [each.items[0].text for each in sessions.turns_to("line c", page_size=page_size)] == ["a", "b", "c"]
    assert [each.items[0].text for each in sessions.turns_to("line x", 1)] == ["b", "x"]
    assert sessions.turns_to("line x", 3) == []
    for key in ("no such key", "x" * 1000):
        with refused("TURN_NOT_FOUND", NOT_FOUND):
            sessions.turns_to(key)


# Rewinds


def test_a_rewound_session_goes_on_behind_an_earlier_turn(sessions: SessionCaller, refused: Refusals) -> None:
    session, epoch = begun(sessions, "a", "b", "c")
    before = sessions.get(session)
    same = sessions.rewind(session, epoch, 3)
    assert list(same.stretches) == list(before.stretches)
    back = sessions.rewind(session, epoch, 1)
    assert (back.head, back.tokens, stretches(back)) == (1, 3, [3, None])
    assert back.stretches[0].branch == before.stretches[0].branch
    assert back.lease.epoch == epoch
    with refused("TURN_CONFLICT", PRECONDITION):
        sessions.append(session, epoch, 3, turn("d"))
    sessions.talk(session, epoch, 1, "x", "y")
    assert sessions.texts(session) == ["a", "x", "y"]
    sessions.rewind(session, epoch, 2)
    sessions.rewind(session, epoch, 1)  # the branch in between never had a turn
    assert len(sessions.get(session).stretches) == 2
    emptied = sessions.rewind(session, epoch, 0)
    assert (emptied.head, emptied.tokens, stretches(emptied)) == (0, 0, [None])
    sessions.talk(session, epoch, 0, "anew")
    assert sessions.texts(session) == ["anew"]
    for at in (2, -1):
        with refused("TURN_NOT_FOUND", NOT_FOUND):
            sessions.rewind(session, epoch, at)


def test_a_turn_that_was_rewound_from_is_not_appended_again(sessions: SessionCaller, refused: Refusals) -> None:
    session, epoch = begun(sessions, "a")
    sessions.append(session, epoch, 1, turn("b", key="kb"))
    sessions.rewind(session, epoch, 1)
    with refused("KEY_REUSED", EXISTS):
        sessions.append(session, epoch, 1, turn("b", key="kb"))


# What a deleted session leaves


def test_what_a_fork_has_of_a_deleted_session_stays(sessions: SessionCaller, refused: Refusals) -> None:
    session, epoch = begun(sessions, "a", "b", "c")
    sessions.rewind(session, epoch, 2)
    sessions.append(session, epoch, 2, turn("x", key="kx"), turn("y", key="ky"), turn("z", key="kz"))
    fork = sessions.fork(session, turn=4).session_id
    sessions.talk(fork, sessions.acquire(fork).epoch, 4, "mine")
    early = sessions.fork(session, turn=1).session_id
    gone = sessions.forget(session)
    assert (gone.turns, gone.tokens, gone.turns_kept) == (2, 6, 4)
    assert sessions.forget(session) == gone
    with refused("SESSION_NOT_FOUND", NOT_FOUND):
        sessions.get(session)
    with refused("TURN_NOT_FOUND", NOT_FOUND):
        sessions.turn("kz")
    assert sessions.texts(fork) == ["a", "b", "x", "y", "mine"]
    assert sessions.texts(early) == ["a"]
    assert sessions.turn("ky").session_id == fork
    again = sessions.fork(turn_key="kx").session_id
    assert sessions.texts(again) == ["a", "b", "x"]
    assert sessions.forget(fork).turns_kept == 3
    assert sessions.texts(again) == ["a", "b", "x"]
    assert sessions.forget(again).turns_kept == 1
    assert sessions.forget(early).turns_kept == 0
    with refused("TURN_NOT_FOUND", NOT_FOUND):
        sessions.turn("kx")


def test_a_bank_of_sessions_goes_with_the_last_of_them(serving: Callable[..., Any]) -> None:
    caller = serving()
    sessions = SessionCaller(caller.channel)
    session = sessions.create()
    # The last one begins as banks of sessions do, and was made by somebody for something else.
    chosen = ["named", "session-notes"]
    for bank in (session.bank, *chosen):
        caller.create(bank)
    fork = sessions.fork(session.session_id).session_id
    named = [sessions.create(bank=bank).session_id for bank in chosen]

    def banks() -> list[str]:
        return [bank.name for bank in caller.stub.ListBanks(service_pb2.ListBanksRequest()).banks]

    sessions.forget(session.session_id)
    assert sorted(banks()) == sorted([session.bank, *chosen])
    sessions.forget(fork)
    assert banks() == chosen
    for each in named:
        sessions.forget(each)
    assert banks() == chosen


# Windows


def test_a_window_is_kept_for_the_next_worker(serving: Callable[..., Any], data: Any, refused: Refusals) -> None:
    sessions = SessionCaller(serving().channel)
    session, epoch = begun(sessions, "a", "b", "c")
    assert sessions.window(session) is None
    first, second = os.urandom(2_500_000), os.urandom(1000)
    sessions.keep(session, epoch, 2, first)
    sessions = SessionCaller(serving().channel)
    assert sessions.window(session) == (2, "s", first)
    sessions.keep(session, epoch, 3, second, stamp="t")
    sessions.keep(session, epoch, 2, first)  # late
    assert sessions.window(session) == (3, "t", second)
    KeptWindows(data).wait_for(1)
    for at, with_epoch, reason, code in (
        (4, epoch, "TURN_CONFLICT", PRECONDITION),
        (3, epoch + 1, "LEASE_LOST", PRECONDITION),
    ):
        with refused(reason, code):
            sessions.keep(session, with_epoch, at, first)
    sessions.rewind(session, epoch, 2)
    assert sessions.window(session) is None
    sessions.keep(session, epoch, 2, second)
    sessions.forget(session)
    with refused("SESSION_NOT_FOUND", NOT_FOUND):
        sessions.window(session)
    KeptWindows(data).wait_for(0)


NO_WINDOWS: list[tuple[dict[str, Any], str]] = [
    ({"size": 1999}, "INVALID_FIELD"),
    ({"size": 2001}, "INVALID_FIELD"),
    ({"size": 0}, "INVALID_FIELD"),
    ({"size": 2**40}, "INVALID_FIELD"),
    ({"checksum": 1}, "CHECKSUM_IN_TRANSIT"),
    ({"stamp": "s" * 1025}, "INVALID_FIELD"),
]


def test_a_window_that_is_not_what_it_says_leaves_nothing(
    sessions: SessionCaller, data: Any, refused: Refusals
) -> None:
    session, epoch = begun(sessions, "a")
    for header, reason in NO_WINDOWS:
        with refused(reason, INVALID):
            sessions.keep(session, epoch, 1, b"x" * 2000, **header)
        assert sessions.window(session) is None
    KeptWindows(data).wait_for(0)


def test_a_caller_that_goes_while_its_window_is_opened_leaves_nothing_open(
    serving: Callable[..., Any], data: Any
) -> None:
    opened, gone, windows = threading.Event(), threading.Event(), KeptWindows(data)

    def wait() -> None:
        """Hold up the thread until it is told that its caller has gone."""
        opened.set()
        while not gone.is_set():
            try:
                wait_until(cancellation.check)
            except cancellation.Cancelled:
                gone.set()

    sessions = SessionCaller(serving(pauses=Pauses(at={"window opened": wait})).channel)
    session, epoch = begun(sessions, "a")
    header = pb.WindowHeader(session_id=session, epoch=epoch, turn=1, size=4, checksum=7)

    def calls() -> Iterator[Any]:
        yield sessions.stub.KeepWindow(iter([pb.KeepWindowRequest(header=header)]))
        gone.set()
        sessions.keep(session, epoch, 1, b"data")
        opened.clear()
        gone.clear()
        yield sessions.stub.ReadWindow(pb.ReadWindowRequest(session_id=session))

    for number, call in enumerate(calls()):
        assert opened.wait(60)
        call.cancel()
        wait_until(gone.is_set)
        windows.wait_for(number)
        wait_until(lambda: not windows.open())
        opened.clear()


def test_a_window_of_a_turn_that_was_rewound_meanwhile_is_refused(
    serving: Callable[..., Any], refused: Refusals
) -> None:
    opened = threading.Event()
    sessions = SessionCaller(serving(pauses=Pauses(at={"window opened": opened.set})).channel)
    session, epoch = begun(sessions, "a", "b")
    checksum = xxhash.xxh3_64_intdigest(b"data")
    header = pb.WindowHeader(session_id=session, epoch=epoch, turn=2, size=4, checksum=checksum)

    def sent() -> Iterator[Any]:
        yield pb.KeepWindowRequest(header=header)
        assert opened.wait(60)
        sessions.rewind(session, epoch, 1)
        sessions.talk(session, epoch, 1, "c", "d")
        yield encode([b"data"])

    with refused("TURN_CONFLICT", PRECONDITION):
        list(sessions.stub.KeepWindow(sent()))
    assert sessions.window(session) is None


def test_a_caller_that_sends_nothing_more_of_its_window_keeps_no_room(
    serving: Callable[..., Any], data: Any, refused: Refusals
) -> None:
    sessions = SessionCaller(serving(limits=Limits(stalled_s=0.3)).channel)
    session, epoch = begun(sessions, "a")
    header = pb.WindowHeader(session_id=session, epoch=epoch, turn=1, size=5_000, checksum=7)
    ended = threading.Event()

    def sent(*frames: Any) -> Iterator[Any]:
        yield from frames
        ended.wait(60)

    for frames in ((), (pb.KeepWindowRequest(header=header),), (pb.KeepWindowRequest(header=header), encode([b"x"]))):
        ended.clear()
        with refused("NOT_SERVING", grpc.StatusCode.UNAVAILABLE):
            list(sessions.stub.KeepWindow(sent(*frames)))
        ended.set()
    assert sessions.window(session) is None
    KeptWindows(data).wait_for(0)


def test_streams_of_windows_that_are_none(sessions: SessionCaller, refused: Refusals) -> None:
    session, epoch = begun(sessions, "a")
    header = pb.KeepWindowRequest(header=pb.WindowHeader(session_id=session, epoch=epoch, turn=1, size=5, checksum=7))
    for frames in ([], [b"\x12\x01x"], [header, header], [header]):
        with refused("INVALID_FIELD", INVALID):
            list(sessions.stub.KeepWindow(iter(frames)))
    assert sessions.window(session) is None


def test_a_damaged_window_is_none(sessions: SessionCaller, data: Any) -> None:
    session, epoch = begun(sessions, "a")
    kept, windows = os.urandom(5000), KeptWindows(data)
    for changed in (kept[:99] + bytes([kept[99] ^ 1]) + kept[100:], kept[:-1], None):
        sessions.keep(session, epoch, 1, kept)
        (name,) = windows.wait_for(1)
        windows.change(name, changed)
        assert sessions.window(session) is None
        windows.wait_for(0)
    sessions.keep(session, epoch, 1, kept)
    assert sessions.window(session) == (1, "s", kept)
