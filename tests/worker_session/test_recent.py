"""A session keeps the chunks that left its window last, over a restart too, and asks its memory for what was said."""

import uuid
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from model_worker.model import MemoryModel
from model_worker.session.session import Session
from model_worker.window.chunking import chunks, sentence_ends
from tests.support.diagonal import rotated
from tests.support.noting_embedder import NotingEmbedder

CHUNK, WINDOW, RECENT = 16, 48, 3
WORDS = ["the sea is wide", "ships come and go", "what did I say of the sea?", "and who sails the ships?"]


@pytest.fixture(scope="module")
def model(model_folder: Path, address: str) -> Iterator[MemoryModel]:
    with MemoryModel.from_pretrained(
        str(model_folder), memory=address, bank=(), chunk=CHUNK, window=WINDOW, recent=RECENT, top_k=1
    ) as model:
        yield model


@pytest.fixture
def name() -> str:
    return f"recent-{uuid.uuid4().hex[:8]}"


def opened(model: MemoryModel, name: str, **options: Any) -> Session:
    return Session.open(model, name=name, **options)


def say(session: Session, *texts: str) -> list[str]:
    return [session.say(text, max_new_tokens=12).text("assistant") for text in texts]


def last_starts(session: Session, count: int) -> list[int]:
    """Return the offsets of the last chunks that left the window, which end where turns and sentences do."""
    said = [token for turn in session.turns for token in turn.token_ids][: session.left + 1]
    ends = sentence_ends(session.model.tokenizer)
    turns = list(accumulate(turn.token_count for turn in session.turns))
    lengths = [len(piece) for piece in chunks(said, CHUNK, ends, turns)]
    starts = [sum(lengths[:at]) for at in range(len(lengths) + 1)]
    return [start for start in starts if start < session.left][-count:]


def same(one: Session, keys: list[torch.Tensor], passages: list[object]) -> bool:
    [row] = one.window.cache.recents
    return passages == [chunk.passage for chunk in row] and all(
        torch.equal(chunk.layers[0][0], key) for chunk, key in zip(row, keys, strict=True)
    )


@pytest.mark.parametrize("restart", [pytest.param("window", marks=pytest.mark.slow), "turns"])
def test_the_same_chunks_are_recent_after_a_restart(
    model: MemoryModel, name: str, monkeypatch: pytest.MonkeyPatch, restart: str
) -> None:
    with opened(model, f"{name}-whole") as session:
        whole = say(session, *WORDS)
    with opened(model, name) as session:
        if restart == "turns":
            monkeypatch.setattr(session.window, "keep", lambda: None)
        before = say(session, *WORDS[:3])
        [row] = session.window.cache.recents
        assert [chunk.start for chunk in row] == last_starts(session, 3)
        keys, passages = [chunk.layers[0][0] for chunk in row], [chunk.passage for chunk in row]
    with opened(model, name) as session:
        assert same(session, keys, passages)
        if restart == "window":  # the window's own K-V, made again from the turns, lack what stood before them
            assert before + say(session, WORDS[3]) == whole


def test_a_setting_that_grew_finds_older_chunks_in_the_bank(model: MemoryModel, name: str) -> None:
    with opened(model, name, recent=1) as session:
        say(session, *WORDS)
        assert len(session.window.cache.recents[0]) == 1
        three = last_starts(session, 3)
    with opened(model, name, recent=3) as session:
        assert [chunk.start for chunk in session.window.cache.recents[0]] == three
    with opened(model, name, recent=2) as session:
        assert [chunk.start for chunk in session.window.cache.recents[0]] == three[1:]


def test_recent_chunks_are_those_of_the_session_alone(model: MemoryModel, name: str) -> None:
    """Forks share the bank, and their chunks may begin at the same offsets."""
    with opened(model, name) as session:
        say(session, *WORDS[:2])
        session.fork(f"{name}-fork")
        say(session, *WORDS[2:])
        with opened(model, f"{name}-fork") as other:
            say(other, "another sea, and another ship that came over it")
        session.window.make(session.turns[-1].kept, session.turns[-1].kept)
        assert [chunk.start for chunk in session.window.cache.recents[0]] == last_starts(session, 3)
        own = {token for turn in session.turns for token in turn.token_ids}
        assert {token for chunk in session.window.cache.recents[0] for token in chunk.token_ids} <= own


@pytest.mark.parametrize(
    "message", rotated(["who sails?", "tell me of the ships that came over the wide sea from the south"], 1, every=2)
)
def test_what_the_user_says_is_the_query(model_folder: Path, address: str, name: str, message: str) -> None:
    """Ask for the message as it stands, in one piece or several, without the words of the format."""
    embedder = NotingEmbedder()
    with (
        MemoryModel.from_pretrained(
            str(model_folder), memory=address, bank=(), chunk=CHUNK, window=WINDOW, embedder=embedder, query_tokens=80
        ) as model,
        opened(model, name) as session,
    ):
        say(session, *WORDS[:2])
        embedder.noted.clear()
        session.say(message, max_new_tokens=1)
        chunks = {chunk.text for chunk in model.client.list_chunks(session.info.bank)}
        queries = [text for text in embedder.noted if text not in chunks]
        assert set(queries) == {message}


def test_the_end_of_a_message_longer_than_the_window_is_the_query(model_folder: Path, address: str, name: str) -> None:
    embedder = NotingEmbedder()
    with (
        MemoryModel.from_pretrained(
            str(model_folder), memory=address, bank=(), chunk=CHUNK, window=WINDOW, embedder=embedder, query_tokens=20
        ) as model,
        opened(model, name) as session,
    ):
        message = "a tale of many ships, and of a sea that is wider than all the lands; and who sails the ships?"
        session.say(message, max_new_tokens=1)
        chunks = {chunk.text for chunk in model.client.list_chunks(session.info.bank)}
        assert {text for text in embedder.noted if text not in chunks} == {message[-20:]}
