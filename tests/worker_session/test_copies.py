"""A session's bank has one history: a copy of its folder is refused once another copy was talked to."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from model_worker.errors import SessionError
from model_worker.model import MemoryModel
from model_worker.session.epoch import KEY
from model_worker.session.folder import read_session
from model_worker.session.log import SessionLog, fork
from model_worker.session.session import Session

from .test_chat_cli import kvbank_command
from .test_session import WORDS, check_bank, ids

CHUNK, WINDOW = 16, 48


@pytest.fixture(scope="module")
def model(model_folder: Path, address: str) -> Iterator[MemoryModel]:
    with MemoryModel.from_pretrained(str(model_folder), memory=address, bank=(), chunk=CHUNK, window=WINDOW) as model:
        yield model


@contextmanager
def opened(model: MemoryModel, sessions: Path, name: str = "one") -> Iterator[Session]:
    with Session.open(model, SessionLog.open(sessions, name), name="tiny", target="here") as session:
        yield session


def say(session: Session, *texts: str) -> None:
    for text in texts:
        session.say(text, max_new_tokens=12)


@pytest.fixture
def copies(model: MemoryModel, tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with the same session, on two machines as far as the bank can tell."""
    with opened(model, tmp_path / "a") as session:
        say(session, *WORDS[:2])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def test_a_copy_is_refused_once_another_was_talked_to(model: MemoryModel, copies: tuple[Path, Path]) -> None:
    """Whichever is opened first has the bank, and may go on as often as it likes."""
    here, there = copies
    for _ in range(2):
        with opened(model, there) as session:
            say(session, *WORDS)
            check_bank(session)
    before = read_session(here, "one")
    for _ in range(2):
        with pytest.raises(SessionError, match=r"no longer that of this copy.*kvbank session fork one NEW_NAME"):
            Session.open(model, SessionLog.open(here, "one"))
    assert read_session(here, "one") == before
    with opened(model, there) as session:
        check_bank(session)


def test_a_session_that_is_open_meanwhile_says_nothing_more(model: MemoryModel, copies: tuple[Path, Path]) -> None:
    here, there = copies
    with opened(model, here) as mine:
        shutil.rmtree(there)
        shutil.copytree(here, there)
        with opened(model, there) as other:
            say(other, *WORDS)
            turns = len(mine.log.turns)
            with pytest.raises(SessionError, match="no longer that of this copy"):
                say(mine, WORDS[3])
            assert len(mine.log.turns) == turns
            check_bank(other)


def test_a_copy_of_an_open_session_is_old_after_the_next_turn(model: MemoryModel, copies: tuple[Path, Path]) -> None:
    here, there = copies
    with opened(model, here) as mine:
        shutil.rmtree(there)
        shutil.copytree(here, there)
        say(mine, WORDS[2])
        with pytest.raises(SessionError, match="no longer that of this copy"):
            Session.open(model, SessionLog.open(there, "one"))
        say(mine, WORDS[3])
        check_bank(mine)


def test_the_way_out_is_a_fork_with_a_bank_of_its_own(model: MemoryModel, copies: tuple[Path, Path]) -> None:
    here, there = copies
    with opened(model, there) as session:
        say(session, "another history", *WORDS)
    header, turns = read_session(here, "one")
    made = fork(here, "one", "two")
    assert (made.bank, made.uid) != (header.bank, header.uid)
    assert read_session(here, "two") == (made, turns)
    with opened(model, here, "two") as session:
        assert ids(session.log.turns) == ids(turns)
        check_bank(session)
        say(session, *WORDS)
        check_bank(session)
        assert session.left > CHUNK
    with pytest.raises(SessionError, match="there is a session 'two' already"):
        fork(here, "one", "two")
    with pytest.raises(SessionError, match="no session 'nobody'"):
        fork(here, "nobody", "three")
    assert sorted(path.name for path in here.iterdir()) == ["one", "two"]


class Crash(BaseException):
    """An exception that stands for SIGKILL."""


@pytest.mark.parametrize("behind", [False, True])
def test_a_crash_between_the_two_writes_locks_nobody_out(
    model: MemoryModel, copies: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, behind: bool
) -> None:
    """Killed after the file was written, before or behind the bank's; several times."""
    here, there = copies
    update = model.client.update_bank

    def crash(*args: Any, **options: Any) -> None:
        if behind:
            update(*args, **options)
        raise Crash

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(model.client, "update_bank", crash)
            with pytest.raises(Crash):
                Session.open(model, SessionLog.open(here, "one"))
    with opened(model, here) as session:
        say(session, *WORDS)
        check_bank(session)
    with pytest.raises(SessionError, match="no longer that"):
        Session.open(model, SessionLog.open(there, "one"))


def test_a_session_of_an_older_version_goes_on(model: MemoryModel, copies: tuple[Path, Path]) -> None:
    """Sessions of that version have no epoch, and neither have their banks; nor has a bank whose metadata were
    replaced."""
    here, _ = copies
    (here / "one" / "epoch").unlink()
    model.client.update_bank(read_session(here, "one")[0].bank, metadata={"mine": "yes"})
    with opened(model, here) as session:
        say(session, *WORDS)
        check_bank(session)
        assert model.client.get_bank(session.header.bank).metadata["mine"] == "yes"
        model.client.update_bank(session.header.bank, metadata={})
        say(session, WORDS[0])
    (here / "one" / "epoch").write_text("{")
    with pytest.raises(SessionError, match="kvbank session fork"):
        Session.open(model, SessionLog.open(here, "one"))
    model.client.update_bank(session.header.bank, metadata={})
    with opened(model, here) as session:
        check_bank(session)
        assert KEY in model.client.get_bank(session.header.bank).metadata


def test_the_bank_of_another_copy_is_not_deleted(model: MemoryModel, copies: tuple[Path, Path], address: str) -> None:
    here, there = copies
    with opened(model, there) as session:
        say(session, *WORDS)
    remove = ["session", "rm", "one", "--sessions", here, "--yes", "--memory", address]
    refused = kvbank_command(*remove)
    assert refused.exit_code == 1
    assert "nothing was deleted" in refused.stderr
    assert "another copy of the session" in refused.stderr
    assert kvbank_command(*remove, "--force").exit_code == 0
    assert list(here.iterdir()) == []
    with opened(model, there) as session:
        check_bank(session)
    assert kvbank_command("session", "rm", "one", "--sessions", there, "--yes", "--memory", address).exit_code == 0


def test_the_command_forks(copies: tuple[Path, Path]) -> None:
    here, _ = copies
    done = kvbank_command("session", "fork", "one", "two", "--sessions", here)
    assert (done.exit_code, done.stdout) == (
        0,
        f"session two goes on from one; its bank is {read_session(here, 'two')[0].bank}\n",
    )
    assert kvbank_command("session", "fork", "one", "a/b", "--sessions", here).exit_code == 1


# -- paths -------------------------------------------------------------------------------------------------------------


def test_a_session_stays_where_it_was_opened(
    model: MemoryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log, window, spool and epoch stay when the process goes to another folder that has the same names."""
    for name in ("here", "there"):
        (tmp_path / name / "sessions" / "one" / "spool").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with opened(model, Path("sessions")) as session:
        say(session, *WORDS)
        monkeypatch.chdir(tmp_path / "there")
        say(session, *WORDS)
        session.memory.memory.link.pause_for(float("inf"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            say(session, *WORDS)
        assert len(session.memory.memory.spool) > 0
    assert {path.name for path in (tmp_path / "here/sessions/one").iterdir()} == {
        "log.jsonl",
        "window.safetensors",
        "spool",
        "epoch",
    }
    assert list((tmp_path / "there/sessions/one").rglob("*")) == [tmp_path / "there/sessions/one/spool"]
    assert len(read_session(tmp_path / "here/sessions", "one")[1]) == 12
    with opened(model, tmp_path / "here/sessions") as session:
        check_bank(session)
