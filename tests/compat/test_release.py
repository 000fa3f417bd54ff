"""Folders that a release has written are opened, and answer as the release did, to the bit. `make.py` made them."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

import kvbank
from memory_service.api.embedded import LocalServer
from memory_service.care.check import check
from model_worker.model import MemoryModel
from model_worker.session.session import Session
from tests.compat import answers

# Python 3.11.2, which Debian 12 has, knows no filter, and later ones warn without one.
_FILTER: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
RELEASES = sorted(path.parent for path in Path(__file__).parent.glob("*/release.tar.gz"))


@pytest.fixture(params=RELEASES, ids=lambda path: path.name)
def release(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Unpack the folders that a release has left, and upgrade the schema of the data folder, as `--migrate` does."""
    with tarfile.open(request.param / "release.tar.gz") as archive:
        archive.extractall(tmp_path, **_FILTER)
    LocalServer(tmp_path / "data", migrate=True).stop()
    return tmp_path


@pytest.fixture
def expected(request: pytest.FixtureRequest, release: Path) -> dict[str, Any]:
    folder = Path(__file__).parent / request.node.callspec.id
    return json.loads((folder / "expected.json").read_text())


def test_a_store_answers_as_the_release_did(release: Path, expected: dict[str, Any]) -> None:
    with kvbank.connect(release / "data") as client:
        assert json.loads(json.dumps(answers.of_store(client))) == expected["store"]
    assert check(release / "data").problems == []


def test_a_store_goes_on(release: Path, expected: dict[str, Any]) -> None:
    """Keys are remembered, ids are new, and what was to go next goes."""
    kept = expected["store"]["chunks"]["kv"]
    with kvbank.connect(release / "data") as client:
        old = client.fetch("kv", [kept[0]["chunk_id"]], reader_digest=answers.READER)[0]
        new = kvbank.NewChunk(answers.vector(1), old.tensors, start=7, original_length=old.original_length)
        written = [client.write("kv", new, **answers.DIGESTS) for _ in range(2)]
        assert [each.replayed for each in written] == [False, True]
        assert written[0].chunk_id > max(chunk["chunk_id"] for chunk in kept)
        evicted, ids = [], [written[0].chunk_id]
        while not evicted:
            more = kvbank.NewChunk(answers.vector(len(ids)), old.tensors, original_length=old.original_length)
            result = client.write("kv", more, **answers.DIGESTS)
            evicted += result.evicted
            ids.append(result.chunk_id)
        assert not {chunk["chunk_id"] for chunk in kept if chunk["pinned"]} & set(evicted)
        assert set(ids) <= {chunk.chunk_id for chunk in client.list_chunks("kv")}


def test_a_session_is_taken_over_and_goes_on(release: Path, expected: dict[str, Any]) -> None:
    """Turns are those of the release, to the token; the window and the chunks are made again from them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            kvbank.connect(release / "data") as client,
            MemoryModel.from_pretrained(str(release / "model"), memory=client, bank=(), chunk=8, window=24) as model,
        ):
            if (release / "sessions").exists():  # a session was a folder of its own once
                client.sessions.import_(release / "sessions" / "old")
            with Session.open(model, name="old", create=False) as session:
                assert [said(turn) for turn in session.turns] == expected["turns"]
                assert session.left > 0
                chunks = client.list_chunks(session.info.bank)
                assert sum(len(chunk.token_ids) for chunk in chunks) == session.left
                turn, words = session.say(expected["next"]["text"], max_new_tokens=6), expected["next"]["ids"]
                new = session.turns[len(expected["turns"]) :]  # a message longer than the window is cut elsewhere now
                prompt = [token for part in new for token in part.token_ids[: part.prompt_tokens]]
                own = len(words) - 6
                assert (prompt[-own:], turn) == (words[:own], new[-1])
                assert turn.prompt_tokens < len(turn.token_ids) <= turn.prompt_tokens + 6
    finally:
        torch.set_num_threads(threads)


def said(turn: kvbank.Turn) -> dict[str, Any]:
    return {"text": turn.text("user"), "answer": turn.text("assistant"), "ids": list(turn.token_ids)}
