"""The sessions of a data folder: what expires goes, what is damaged is never served, what is acknowledged outlives a
kill."""

import random
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest

import kvbank
from kvbank.v1 import service_pb2
from memory_service.api.embedded import LocalServer
from memory_service.care.check import check
from memory_service.domain.limits import Limits, Pauses
from memory_service.domain.sessions import Item, Session, Turn, new_session_id
from memory_service.domain.tenants import TenantQuota
from memory_service.storage.sessions.turn_row import prepared
from tests.support.clocks import SECOND, Hands
from tests.support.service_process import ServiceHost
from tests.support.serving import connect
from tests.support.sessions import SessionCaller, turn
from tests.support.waiting import wait_until

__all__ = ["connect"]
TABLES = ("sessions", "branches", "turns", "windows")


def rows(data: Path) -> dict[str, int]:
    """Count the rows of sessions in the database."""
    with closing(sqlite3.connect(data / "metadata.db")) as database:
        return {table: database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES}


def test_the_digest_of_a_turn_is_that_of_earlier_versions() -> None:
    """Turns in folders of these are known by it when a worker appends them again."""
    made = prepared(Turn("completed", (Item("i", "user", "\u4e2d\u6587"),), b"", metadata={"k": "\xe4"}))
    assert made.digest.hex() == "f7908086f0d6c1f35883667f596d8b0e"


def test_what_has_expired_goes_with_its_turns_window_and_bank(serving: Callable[..., Any], data: Path) -> None:
    hands = Hands()
    caller = serving(clock=hands.clock(), limits=Limits(expiry_s=0.05))
    sessions = SessionCaller(caller.channel)
    short, long = sessions.create(ttl=10, name="a"), sessions.create(name="b")
    caller.create(short.bank)
    for made in (short, long):
        epoch = sessions.acquire(made.session_id).epoch
        sessions.talk(made.session_id, epoch, 0, "x", "y")
        sessions.keep(made.session_id, epoch, 2, b"w" * 100)
    fork = sessions.fork(short.session_id, turn=1).session_id
    assert sessions.update(fork, ttl={"seconds": 1000}).head == 1
    assert rows(data) == {"sessions": 3, "branches": 3, "turns": 4, "windows": 2}
    hands.go_on(10 * SECOND)
    wait_until(lambda: rows(data) == {"sessions": 2, "branches": 3, "turns": 3, "windows": 1})
    wait_until(lambda: len(list((data / "windows").iterdir())) == 1)
    assert sessions.texts(fork) == ["x"]
    assert [bank.name for bank in caller.stub.ListBanks(service_pb2.ListBanksRequest()).banks] == [short.bank]
    hands.go_on(1000 * SECOND)
    wait_until(lambda: rows(data) == {"sessions": 1, "branches": 1, "turns": 2, "windows": 1})
    wait_until(lambda: not caller.stub.ListBanks(service_pb2.ListBanksRequest()).banks)
    assert caller.sample("kvbank_sessions_expired_total") == 2
    assert (caller.sample("kvbank_sessions"), caller.sample("kvbank_turns_appended_total")) == (1, 4)
    assert caller.sample("kvbank_turn_bytes") > 500


def test_what_has_expired_goes_in_steps_and_a_kill_between_two_of_them_goes_on(
    serving: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    """Copy the folder when some of the turns have gone, as a kill would leave it, and serve the copy."""
    hands, copy, copying = Hands(), tmp_path / "copy", list[bool]()

    def look() -> None:
        if copying and 0 < rows(data)["turns"] < 6:
            copying.clear()
            shutil.copytree(data, copy, ignore=shutil.ignore_patterns("*.socket", "*-shm"))

    limits = Limits(expiry_s=0.05, step_rows=1)
    caller = serving(clock=hands.clock(), limits=limits, pauses=Pauses(at={"submitted": look}))
    sessions = SessionCaller(caller.channel)
    made = sessions.create(ttl=10)
    caller.create(made.bank)
    sessions.talk(made.session_id, sessions.acquire(made.session_id).epoch, 0, *"abcdef")
    copying.append(True)
    hands.go_on(10 * SECOND)
    wait_until(lambda: not any(rows(data).values()))
    serving.stop()  # type: ignore[attr-defined]
    assert rows(copy)["sessions"] == 1
    assert check(copy).problems == []
    limits = Limits(expiry_s=0.05)
    with (
        LocalServer(copy, clock=hands.clock(), limits=limits, durability="os") as server,
        kvbank.connect(server.address) as client,
    ):
        wait_until(lambda: not any(rows(copy).values()) and not list(client.list_banks()))


def test_a_step_takes_the_turns_of_many_branches(serving: Callable[..., Any], data: Path) -> None:
    """Let a session expire that was rewound again and again, and count the transactions."""
    hands, submitted = Hands(), list[None]()
    pauses = Pauses(at={"submitted": lambda: submitted.append(None)})
    sessions = SessionCaller(serving(clock=hands.clock(), limits=Limits(expiry_s=0.05), pauses=pauses).channel)
    made = sessions.create(ttl=10).session_id
    epoch = sessions.acquire(made).epoch
    for _ in range(20):
        sessions.talk(made, epoch, 0, "x")
        sessions.rewind(made, epoch, 0)
    before = len(submitted)
    hands.go_on(10 * SECOND)
    wait_until(lambda: not any(rows(data).values()))
    assert len(submitted) - before < 10


def test_a_fork_that_goes_while_its_parent_expires_leaves_nothing(serving: Callable[..., Any], data: Path) -> None:
    """Forget the fork, which has all turns of the other session, between two steps of the deletion of that one."""
    hands, forks = Hands(), list[str]()

    def forget() -> None:
        if forks:
            sessions.forget(forks.pop())

    limits = Limits(expiry_s=0.05, step_rows=2)
    caller = serving(clock=hands.clock(), limits=limits, pauses=Pauses(at={"submitted": forget}))
    sessions = SessionCaller(caller.channel)
    made = sessions.create(ttl=10)
    caller.create(made.bank)
    sessions.talk(made.session_id, sessions.acquire(made.session_id).epoch, 0, *"abcd")
    fork = sessions.fork(made.session_id).session_id
    sessions.update(fork, ttl={"seconds": 1000})
    forks.append(fork)
    hands.go_on(10 * SECOND)
    wait_until(lambda: not any(rows(data).values()))
    wait_until(lambda: not caller.stub.ListBanks(service_pb2.ListBanksRequest()).banks)


def test_a_tenant_that_goes_with_its_expired_sessions_is_no_error(
    serving: Callable[..., Any], data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Delete the tenant when the deletion of the first session has begun, and that of the second one has not."""
    hands, armed = Hands(), list[bool]()

    def drop() -> None:
        if armed:
            armed.clear()
            engine.access.drop_tenant("red", force=True)

    serving(clock=hands.clock(), limits=Limits(expiry_s=0.05), pauses=Pauses(at={"submitted": drop}))
    engine = serving.server.banks.engine  # type: ignore[attr-defined]
    engine.access.add_tenant("red", TenantQuota())
    for name in "ab":
        new = Session(new_session_id(), name, "bank", ttl=10 * SECOND, tenant="red")
        engine.sessions.create(new)
    armed.append(True)
    hands.go_on(10 * SECOND)
    wait_until(lambda: not armed and not any(rows(data).values()))
    serving.stop()  # type: ignore[attr-defined]
    assert "stays" not in caplog.text


def test_a_leap_of_the_clock_ends_no_lease_and_no_session(serving: Callable[..., Any]) -> None:
    hands = Hands()
    sessions = SessionCaller(serving(clock=hands.clock(), limits=Limits(expiry_s=0.02)).channel)
    session = sessions.create(ttl=60).session_id
    epoch = sessions.acquire(session, ttl=30).epoch
    before = sessions.get(session)
    hands.set_wall(7200 * SECOND)
    hands.go_on(3601 * SECOND)  # that the wall clock is ahead has lasted, and the time leaps
    wait_until(lambda: not sessions.listed() or sessions.get(session).expire_time != before.expire_time)
    # The hour that has passed has ended both by itself.
    assert sessions.listed() == []
    session = sessions.create(ttl=60).session_id
    assert sessions.acquire(session, ttl=30).epoch == epoch


# Damage

UNCOVERED = {
    "sessions": {"expires", "lease_expires"},
    "branches": {"bytes"},
    "turns": {"turn_id"},
}


def columns(data: Path) -> list[tuple[str, str]]:
    """Name each column of a row that is to be as it was written."""
    with closing(sqlite3.connect(data / "metadata.db")) as database:
        return [
            (table, name)
            for table, left_out in UNCOVERED.items()
            for _, name, *_ in database.execute(f"PRAGMA table_info({table})")
            if name not in left_out
        ]


VALUES = ("{0} || '1'", "CAST(x'ff' AS TEXT)", "x'00'", "{0} + 1", "17")


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one way", "every way"])
def test_no_damaged_record_is_ever_served(serving: Callable[..., Any], data: Path, every: bool) -> None:
    """Change each column of a row, in one way or in every way: what is answered is as it was, or nothing."""
    sessions = SessionCaller(serving().channel)
    session = sessions.create(name="a", metadata={"k": "v"}, settings={"model": "m"}, reads=["b"]).session_id
    epoch = sessions.acquire(session, ttl=600).epoch
    sessions.append(session, epoch, 0, turn("first", key="k1"), turn("second", key="k2"))
    fork = sessions.fork(session, turn=1).session_id

    calls: dict[str, Callable[[], Any]] = {
        "get": lambda: sessions.get(session),
        "named": lambda: sessions.get(name="a"),
        "fork": lambda: sessions.get(fork),
        "listed": lambda: {each.session_id for each in sessions.listed()},
        "turns": lambda: sessions.turns(session, token_ids=True),
        "turns of the fork": lambda: sessions.turns(fork, token_ids=True),
        "turn": lambda: sessions.turn("k2", token_ids=True),
    }
    right = {name: call() for name, call in calls.items()}
    refused_for = set()
    with closing(sqlite3.connect(data / "metadata.db", isolation_level=None)) as database:
        for place, (table, name) in enumerate(columns(data)):
            for value in VALUES if every else VALUES[place % 2 * 3 :][:1]:
                kept = database.execute(f"SELECT rowid, {name} FROM {table} ORDER BY rowid").fetchall()
                new = value.format(name)
                try:
                    database.execute(
                        f"UPDATE {table} SET {name} = {new} WHERE rowid = (SELECT max(rowid) FROM {table})"
                    )
                except sqlite3.IntegrityError:
                    continue
                if any(refuses(call, right[each], (table, name, new, each)) for each, call in calls.items()):
                    refused_for.add((table, name))
                for rowid, was in kept:
                    database.execute(f"UPDATE {table} SET {name} = ? WHERE rowid = ?", (was, rowid))
    assert {name: call() for name, call in calls.items()} == right
    assert not every or set(columns(data)) == refused_for


def refuses(call: Callable[[], Any], right: Any, case: object) -> bool:
    """Tell whether a call is refused, or leaves something out of a list; otherwise it answers what is right."""
    try:
        found = call()
    except grpc.RpcError as error:
        refusal = error.code()
    else:
        assert found == right or (isinstance(found, set) and found < right), case
        return bool(found != right)
    assert refusal in (grpc.StatusCode.DATA_LOSS, grpc.StatusCode.NOT_FOUND), case
    return True


def test_a_lost_turn_is_told_by_its_number(serving: Callable[..., Any], data: Path) -> None:
    sessions = SessionCaller(serving().channel)
    session = sessions.create().session_id
    sessions.talk(session, sessions.acquire(session).epoch, 0, "a", "b", "c")
    with closing(sqlite3.connect(data / "metadata.db", isolation_level=None)) as database:
        database.execute("DELETE FROM turns WHERE number = 2")
    with pytest.raises(grpc.RpcError) as caught:
        sessions.turns(session)
    assert caught.value.code() == grpc.StatusCode.DATA_LOSS
    assert "turn 2" in str(caught.value.details())
    assert [each.number for each in sessions.turns(session, after=2)] == [3]


def test_a_refused_forgetting_leaves_the_window(serving: Callable[..., Any], data: Path) -> None:
    """Damage a branch that the session was rewound from, which only the deletion of the session reads."""
    sessions = SessionCaller(serving().channel)
    session = sessions.create().session_id
    epoch = sessions.acquire(session).epoch
    branch = sessions.talk(session, epoch, 0, "a").stretches[-1].branch
    sessions.rewind(session, epoch, 0)
    sessions.keep(session, epoch, 0, b"w" * 100)
    with closing(sqlite3.connect(data / "metadata.db", isolation_level=None)) as database:
        database.execute("UPDATE branches SET cut_turn = 7 WHERE branch = ?", (branch,))
    with pytest.raises(grpc.RpcError) as caught:
        sessions.forget(session)
    assert caught.value.code() == grpc.StatusCode.DATA_LOSS
    assert sessions.window(session) == (0, "s", b"w" * 100)


# Kills


@pytest.mark.parametrize("lives", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_what_was_appended_outlives_a_kill(data: Path, connect: Callable[..., Any], lives: int) -> None:
    """Kill the server at any moment of appends: what was acknowledged is there, nothing is half, no epoch comes
    twice."""
    choose, session, known, epochs = random.Random(5), "", list[str](), list[int]()
    with ServiceHost() as host:
        for _ in range(lives):
            service = host.start(data)
            with connect(service.address) as caller:
                sessions = SessionCaller(caller.channel)
                session = session or sessions.create().session_id
                found = sessions.texts(session)
                assert found[: len(known)] == known
                assert len(found) - len(known) in (0, 2)  # the call that was not answered is there whole, or not at all
                known = found
                epochs.append(sessions.acquire(session, "worker").epoch)
                soon = threading.Timer(
                    choose.random() * 0.2, signal.pidfd_send_signal, (service._ended, signal.SIGKILL)
                )
                soon.start()
                code = append_until_refused(sessions, session, epochs[-1], known)
                assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
                soon.join()
                service.wait()
    assert epochs == sorted(set(epochs))
    assert len(known) > lives


def append_until_refused(sessions: SessionCaller, session: str, epoch: int, known: list[str]) -> grpc.StatusCode:
    """Append turns, two at a time, and note them; return the code of the call that was refused."""
    while True:
        name = f"{epoch}-{len(known)}"
        try:
            sessions.append(session, epoch, len(known), turn(name), turn(f"{name} b"))
        except grpc.RpcError as error:
            return error.code()
        known += [name, f"{name} b"]


def test_files_of_windows_are_the_owners_and_those_that_nobody_knows_go_at_the_start(
    serving: Callable[..., Any], data: Path
) -> None:
    sessions, windows = SessionCaller(serving().channel), data / "windows"
    session = sessions.create().session_id
    epoch = sessions.acquire(session).epoch
    sessions.talk(session, epoch, 0, "a")
    sessions.keep(session, epoch, 1, b"x" * 50)
    (file,) = windows.iterdir()
    assert file.stat().st_mode & 0o077 == 0
    assert windows.stat().st_mode & 0o077 == 0
    serving.stop()  # type: ignore[attr-defined]
    (windows / "half").write_bytes(b"x")
    sessions = SessionCaller(serving().channel)
    wait_until(lambda: list(windows.iterdir()) == [file])
    assert sessions.window(session) == (1, "s", b"x" * 50)
