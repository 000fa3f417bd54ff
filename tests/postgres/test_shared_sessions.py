"""Two services on one database: who has a session, what a stale lease writes, and what is forgotten in both."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import xxhash

from memory_service.api.embedded import LocalServer
from memory_service.domain import sessions as rules
from memory_service.domain.access import EVERY_BANK, ApiKey
from memory_service.domain.errors import ServiceError
from memory_service.domain.limits import IndexLimits, Limits, Pauses
from memory_service.domain.sessions import Item, Session, Turn, Window
from memory_service.domain.tenants import DEFAULT_TENANT, TenantQuota
from memory_service.storage.base import Engine
from memory_service.storage.postgres.purged import Note
from memory_service.storage.postgres.rows.purge_rows import Purge
from tests.support.caller import Caller
from tests.support.clocks import SECOND, Hands
from tests.support.engines import ENGINES, opened
from tests.support.forgettable import Talk, found_in
from tests.support.kept_windows import KeptWindows
from tests.support.sessions import SessionCaller
from tests.support.store import fill, new_bank, reason
from tests.support.waiting import wait_until

TENANT = DEFAULT_TENANT
LEASE = 30 * SECOND


@pytest.fixture
def hands() -> Hands:
    return Hands()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Mapping[str, Any]]:
    """Give the place of a store in a database."""
    kind = ENGINES["postgres"]
    if why := kind.missing():
        pytest.skip(why)
    with kind.place(tmp_path) as found:
        yield found


@pytest.fixture
def services(place: Mapping[str, Any], tmp_path: Path, hands: Hands) -> Iterator[list[Engine]]:
    """Open two engines on one database, with caches of their own."""
    with ExitStack() as stack:
        limits = Limits(expiry_s=0.05)
        yield [
            stack.enter_context(opened({**place, "cache": str(tmp_path / name)}, clock=hands.clock(), limits=limits))
            for name in ("a", "b")
        ]


def new_session(**fields: Any) -> Session:
    session_id = rules.new_session_id()
    return Session(session_id, bank=rules.own_bank(session_id), **{"name": "", **fields})


def new_turn(text: str, key: str = "") -> Turn:
    return Turn("completed", (Item("i", "user", text),), b"\x01\0\0\0" * 2, key=key, token_count=2)


def texts(engine: Engine, session_id: str, tenant: str = TENANT) -> list[str]:
    with engine.sessions.read() as view:
        session = view.session(tenant, session_id)
        return [turn.items[0].text for turn in view.turns(session, 0, token_ids=True)]


def outcomes(calls: Sequence[Callable[[], object]]) -> list[str]:
    """Make calls at once, and return the reason of the refusal of each, "" for none."""
    begin = threading.Barrier(len(calls))

    def made(call: Callable[[], object]) -> str:
        begin.wait()
        try:
            call()
        except ServiceError as refusal:
            return refusal.reason
        return ""

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(made, calls))


def test_a_session_has_one_holder_in_all_services(services: list[Engine]) -> None:
    one, other = (engine.sessions for engine in services)
    session_id = one.create(new_session()).session_id
    asked = [
        lambda at=at, name=name: at.acquire(TENANT, session_id, name, LEASE)  # type: ignore[misc]
        for name, at in (("a", one), ("b", other), ("c", one), ("d", other))
    ]
    assert sorted(outcomes(asked)) == ["", "LEASE_HELD", "LEASE_HELD", "LEASE_HELD"]
    with other.read() as view:
        lease = view.session(TENANT, session_id).lease
    assert lease is not None
    assert lease.epoch == 1


def test_what_a_stale_lease_would_append_is_refused(services: list[Engine], hands: Hands) -> None:
    one, other = (engine.sessions for engine in services)
    session_id = one.create(new_session()).session_id
    stale = one.acquire(TENANT, session_id, "a", LEASE).epoch
    one.append(TENANT, session_id, stale, 0, [new_turn("first", "k")])
    assert reason(lambda: other.acquire(TENANT, session_id, "b", LEASE)) == "LEASE_HELD"
    hands.go_on(LEASE)
    epoch = other.acquire(TENANT, session_id, "b", LEASE).epoch
    assert epoch == stale + 1
    for call in (
        lambda: one.append(TENANT, session_id, stale, 1, [new_turn("stale")]),
        lambda: one.renew(TENANT, session_id, stale, None),
        lambda: one.rewind(TENANT, session_id, stale, 0),
        lambda: services[0].windows.begin(TENANT, Window(session_id, 1, "s", 1, 0), stale),
    ):
        assert reason(call) == "LEASE_LOST"
    other.append(TENANT, session_id, epoch, 1, [new_turn("second")])
    assert texts(services[0], session_id) == ["first", "second"]
    # Of one epoch too, one of two turns for the same place comes in; repeated by another service it is the same turn.
    asked = [lambda at=at: at.append(TENANT, session_id, epoch, 2, [new_turn("third")]) for at in (one, other)]  # type: ignore[misc]
    assert sorted(outcomes(asked)) == ["", "TURN_CONFLICT"]
    (again,), session = one.append(TENANT, session_id, epoch, 0, [new_turn("first", "k")])
    assert (again.number, session.head) == (1, 3)


def test_a_window_is_read_by_the_next_service(services: list[Engine]) -> None:
    data = b"window" * 1000
    session_id = services[0].sessions.create(new_session()).session_id
    epoch = services[0].sessions.acquire(TENANT, session_id, "a", LEASE).epoch
    for engine, text in ((services[0], data), (services[1], data[::-1])):
        window = Window(session_id, 0, "a\0b", len(text), xxhash.xxh3_64_intdigest(text))
        new = engine.windows.begin(TENANT, window, epoch)
        new.add(text[:7]), new.add(text[7:])
        new.keep()
        new.close()
        for reader in services:
            found = reader.windows.open(TENANT, session_id)
            assert found is not None
            assert found[0] == window
            room = memoryview(bytearray(len(text)))
            assert found[1].read_at(room, 0) == len(text)
            assert bytes(room) == text
            found[1].close()


def test_sessions_of_a_tenant_stay_within_its_quota_in_all_services(services: list[Engine]) -> None:
    one, other = services
    one.access.add_tenant("red", TenantQuota())
    session = new_session(tenant="red")
    one.sessions.create(session)
    epoch = one.sessions.acquire("red", session.session_id, "w", LEASE).epoch
    one.sessions.append("red", session.session_id, epoch, 0, [new_turn("x")])
    size = other.access.tenant_usage("red").bytes
    other.access.set_tenant_quota("red", TenantQuota(bytes=4 * size))
    second = other.sessions.create(new_session(tenant="red"))
    second_epoch = other.sessions.acquire("red", second.session_id, "w", LEASE).epoch

    def append(engine: Engine, session_id: str, epoch: int, first: int) -> None:
        for follows in range(first, 9):
            engine.sessions.append("red", session_id, epoch, follows, [new_turn("x")])

    asked = [
        partial(append, one, session.session_id, epoch, 1),
        partial(append, other, second.session_id, second_epoch, 0),
    ]
    assert outcomes(asked) == ["QUOTA_EXCEEDED", "QUOTA_EXCEEDED"]
    assert one.access.tenant_usage("red").bytes == 4 * size


def test_of_the_keys_of_two_tenants_that_go_at_once_one_stays(services: list[Engine]) -> None:
    for number in range(4):
        names = (f"red{number}", f"blue{number}")
        for name in names:
            services[0].access.add_tenant(name, TenantQuota())
            services[0].access.add_key(ApiKey(name, name, "write", b"\x01" * 32, EVERY_BANK, created=number + 1))
        asked = [
            lambda at=at, name=name: at.access.drop_tenant(name)  # type: ignore[misc]
            for at, name in zip(services, names, strict=True)
        ]
        assert outcomes(asked) == ["", ""]
        assert services[1].access.has_keys()


def test_what_one_service_has_begun_to_forget_another_one_finishes(place: Mapping[str, Any], tmp_path: Path) -> None:

    def fail() -> None:
        raise OSError("the service is gone")

    with ExitStack() as stack:
        one, other = (
            stack.enter_context(opened({**place, "cache": str(tmp_path / name)}, pauses=pauses))
            for name, pauses in (("a", Pauses(at={"forgetting begun": fail})), ("b", Pauses()))
        )
        session_id = one.sessions.create(new_session()).session_id
        epoch = one.sessions.acquire(TENANT, session_id, "w", LEASE).epoch
        one.sessions.append(TENANT, session_id, epoch, 0, [new_turn("first", "k"), new_turn("second")])
        with pytest.raises(OSError, match="gone"):
            one.forgetting.session(TENANT, session_id, "")
        assert reason(lambda: other.sessions.acquire(TENANT, session_id, "b", LEASE)) == "SESSION_NOT_FOUND"
        assert other.sessions.totals().bytes > 0
        receipt = other.forgetting.session(TENANT, session_id, "")
        assert (receipt.turns, receipt.tokens, receipt.places["sessions"]) == (2, 4, 1)
        assert other.sessions.totals().bytes == 0


def test_windows_and_damaged_chunks_of_a_tenant_go_with_it(services: list[Engine], place: Mapping[str, Any]) -> None:
    one, other = services
    one.access.add_tenant("red", TenantQuota())
    session_id = one.sessions.create(new_session(tenant="red")).session_id
    epoch = one.sessions.acquire("red", session_id, "w", LEASE).epoch
    new = one.windows.begin("red", Window(session_id, 0, "s", 4, xxhash.xxh3_64_intdigest(b"data")), epoch)
    new.add(b"data")
    new.keep()
    new.close()
    assert len(KeptWindows(place).names()) == 1
    bank, _ = one.store.create_bank(new_bank(tenant="red"))
    ids = fill(one.store, bank, range(3))
    one.store.set_aside(bank, {ids[0]: "damaged"})
    places = other.forgetting.tenant("red", "").places
    assert (places["windows"], places["quarantine"], places["rows"]) == (1, 1, 2)
    assert KeptWindows(place).names() == []


def test_what_is_forgotten_goes_from_the_disks_of_all_services(place: Mapping[str, Any], tmp_path: Path) -> None:
    limits = Limits(step_rows=3, expiry_s=0.5, index=IndexLimits(tail_rows=4, small_rows=2, segment_rows=64))
    caches = [tmp_path / name for name in ("one", "other")]
    with ExitStack() as stack:
        one, other = (
            Caller(stack.enter_context(LocalServer(**{**place, "cache": str(cache)}, limits=limits)).address)
            for cache in caches
        )
        talk = Talk.begun(one, 1, 6)
        for caller in (one, other):
            caller.retrieve(talk.secrets[0].vector, banks=[talk.bank], top_k=5)
        wait_until(lambda: all(list(cache.rglob("*.segment")) for cache in caches))
        for cache in caches:
            assert {where.split()[0] for where in found_in(cache, talk.secrets)} >= {"k", "half"}
        receipt = talk.sessions.forget_turns(talk.session_id, 1, 6)
        assert [found_in(cache, talk.secrets) for cache in caches] == [[], []]
        assert "VACUUM FULL" in receipt.remains
        assert [turn.items for turn in SessionCaller(other.channel).turns(talk.session_id)] == [[]] * 6
        assert other.ids(talk.bank) == []
        for caller in (one, other):
            caller.channel.close()


def test_what_was_forgotten_while_a_service_was_down_is_not_on_its_disk_when_it_serves(
    place: Mapping[str, Any], tmp_path: Path
) -> None:
    limits = Limits(expiry_s=3600, index=IndexLimits(tail_rows=4, small_rows=2, segment_rows=64))
    here, away = ({**place, "cache": str(tmp_path / name)} for name in ("here", "away"))
    with LocalServer(**here, limits=limits) as one:
        caller = Caller(one.address)
        talk, kept = Talk.begun(caller, 1, 6), Talk.begun(caller, 101, 6)
        with LocalServer(**away, limits=limits) as other:
            for each in (talk, kept):
                Caller(other.address).retrieve(each.secrets[0].vector, banks=[each.bank], top_k=5)
            wait_until(lambda: len({path.parent for path in tmp_path.rglob("away/**/*.segment")}) == 2)
        talk.sessions.forget_turns(talk.session_id, 1, 6)
        assert {where.split()[0] for where in found_in(tmp_path / "away", talk.secrets)} >= {"k", "half"}
        with opened(away, limits=limits):
            assert found_in(tmp_path / "away", talk.secrets) == []
            assert {where.split()[0] for where in found_in(tmp_path / "away", kept.secrets)} >= {"k", "half"}
        [note] = tmp_path.rglob("away/**/purged.json")
        note.write_text(json.dumps(json.loads(note.read_bytes()) | {"seen": 1}))  # away for longer than purges are kept
        with opened(away, limits=limits):
            assert found_in(tmp_path / "away", kept.secrets) == []
        caller.channel.close()


def test_a_note_of_purges_is_believed_while_the_database_has_all_that_came_after_it() -> None:
    day, now = 24 * 3600 * SECOND, 100 * 24 * 3600 * SECOND
    purge = Purge(7, 1, "uid", now - 40 * day)
    assert Note(7, purge.time, now - day).holds(purge, now)
    assert Note(7, purge.time, now - day).holds(None, now)  # it is so old that it is kept no longer
    assert not Note(7, purge.time, now - 30 * day).holds(purge, now)
    assert not Note(7, now - day, now - day).holds(None, now)  # the database was put back to before it
    assert not Note(7, now - day, now - day).holds(purge, now)  # and has given its number again
    assert Note(0, 0, now - day).holds(None, now)
