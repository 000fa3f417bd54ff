"""Turns are forgotten under a worker: here, elsewhere while it has the session, and in no file that it keeps."""

import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import kvbank
from memory_service.api.embedded import LocalServer
from model_worker.model import MemoryModel
from model_worker.session.session import Session
from model_worker.session.unanswered import unanswered_folder

from .conversing import CHUNK, WINDOW, WORDS, check_bank, own_chunks, say, texts
from .test_chat_cli import kvbank_command

SECRET = "it lies under 48213-xyzzy"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forgetting") / "data"


@pytest.fixture(scope="module")
def own_address(data: Path) -> Iterator[str]:
    with LocalServer(data) as server:
        yield server.address


@pytest.fixture(scope="module")
def model(model_folder: Path, own_address: str) -> Iterator[MemoryModel]:
    options = {"bank": (), "chunk": CHUNK, "window": WINDOW}
    with MemoryModel.from_pretrained(str(model_folder), memory=own_address, **options) as made:
        yield made


@pytest.fixture
def session(model: MemoryModel) -> Iterator[Session]:
    with Session.open(model, name=f"session-{uuid.uuid4().hex[:8]}") as made:
        yield made


def files_with(needle: bytes, *folders: Path) -> list[Path]:
    found = []
    for path in (path for folder in folders for path in folder.rglob("*")):
        with suppress(OSError):  # a folder, a socket, or a window that the next one has replaced
            found += [path] if needle in path.read_bytes() else []
    return found


def needles(turn: kvbank.Turn) -> list[bytes]:
    """Return the bytes of a turn's token ids, and of what was said in it."""
    return [np.asarray(turn.token_ids[4:20], "<u4").tobytes(), b"48213-xyzzy"]


def test_a_turn_is_forgotten_and_what_is_behind_it_made_again(session: Session, data: Path) -> None:
    say(session, WORDS[0], SECRET, *WORDS[:3], max_new_tokens=4)
    gone = session.turns[1]
    behind = {chunk.chunk_id for chunk in own_chunks(session) if chunk.start >= gone.start}
    assert all(files_with(needle, data) for needle in needles(gone))
    receipt = session.forget(2)
    assert (receipt.turns, receipt.tokens) == (1, gone.token_count)
    assert {chunk.chunk_id for chunk in receipt.chunks} == behind
    assert 0 < receipt.chunks_to_make_again < len(behind)
    assert [files_with(needle, data, unanswered_folder()) for needle in needles(gone)] == [[], []]
    check_bank(session, ahead=True)
    assert texts(session) == [WORDS[0], *WORDS[:3]]
    say(session, WORDS[3], max_new_tokens=4)
    check_bank(session, ahead=True)


def test_a_worker_goes_on_without_what_was_forgotten_elsewhere(session: Session, data: Path) -> None:
    say(session, WORDS[0], SECRET, *WORDS[:3], max_new_tokens=4)
    client, bank, gone = session.record.client, session.info.bank, session.turns[1]
    end = gone.start + gone.token_count
    late = next(chunk for chunk in own_chunks(session) if chunk.start >= end)
    (stored,) = client.fetch(bank, [late.chunk_id], reader_digest=session.info.reader_digest)
    client.sessions.forget(session.info.session_id, first=2)
    assert [chunk for chunk in own_chunks(session) if chunk.start >= gone.start] == []
    # As a worker does that is in the middle of a turn: this chunk had attended to what was forgotten.
    new = kvbank.NewChunk(
        embedding=np.zeros(client.get_bank(bank).embedding.dimension, np.float32) + 1,
        tensors=stored.tensors,
        start=late.start,
        original_length=late.original_length,
        token_ids=late.token_ids,
        text=late.text,
        metadata=late.metadata,
        producer=late.producer,
    )
    written = client.write(bank, new, reader_digest=session.info.reader_digest, embedder_digest=digest(client, bank))
    say(session, "and now?", max_new_tokens=4)
    assert session.turns[1].status == "forgotten"
    assert written.chunk_id not in {chunk.chunk_id for chunk in own_chunks(session)}
    check_bank(session, ahead=True)
    assert [files_with(needle, data) for needle in needles(gone)] == [[], []]


def digest(client: kvbank.Client, bank: str) -> str:
    return client.get_bank(bank).embedding.embedder_digest


def test_a_chat_forgets_a_turn_by_its_number(own_address: str, model_folder: Path, data: Path, sea: str) -> None:
    chat = ["chat", "--memory", own_address, "--model", model_folder, "--session", sea, "--max-new-tokens", 3]
    done = kvbank_command(*chat, stdin=f"one\n{SECRET}\ntwo\n/forget 2\n/turns\nthree\n")
    assert "forgotten: 1 turn, " in done.stderr, done.stderr
    assert "     2  (forgotten)" in done.stdout
    state = Path(os.environ["XDG_STATE_HOME"])
    assert files_with(b"48213-xyzzy", data, state) == []
