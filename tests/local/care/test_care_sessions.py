"""What care says and keeps of sessions."""

import shutil

import pytest

from tests.local.care.folders import answer, clean, execute, run
from tests.support.sessions import SessionCaller, turn


@pytest.fixture
def talked(serving, data):
    """Serve a folder with a session, its fork and a window, and stop; give what a worker would read of both."""
    sessions = SessionCaller(serving().channel)
    session = sessions.create(name="a").session_id
    epoch = sessions.acquire(session).epoch
    sessions.append(session, epoch, 0, turn("a", key="ka"), turn("b", key="kb"))
    sessions.keep(session, epoch, 2, b"w" * 100)
    fork = sessions.fork(session, turn=1, name="b").session_id
    sessions.talk(fork, sessions.acquire(fork).epoch, 1, "x")
    read = {each: sessions.turns(each, token_ids=True) for each in (session, fork)}
    serving.stop()
    return read


def test_sessions_outlive_a_backup_without_their_windows(talked, serving, data, tmp_path):
    assert clean(data)["turns"] == 3
    run("backup", data, tmp_path / "backup")
    assert clean(tmp_path / "backup")["sessions"] == 2
    shutil.rmtree(data)
    run("restore", tmp_path / "backup", data)
    assert clean(data)["turns"] == 3
    sessions = SessionCaller(serving().channel)
    assert {each: sessions.turns(each, token_ids=True) for each in talked} == talked
    assert [sessions.window(each) for each in talked] == [None, None]


DAMAGE = {
    "a session": ("UPDATE sessions SET head = head + 1 WHERE name = 'a'", "session"),
    "a branch": ("UPDATE branches SET cut_tokens = 2 WHERE parent IS NOT NULL", "session"),
    "a lost branch": ("DELETE FROM branches WHERE parent IS NULL", "session"),
    "a lost session": ("DELETE FROM sessions WHERE name = 'b'", "session"),
    "a turn": ("UPDATE turns SET content = replace(content, 'b', 'c') WHERE key = 'kb'", "turn"),
    "a lost turn": ("DELETE FROM turns WHERE key = 'ka'", "session"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_left(talked, data, name):
    statement, kind = DAMAGE[name]
    execute(data, statement)
    found = answer("check", data, code=1)
    assert kind in {problem["kind"] for problem in found["problems"]}
    assert {problem["kind"] for problem in found["problems"]} <= {"session", "turn", "usage"}
    left = {problem["kind"] for problem in answer("repair", data, code=1)["left"]}
    assert kind in left


def test_token_ids_are_looked_at_unless_it_is_fast(talked, data):
    execute(data, "UPDATE turns SET token_ids = zeroblob(12) WHERE key = 'ka'")
    problem, *_ = answer("check", data, code=1)["problems"]
    assert (problem["kind"], "turn 1" in problem["detail"]) == ("turn", True)
    assert answer("check", data, "--fast")["problems"] == []


def test_counts_and_rows_of_windows_are_mended(talked, serving, data):
    execute(data, "UPDATE branches SET bytes = bytes + 1", "UPDATE windows SET session_id = 'none'")
    found = answer("check", data, code=1)["problems"]
    assert {problem["kind"] for problem in found} == {"usage", "orphan_row"}
    run("repair", data)
    clean(data)
    sessions = SessionCaller(serving().channel)
    assert {each: sessions.turns(each, token_ids=True) for each in talked} == talked
