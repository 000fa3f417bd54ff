"""A session keeps the chunks that left its window last, over a restart too, and asks its memory for what was said."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_service.api.embedded import LocalServer
from model_worker.model import MemoryModel
from model_worker.session.log import SessionLog
from model_worker.session.session import Session
from model_worker.window.chunking import chunks, sentence_ends
from tests.support.noting_embedder import NotingEmbedder

CHUNK, WINDOW, RECENT = 16, 48, 3
WORDS = ["the sea is wide", "ships come and go", "what did I say of the sea?", "and who sails the ships?"]


@pytest.fixture(scope="module")
def model(model_folder: Path, address: str) -> Iterator[MemoryModel]:
    with MemoryModel.from_pretrained(
        str(model_folder), memory=address, bank=(), chunk=CHUNK, window=WINDOW, recent=RECENT, top_k=1
    ) as model:
        yield model


@contextmanager
def opened(model: MemoryModel, sessions: Path, name: str = "one", **options: Any) -> Iterator[Session]:
    with Session.open(model, SessionLog.open(sessions, name), name="tiny", target="here", **options) as session:
        yield session


def say(session: Session, *texts: str) -> list[str]:
    return [session.say(text, max_new_tokens=12).answer for text in texts]


def last_starts(session: Session, count: int) -> list[int]:
    """Return the offsets of the last chunks that left the window, which end where turns and sentences do."""
    said = [token for turn in session.log.turns for token in turn.ids][: session.left + 1]
    ends = sentence_ends(session.model.tokenizer)
    turns = list(accumulate(len(turn.ids) for turn in session.log.turns))
    lengths = [len(piece) for piece in chunks(said, CHUNK, ends, turns)]
    starts = [sum(lengths[:at]) for at in range(len(lengths) + 1)]
    return [start for start in starts if start < session.left][-count:]


def same(one: Session, keys: list[torch.Tensor], passages: list[object]) -> bool:
    [row] = one.window.cache.recents
    return passages == [chunk.passage for chunk in row] and all(
        torch.equal(chunk.layers[0][0], key) for chunk, key in zip(row, keys, strict=True)
    )


@pytest.mark.parametrize("restart", ["file", "log"])
def test_the_same_chunks_are_recent_after_a_restart(model: MemoryModel, tmp_path: Path, restart: str) -> None:
    with opened(model, tmp_path, "whole") as session:
        whole = say(session, *WORDS)
    with opened(model, tmp_path) as session:
        before = say(session, *WORDS[:3])
        [row] = session.window.cache.recents
        assert [chunk.start for chunk in row] == last_starts(session, 3)
        keys, passages = [chunk.layers[0][0] for chunk in row], [chunk.passage for chunk in row]
    if restart == "log":
        (tmp_path / "one" / "window.safetensors").unlink()
    with opened(model, tmp_path) as session:
        assert same(session, keys, passages)
        if restart == "file":  # the window's own K-V, made again from the log, lack what stood before them
            assert before + say(session, WORDS[3]) == whole


def test_a_setting_that_grew_finds_older_chunks_in_the_bank(model: MemoryModel, tmp_path: Path) -> None:
    with opened(model, tmp_path, recent=1) as session:
        say(session, *WORDS)
        assert len(session.window.cache.recents[0]) == 1
        three = last_starts(session, 3)
    with opened(model, tmp_path, recent=3) as session:
        assert [chunk.start for chunk in session.window.cache.recents[0]] == three
    with opened(model, tmp_path, recent=2) as session:
        assert [chunk.start for chunk in session.window.cache.recents[0]] == three[1:]


def test_chunks_that_wait_for_the_service_are_recent_too(model_folder: Path, tmp_path: Path) -> None:
    """Windows that are made again from the log find them in the spool."""
    server = LocalServer(tmp_path / "data")
    with (
        MemoryModel.from_pretrained(
            str(model_folder),
            memory=server.address,
            bank=(),
            chunk=CHUNK,
            window=WINDOW,
            recent=RECENT,
            patience=1.0,
            retry_after=1000.0,
        ) as model,
        opened(model, tmp_path) as session,
    ):
        say(session, *WORDS[:1])
        server.stop()
        with pytest.warns(RuntimeWarning, match="away"):
            say(session, *WORDS[1:3])
        [row] = session.window.cache.recents
        starts = [chunk.start for chunk in row]
        assert starts == last_starts(session, 3)
        session.log.window.unlink()
        session.window.forget()
        with pytest.warns(RuntimeWarning, match="away"):
            again = [chunk.start for chunk in session.window.cache.recents[0]]
        assert again == starts


@pytest.mark.parametrize("message", ["who sails?", "tell me of the ships that came over the wide sea from the south"])
def test_what_the_user_says_is_the_query(model_folder: Path, address: str, tmp_path: Path, message: str) -> None:
    """Ask for the message as it stands, in one piece or several, without the words of the format."""
    embedder = NotingEmbedder()
    with (
        MemoryModel.from_pretrained(
            str(model_folder), memory=address, bank=(), chunk=CHUNK, window=WINDOW, embedder=embedder, query_tokens=80
        ) as model,
        opened(model, tmp_path) as session,
    ):
        say(session, *WORDS[:2])
        embedder.noted.clear()
        session.say(message, max_new_tokens=1)
        chunks = {chunk.text for chunk in model.client.list_chunks(session.header.bank)}
        queries = [text for text in embedder.noted if text not in chunks]
        assert set(queries) == {message}


def test_the_end_of_a_message_longer_than_the_window_is_the_query(
    model_folder: Path, address: str, tmp_path: Path
) -> None:
    embedder = NotingEmbedder()
    with (
        MemoryModel.from_pretrained(
            str(model_folder), memory=address, bank=(), chunk=CHUNK, window=WINDOW, embedder=embedder, query_tokens=20
        ) as model,
        opened(model, tmp_path) as session,
    ):
        message = "a tale of many ships, and of a sea that is wider than all the lands; and who sails the ships?"
        session.say(message, max_new_tokens=1)
        chunks = {chunk.text for chunk in model.client.list_chunks(session.header.bank)}
        assert {text for text in embedder.noted if text not in chunks} == {message[-20:]}
