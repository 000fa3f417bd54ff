"""A session goes into one file and comes out of it again, here or elsewhere."""

import asyncio
import itertools
import json
import stat
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kvbank
from kvbank.files import session_log
from tests.sdk.host import Host
from tests.sdk.test_sessions import said, talk


@pytest.fixture
def talked(client: kvbank.Client) -> kvbank.Session:
    """Give a session of five turns, whose third one has all that a turn can have."""
    return talk(client, 5, name=uuid.uuid4().hex, settings={"model": "small"}, metadata={"who": "ann"})


def as_said(turns: Iterator[kvbank.Turn]) -> list[kvbank.Turn]:
    """Return turns without what differs between a session and its copy."""
    plain = {"key": "", "session_id": "", "create_time": None}
    return [
        replace(turn, **plain, metadata={key: text for key, text in turn.metadata.items() if key != "created"})
        for turn in turns
    ]


def test_a_session_is_the_same_in_another_place(
    client: kvbank.Client, host: Host, talked: kvbank.Session, tmp_path: Path
) -> None:
    file, seen = tmp_path / "a.kvsession", []
    exported = client.sessions.export(talked.session_id, file, progress=lambda *done: seen.append(done))
    assert (exported, seen) == (talked, [(at, 5) for at in range(1, 6)])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.kvsession"]
    before = list(client.sessions.turns(talked.session_id, token_ids=True))
    for other, name in ((host.client, None), (client, "copy-" + talked.name)):
        copy = other.sessions.import_(file, name=name)
        assert (copy.name, copy.head, copy.tokens) == (name or talked.name, 5, 15)
        assert (copy.settings, copy.metadata, copy.lease) == (talked.settings, talked.metadata, None)
        assert copy.session_id != talked.session_id
        assert copy.bank != talked.bank
        after = list(other.sessions.turns(copy.session_id, token_ids=True))
        assert as_said(iter(after)) == as_said(iter(before))
        assert before[0].create_time is not None
        assert after[0].metadata["created"] == before[0].create_time.isoformat(timespec="seconds")
    with pytest.raises(kvbank.SessionExists, match="another name"):
        client.sessions.import_(file)


def test_a_file_that_is_there_is_replaced_only_on_request(
    client: kvbank.Client, talked: kvbank.Session, tmp_path: Path
) -> None:
    file = tmp_path / "a"
    file.write_text("mine")
    with pytest.raises(kvbank.InvalidArgument, match="is there already"):
        client.sessions.export(talked.session_id, file)
    assert file.read_text() == "mine"
    client.sessions.export(talked.session_id, file, overwrite=True)
    for wrong in (tmp_path / "no" / "file", tmp_path):
        with pytest.raises(kvbank.InvalidArgument) as refused:
            client.sessions.export(talked.session_id, wrong, overwrite=True)
        assert refused.value.metadata["field"] == "path"
    with pytest.raises(kvbank.SessionNotFound):
        client.sessions.export("0" * 32, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["a"]


def test_what_happens_during_an_export(client: kvbank.Client, talked: kvbank.Session, tmp_path: Path) -> None:
    """Leave out a turn that comes meanwhile, and refuse a session that is rewound meanwhile."""
    sessions, lease = client.sessions, client.sessions.acquire(talked.session_id, "test").lease
    assert lease is not None
    more = itertools.count(6)

    def appended(*_: int) -> None:
        number = next(more)
        sessions.append(talked.session_id, [said(number)], epoch=lease.epoch, follows=number - 1)

    assert sessions.export(talked.session_id, tmp_path / "a", progress=appended).head == 5
    assert sessions.get(talked.session_id).head == 10
    copy = sessions.import_(tmp_path / "a", name="")
    assert (copy.name, copy.head) == ("", 5)
    rewinds = iter([lambda: sessions.rewind(talked.session_id, 2, epoch=lease.epoch)])
    with pytest.raises(kvbank.TurnConflict, match="rewound"):
        sessions.export(talked.session_id, tmp_path / "b", progress=lambda *_: next(rewinds, lambda: None)())
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a"]


def damaged(lines: list[bytes]) -> Iterator[tuple[list[bytes], str]]:
    """Yield lines of a file with some damage, and what is said of it."""
    flipped = lines[3].replace(b"question", b"questiom")
    yield [*lines[:3], flipped, *lines[4:]], "line 4 is damaged"
    yield [*lines[:2], lines[3], lines[2], *lines[4:]], "line 3 is damaged"
    yield [*lines[:2], *lines[3:]], "line 3 is damaged"
    yield lines[:-1], "ends after 4 of 5 turns"
    yield [*lines[:-1], lines[-1][:-10]], "line 6 is damaged"
    yield [*lines, lines[-1]], "line 7 is damaged"
    yield [lines[0].replace(b"ann", b"bob"), *lines[1:]], "no file of a session"
    yield [], "no file of a session"
    yield [b"hello\n"], "no file of a session"


def test_a_damaged_file_is_refused_before_anything_is_made(
    client: kvbank.Client, talked: kvbank.Session, tmp_path: Path
) -> None:
    client.sessions.export(talked.session_id, tmp_path / "a")
    lines = (tmp_path / "a").read_bytes().splitlines(keepends=True)
    name = uuid.uuid4().hex
    for changed, text in damaged(lines):
        (tmp_path / "b").write_bytes(b"".join(changed))
        with pytest.raises((kvbank.DataLoss, kvbank.InvalidArgument), match=text):
            client.sessions.import_(tmp_path / "b", name=name)
    with pytest.raises(kvbank.SessionNotFound):
        client.sessions.get(name=name)


def test_a_line_that_is_whole_and_makes_no_sense_is_refused(client: kvbank.Client, tmp_path: Path) -> None:
    from kvbank.files import checked_lines

    head = {"kind": "kvbank-session", "format": 1, "name": "", "reads": [], "reader_digest": "", "settings": {}}
    head |= {"metadata": {}, "head": 1}
    turn = {"kind": "turn", "items": [], "token_ids": [1], "create_time": None}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({**head, "format": 2}, turn, "another version"),
        ({key: value for key, value in head.items() if key != "reads"}, turn, "line 1 has no reads"),
        (head, {"kind": "turn"}, "line 2 has no turn"),
        (head, {**turn, "mood": "good"}, "line 2 has no turn"),
        (head, {**turn, "token_ids": ["a"]}, "line 2 has no turn"),
        (head, {**turn, "create_time": "yesterday"}, "line 2 has no turn"),
        ({**head, "kind": "session", "format": 2}, turn, "other fields"),
    ]
    for first, second, text in cases:
        lines = [checked_lines.written(record, number) for number, record in enumerate((first, second))]
        (tmp_path / "a").write_bytes(b"".join(lines))
        with pytest.raises(kvbank.InvalidArgument, match=text):
            client.sessions.import_(tmp_path / "a")


@pytest.fixture(scope="module")
def big(client: kvbank.Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the file of a session of so many turns that an import appends them in three calls."""
    session, file = talk(client, 250), tmp_path_factory.mktemp("big") / "file"
    client.sessions.export(session.session_id, file)
    return file


@pytest.mark.parametrize("calls", [1, 3])
def test_an_import_that_ended_early_goes_on(client: kvbank.Client, big: Path, calls: int) -> None:
    name, parts = uuid.uuid4().hex, itertools.count(1)

    def leave(*_: int) -> None:
        if next(parts) == calls:
            raise KeyboardInterrupt

    sessions = client.sessions
    with pytest.raises(KeyboardInterrupt):
        sessions.import_(big, name=name, progress=leave)
    begun = sessions.get(name=name)
    assert begun.head == min(100 * calls, 250)
    seen: list[int] = []
    copy = sessions.import_(big, name=name, progress=lambda done, _: seen.append(done))
    assert (copy.session_id, copy.head, copy.settings) == (begun.session_id, 250, {})
    assert seen == [at for at in (100, 200, 250) if at > begun.head]
    assert [turn.number for turn in sessions.turns(copy.session_id)] == list(range(1, 251))


def test_an_import_does_not_go_on_with_other_turns(client: kvbank.Client, big: Path) -> None:
    name, sessions = uuid.uuid4().hex, client.sessions

    def leave(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sessions.import_(big, name=name, progress=leave)
    begun = sessions.get(name=name)
    assert begun.lease is not None
    with pytest.raises(kvbank.LeaseHeld):
        sessions.acquire(begun.session_id, "other")
    sessions.append(begun.session_id, [said(1)], epoch=begun.lease.epoch, follows=100)
    with pytest.raises(kvbank.FailedPrecondition, match="other turns than the file"):
        sessions.import_(big, name=name)


def test_the_asyncio_client_moves_sessions_too(address: str, talked: kvbank.Session, tmp_path: Path) -> None:
    async def moved() -> kvbank.Session:
        async with kvbank.connect_async(address) as client:
            await client.sessions.export(talked.session_id, tmp_path / "a")
            return await client.sessions.import_(tmp_path / "a", name=uuid.uuid4().hex)

    copy = asyncio.run(moved())
    assert (copy.head, copy.tokens, copy.metadata) == (5, 15, {"who": "ann"})


def old_folder(tmp_path: Path) -> Path:
    """Return the folder of a chat session of an earlier version, whose second turn is a part of a long message."""
    header = session_log.Header("ab" * 16, "sea", "small", "cd" * 32, "session-sea-abababab", 32, "", "2026-01-02", 4)
    time = "2026-01-02T03:04:05+00:00"
    turns = [
        session_log.Turn("ahoy", "land", [1, 2, 3], 2, 0, time),
        session_log.Turn("", "", [4, 5], 2, 3, time, part=True),
        session_log.Turn("where?", "there", [6], 1, 5, time),
    ]
    lines = [session_log.first_line(header), *(session_log.turn_line(turn, at) for at, turn in enumerate(turns, 1))]
    folder = tmp_path / "sea"
    folder.mkdir()
    (folder / "log.jsonl").write_bytes(b"".join(lines))
    return folder


def test_the_folder_of_an_earlier_version_becomes_a_session(client: kvbank.Client, tmp_path: Path) -> None:
    folder = old_folder(tmp_path)
    for path in (folder, folder / "log.jsonl"):
        name = uuid.uuid4().hex
        session = client.sessions.import_(path, name=name)
        assert (session.head, session.tokens, session.reader_digest) == (3, 6, "cd" * 32)
        assert session.settings == {"model": "small", "chunk": "32", "sinks": "4"}
        assert session.bank == f"session-{session.session_id[:16]}"
        first, part, last = client.sessions.turns(session.session_id, token_ids=True)
        assert first.items == (kvbank.Item("user", "ahoy"), kvbank.Item("assistant", "land"))
        assert (first.token_ids, first.prompt_tokens, first.metadata) == (
            (1, 2, 3),
            2,
            {"created": "2026-01-02T03:04:05+00:00"},
        )
        assert (part.status, part.items, part.kept) == ("part", (), 3)
        assert (last.text("user"), last.start) == ("where?", 5)
    log = folder / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-5])  # as a crash leaves it: the last turn was not acknowledged
    assert client.sessions.import_(folder, name=uuid.uuid4().hex).head == 2
    log.write_bytes(whole.replace(b"ahoy", b"ahoi"))
    with pytest.raises(kvbank.DataLoss, match="line 2 is damaged"):
        client.sessions.import_(folder, name=uuid.uuid4().hex)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(kvbank.InvalidArgument, match="cannot be read"):
        client.sessions.import_(empty)


def test_a_file_says_what_it_is(client: kvbank.Client, talked: kvbank.Session, tmp_path: Path) -> None:
    """Read it without kvbank: each line is JSON."""
    client.sessions.export(talked.session_id, tmp_path / "a")
    head, *turns = map(json.loads, (tmp_path / "a").read_text().splitlines())
    assert (head["kind"], head["session_id"], head["head"]) == ("kvbank-session", talked.session_id, 5)
    assert [turn["items"][0]["text"] for turn in turns] == [f"question {at}" for at in range(1, 6)]
    assert turns[0]["token_ids"] == [1, 2, 3]
