"""The protocol `SessionRecords`, called directly: what is dear to try at the wire, and random histories."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from memory_service.domain import sessions as rules
from memory_service.domain.sessions import MOST_STRETCHES, Item, Session, Turn
from memory_service.storage.base import Engine, SessionRecords
from tests.support.store import reason

Open = Callable[..., AbstractContextManager[Engine]]
TENANT = "default"


def new_session(name: str = "") -> Session:
    session_id = rules.new_session_id()
    return Session(session_id, name, rules.own_bank(session_id))


def new_turn(text: str, key: str = "") -> Turn:
    return Turn("completed", (Item("i", "user", text),), b"\x01\0\0\0" * 2, key=key, token_count=2)


def texts(engine: Engine, session_id: str) -> list[str]:
    with engine.sessions.read() as view:
        session = view.session(TENANT, session_id)
        return [turn.items[0].text for turn in view.turns(session, 0, token_ids=True)]


def rewound(sessions: SessionRecords, stretches: int) -> tuple[str, int]:
    """Make a session of so many stretches; return its id and the epoch of its lease."""
    session_id = sessions.create(new_session()).session_id
    epoch = sessions.acquire(TENANT, session_id, "w", rules.LEASE_US).epoch
    for number in range(stretches):
        sessions.append(TENANT, session_id, epoch, number, [new_turn(str(number)), new_turn("dropped")])
        if number < stretches - 1:
            assert sessions.rewind(TENANT, session_id, epoch, number + 1).head == number + 1
    return session_id, epoch


def test_a_session_that_was_rewound_again_and_again_is_one_line(engine: Engine) -> None:
    sessions, stretches = engine.sessions, 40
    session_id, _ = rewound(sessions, stretches)
    with sessions.read() as view:
        whole = view.session(TENANT, session_id)
    assert [each.last for each in whole.stretches] == [*range(1, stretches), stretches + 1]
    assert texts(engine, session_id) == [*map(str, range(stretches)), "dropped"]
    fork = sessions.fork(TENANT, new_session(), session_id, stretches // 2)
    assert [each.last for each in fork.stretches] == [*range(1, stretches // 2 + 1), stretches // 2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_session_has_only_so_many_stretches_as_a_filter_names(engine: Engine) -> None:
    sessions = engine.sessions
    session_id, epoch = rewound(sessions, MOST_STRETCHES)
    assert reason(lambda: sessions.rewind(TENANT, session_id, epoch, MOST_STRETCHES)) == "INVALID_FIELD"
    assert reason(lambda: sessions.fork(TENANT, new_session(), session_id, None)) == "INVALID_FIELD"
    assert texts(engine, session_id) == [*map(str, range(MOST_STRETCHES)), "dropped"]
    assert len(sessions.fork(TENANT, new_session(), session_id, MOST_STRETCHES - 1).stretches) == MOST_STRETCHES
