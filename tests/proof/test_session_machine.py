"""Random histories of sessions against an oracle of plain lists: turns, forks, rewinds, leases, deletions, restarts."""

import tempfile
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from memory_service.domain import sessions as rules
from memory_service.domain.errors import ServiceError
from memory_service.domain.sessions import Item, Session, Turn
from memory_service.storage.base import Engine
from tests.support.clocks import SECOND, Hands
from tests.support.engines import opened
from tests.support.store import reason

TENANT = "default"
FORGOTTEN = Turn("forgotten", (), b"")
WHICH, PLACES = st.integers(0, 100), st.integers(0, 12)
HOLDERS = st.sampled_from(["w1", "w2"])


@dataclass
class Known:
    """What the oracle knows of a session: the keys of its turns, and of all turns that it was ever appended to behind.
    lease: holder and end."""

    line: list[str]
    kept: set[str]
    epoch: int = 0
    lease: tuple[str, int] | None = None
    ttl: int = rules.LEASE_US


@dataclass
class Said:
    """A turn as it was appended: the keys up to and with it, and its tokens."""

    line: list[str]
    tokens: int
    given: Turn = field(repr=False)


def _is_known(key: str) -> bool:
    """Tell whether a turn has the key that it was appended with, and is not forgotten."""
    return not key.startswith("gone ")


def _without(line: Iterable[str], gone: Mapping[str, str]) -> list[str]:
    """Return keys of turns, with others for those that were forgotten."""
    return [gone.get(key, key) for key in line]


class SessionMachine(RuleBasedStateMachine):
    """Does what comes to one engine, and compares what the engine says with the oracle."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(prefix="kvbank-proof-")
        self._hands = Hands()
        self._known: dict[str, Known] = {}
        self._said: dict[str, Said] = {}
        self._open()

    def _open(self) -> None:
        place = Path(self._folder.name, "data")
        self._opened: AbstractContextManager[Engine] = opened({"data": place}, clock=self._hands.clock(), min_free=0)
        self._engine = self._opened.__enter__()

    def teardown(self) -> None:
        self._opened.__exit__(None, None, None)
        self._folder.cleanup()

    @property
    def _now(self) -> int:
        return self._engine.store.clock.now_us()

    def _some(self, which: int) -> tuple[str, Known]:
        names = list(self._known)
        name = names[which % len(names)]
        return name, self._known[name]

    def _leased(self, known: Known) -> bool:
        return known.lease is not None and self._now < known.lease[1]

    def _new(self) -> Session:
        session_id = rules.new_session_id()
        return Session(session_id, "", rules.own_bank(session_id))

    def _look(self, session_id: str) -> None:
        """Compare a session with what is known of it."""
        known = self._known[session_id]
        with self._engine.sessions.read() as view:
            session = view.session(TENANT, session_id)
            turns = list(view.turns(session, 0, token_ids=True))
        keys = ["gone" if turn.status == "forgotten" else turn.key for turn in turns]
        assert keys == [key.split()[0] for key in known.line]
        starts = [sum(self._said[key].tokens for key in known.line[:at]) for at in range(len(turns) + 1)]
        assert [turn.start for turn in turns] == starts[:-1]
        assert (session.head, session.tokens, session.epoch) == (len(turns), starts[-1], known.epoch)
        given = [self._said[key].given for key in known.line]
        assert [(turn.items, turn.token_ids) for turn in turns] == [(turn.items, turn.token_ids) for turn in given]
        lease = rules.current_lease(session, self._now)
        assert (lease and (lease.holder, lease.expires)) == (known.lease if self._leased(known) else None)

    # Sessions

    @rule()
    def create(self) -> None:
        if len(self._known) < 8:
            made = self._engine.sessions.create(self._new())
            self._known[made.session_id] = Known([], set())

    @precondition(lambda self: self._known)
    @rule(which=WHICH, at=PLACES, head=st.booleans())
    def fork(self, which: int, at: int, head: bool) -> None:
        name, known = self._some(which)
        new = self._new()
        if not head and at > len(known.line):
            assert reason(lambda: self._engine.sessions.fork(TENANT, new, name, at)) == "TURN_NOT_FOUND"
            return
        self._engine.sessions.fork(TENANT, new, name, None if head else at)
        line = known.line if head else known.line[:at]
        self._known[new.session_id] = Known(list(line), set(line))
        self._look(new.session_id)

    @precondition(lambda self: self._said)
    @rule(which=WHICH)
    def fork_at_a_key(self, which: int) -> None:
        keys, new = list(filter(_is_known, self._said)), self._new()
        if not keys:
            return
        key = keys[which % len(keys)]
        if not any(key in known.kept for known in self._known.values()):
            assert reason(lambda: self._engine.sessions.fork_at(TENANT, new, key)) == "TURN_NOT_FOUND"
            return
        self._engine.sessions.fork_at(TENANT, new, key)
        line = self._said[key].line
        self._known[new.session_id] = Known(list(line), set(line))
        self._look(new.session_id)

    @precondition(lambda self: self._known)
    @rule(which=WHICH)
    def delete(self, which: int) -> None:
        name, _ = self._some(which)
        self._engine.forgetting.session(TENANT, name, "")
        del self._known[name]
        self._everything()

    @precondition(lambda self: self._known)
    @rule(which=WHICH, first=PLACES, more=st.integers(0, 2))
    def forget(self, which: int, first: int, more: int) -> None:
        name, known = self._some(which)
        ask = lambda: self._engine.forgetting.turns(TENANT, name, first, first + more, "")  # noqa: E731
        if not 1 <= first <= first + more <= len(known.line):
            assert reason(ask) == "TURN_NOT_FOUND"
            return
        asked = known.line[first - 1 : first + more]
        gone = {key: f"gone {key}" for key in asked if not key.startswith("gone ")}
        ask()
        for other in self._known.values():
            if gone and set(other.line) & set(asked):
                other.epoch, other.lease = other.epoch + 1, None
            other.line, other.kept = _without(other.line, gone), set(_without(other.kept, gone))
        self._said |= {gone[key]: replace(self._said.pop(key), given=FORGOTTEN) for key in gone}
        for said in self._said.values():
            said.line = _without(said.line, gone)
        self._everything()

    @precondition(lambda self: self._known)
    @rule(which=WHICH, at=PLACES, late=st.booleans())
    def rewind(self, which: int, at: int, late: bool) -> None:
        name, known = self._some(which)
        epoch = known.epoch - late
        expected = "TURN_NOT_FOUND" if at > len(known.line) else ""
        if late or not self._leased(known):
            expected = "LEASE_LOST"
        if expected:
            assert reason(lambda: self._engine.sessions.rewind(TENANT, name, epoch, at)) == expected
        else:
            self._engine.sessions.rewind(TENANT, name, epoch, at)
            known.line = known.line[:at]
        self._look(name)

    # Leases

    @precondition(lambda self: self._known)
    @rule(which=WHICH, holder=HOLDERS, ttl=st.sampled_from([1, 10, 100]))
    def acquire(self, which: int, holder: str, ttl: int) -> None:
        name, known = self._some(which)
        if self._leased(known) and known.lease is not None and known.lease[0] != holder:
            assert reason(lambda: self._engine.sessions.acquire(TENANT, name, holder, ttl * SECOND)) == "LEASE_HELD"
            return
        known.epoch += 1
        known.lease, known.ttl = (holder, self._now + ttl * SECOND), ttl * SECOND
        assert self._engine.sessions.acquire(TENANT, name, holder, ttl * SECOND).epoch == known.epoch
        self._look(name)

    @precondition(lambda self: self._known)
    @rule(which=WHICH, late=st.booleans(), release=st.booleans())
    def renew_or_release(self, which: int, late: bool, release: bool) -> None:
        name, known = self._some(which)
        epoch, sessions = known.epoch - late, self._engine.sessions
        if release and not late:
            sessions.release(TENANT, name, epoch)
            known.lease = None
        elif release:
            assert reason(lambda: sessions.release(TENANT, name, epoch)) == "LEASE_LOST"
        elif late or not self._leased(known) or known.lease is None:
            assert reason(lambda: sessions.renew(TENANT, name, epoch, None)) == "LEASE_LOST"
        else:
            sessions.renew(TENANT, name, epoch, None)
            known.lease = (known.lease[0], self._now + known.ttl)
        self._look(name)

    # Turns

    @precondition(lambda self: self._known)
    @rule(which=WHICH, number=st.integers(1, 3), tokens=st.integers(0, 4), off=st.sampled_from([0, 0, 0, 1, -1]))
    def append(self, which: int, number: int, tokens: int, off: int) -> None:
        name, known = self._some(which)
        turns = [self._turn(f"{len(self._said) + place}", tokens) for place in range(number)]
        follows = len(known.line) + off
        if expected := "LEASE_LOST" if not self._leased(known) else "TURN_CONFLICT" if off else "":
            given = (TENANT, name, known.epoch, follows, turns)
            assert reason(lambda: self._engine.sessions.append(*given)) == expected
        else:
            self._engine.sessions.append(TENANT, name, known.epoch, follows, turns)
            for turn in turns:
                known.line = [*known.line, turn.key]
                self._said[turn.key] = Said(known.line, turn.token_count, turn)
            known.kept.update(known.line)
            self._renewed(known)
        self._look(name)

    @precondition(lambda self: self._said)
    @rule(which=WHICH, of=WHICH, changed=st.booleans())
    def append_again(self, which: int, of: int, changed: bool) -> None:
        keys = list(filter(_is_known, self._said))
        if not self._known or not keys:
            return
        name, known = self._some(which)
        key = keys[of % len(keys)]
        said = self._said[key]
        turn = self._turn(key, said.tokens + changed)
        follows = len(said.line) - 1
        there = any(key in other.kept for other in self._known.values())
        if not self._leased(known):
            expected = "LEASE_LOST"
        elif not there:
            return  # the key is free again, and `append` draws new ones
        else:
            expected = "" if not changed and known.line[follows : follows + 1] == [key] else "KEY_REUSED"
        given = (TENANT, name, known.epoch, follows, [turn])
        if expected:
            assert reason(lambda: self._engine.sessions.append(*given)) == expected
        else:
            (found,), _ = self._engine.sessions.append(*given)
            assert (found.key, found.number) == (key, follows + 1)
            self._renewed(known)
        self._look(name)

    def _renewed(self, known: Known) -> None:
        if known.lease is not None:
            known.lease = (known.lease[0], self._now + known.ttl)

    def _turn(self, key: str, tokens: int) -> Turn:
        return Turn("completed", (Item("i", "user", f"of {key}"),), b"\7\0\0\0" * tokens, key=key, token_count=tokens)

    # Time

    @rule(seconds=st.sampled_from([1, 9, 60]))
    def go_on(self, seconds: int) -> None:
        self._hands.go_on(seconds * SECOND)

    @rule()
    def restart(self) -> None:
        self._opened.__exit__(None, None, None)
        self._open()
        self._everything()

    def _everything(self) -> None:
        """Compare all sessions, and all turns by their keys, with the oracle."""
        for name in self._known:
            self._look(name)
        with self._engine.sessions.read() as view:
            listed = {session.session_id for session in view.sessions(TENANT, None, {})}
        assert listed == set(self._known)
        kept = {key for known in self._known.values() for key in known.kept}
        for key in filter(_is_known, self._said):
            assert self._is_there(key) == (key in kept)
        sizes = self._engine.sessions.totals()
        assert sizes.sessions == len(self._known)
        assert (sizes.bytes > 0) == bool(kept)

    def _is_there(self, key: str) -> bool:
        with self._engine.sessions.read() as view:
            try:
                found = view.turn(TENANT, key, token_ids=True)
            except ServiceError as error:
                assert error.reason == "TURN_NOT_FOUND"  # noqa: PT017
                return False
        assert (found.number, found.items) == (len(self._said[key].line), self._said[key].given.items)
        return True


@pytest.mark.parametrize(
    ("examples", "steps"), [(2, 30), pytest.param(100, 80, marks=pytest.mark.slow)], ids=["quick", "long"]
)
def test_sessions_are_what_an_oracle_of_lists_says(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        SessionMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
