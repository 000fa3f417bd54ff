"""A session recalls from banks besides its own: in one ranking, of its own model only, as long as they are there."""

import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvbank
from memory_service.api.embedded import LocalServer
from model_worker.errors import BankMismatch
from model_worker.model import MemoryModel
from model_worker.session.session import Session
from tests.support import command
from tests.support.synced import wait_until_synced

from .conversing import CHUNK, WINDOW, say

FACT = "Nine cranes in Velm."
TALK = ["the sea is wide and the ships come and go", "it is far from here", "who are nine cranes in Velm?"]


@pytest.fixture(scope="module")
def model(model_folder: Path, address: str) -> Iterator[MemoryModel]:
    options: dict[str, Any] = {"chunk": CHUNK, "window": WINDOW, "patience": 60.0}  # for a machine that is busy
    with MemoryModel.from_pretrained(str(model_folder), memory=address, bank=(), **options) as model:
        yield model


@pytest.fixture
def library(model: MemoryModel) -> str:
    """Return the name of a bank in which the model has read a fact."""
    name = f"library-{uuid.uuid4().hex[:8]}"
    model.read(FACT, memory=model.with_bank(name), source="velm.txt")
    return name


def talk(session: Session) -> kvbank.AnswerTrace:
    """Hold a conversation, and return what its last answer was recalled from."""
    trace = say(session, *TALK, max_new_tokens=4)[-1].trace
    assert trace is not None
    return trace


def banks_of(trace: kvbank.AnswerTrace) -> set[str]:
    return {chunk.bank for chunk in trace.chunks}


def test_a_fact_of_another_bank_is_recalled_in_one_ranking(model: MemoryModel, library: str, sea: str) -> None:
    options: dict[str, Any] = {"why": 1, "top_k": 3, "min_share": 0.0}
    with Session.open(model, name=sea, reads=[library], **options) as session:
        trace = talk(session)
        assert banks_of(trace) == {library, session.info.bank}
        assert len(trace.chunks) == 3
        best = max(trace.chunks, key=lambda chunk: chunk.score or 0)
        assert model.client.get_chunk(best.bank, best.chunk_id).metadata["source"] == "velm.txt"
    model.client.sessions.fork(session.info.session_id, name=f"{sea}-fork", turn=2)
    with Session.open(model, name=f"{sea}-fork", **{**options, "top_k": 1}) as session:
        [turn] = say(session, TALK[-1], max_new_tokens=4)
        assert turn.trace is not None
        assert banks_of(turn.trace) == {library}  # it reads what the other one read
    with Session.open(model, name=sea, **{**options, "min_share": 1.0}) as session:
        [turn] = say(session, "and in Velm, of nine cranes?", max_new_tokens=4)
        assert turn.trace is not None
        assert len(turn.trace.chunks) == 1  # a share of the best score counts over all banks
    with Session.open(model, name=sea, reads=[]) as session:
        assert session.info.reads == session.memory.memory.others.names == ()


@pytest.mark.parametrize(
    ("kv", "embedder", "said"),
    [
        (None, "", "holds vectors only"),
        ("other", "", "was written by another model"),
        ("own", "ee" * 16, "is searched by another embedder"),
        ("none", "", "no bank"),
    ],
)
def test_a_bank_that_cannot_be_read_is_refused_by_name(
    model: MemoryModel, sea: str, kv: str | None, embedder: str, said: str
) -> None:
    name, own = f"odd-{uuid.uuid4().hex[:8]}", model.attachment.reader.digest
    if kv != "none":
        plan = model.attachment
        digest = own if kv == "own" else "ab" * 32
        spec = kvbank.KVSpec(digest, plan.plan.memory_layers, plan.kv_heads, plan.head_dim, "fp32")
        made = kvbank.EmbeddingSpec(embedder or "cd" * 16, 8)
        model.client.create_bank(name, kv=None if kv is None else spec, embedding=made)
    with pytest.raises((BankMismatch, kvbank.BankNotFound), match=f"{name}.*{said}|{said}.*{name}"):
        Session.open(model, name=sea, reads=[name])
    with pytest.raises(kvbank.SessionNotFound):
        model.client.sessions.get(name=sea)


def test_a_bank_that_goes_away_is_one_line_and_the_conversation_goes_on(
    model: MemoryModel, library: str, sea: str
) -> None:
    with Session.open(model, name=sea, reads=[library], why=1) as session:
        talk(session)
        model.client.delete_bank(library)
        with pytest.warns(RuntimeWarning, match=f"{library}.* is not read any more") as told:
            [turn] = say(session, "and in Velm?", max_new_tokens=4)
        assert len(told) == 1
        assert turn.trace is not None
        assert banks_of(turn.trace) == {session.info.bank}
    with pytest.warns(RuntimeWarning, match=f"{library}.* is not read"):
        session = Session.open(model, name=sea, why=1)
    with session, warnings.catch_warnings(action="error"):
        say(session, "ahoy", max_new_tokens=1)


def test_a_bank_with_a_damaged_chunk_is_read_again(model: MemoryModel, tmp_path: Path) -> None:
    with LocalServer(tmp_path) as server, kvbank.connect(server.address) as client:
        for source in ("velm.txt", "copy.txt"):
            model.read(FACT, memory=model.with_bank("library", client=client), source=source)
        wait_until_synced(tmp_path)
        for file in sorted(tmp_path.glob("payloads/*/*/*.safetensors"))[-1:]:
            file.write_bytes(file.read_bytes()[:-1] + b"x")
        options: dict[str, Any] = {"reads": ["library"], "top_k": 4, "min_share": 0.0, "why": 1}
        with Session.open(model, name="sea", client=client, **options) as session:
            with pytest.warns(RuntimeWarning, match="nothing was recalled from bank 'library'"):
                say(session, FACT, max_new_tokens=1)
            [turn] = say(session, FACT, max_new_tokens=1)
            assert turn.trace is not None
            assert "library" in banks_of(turn.trace)


def test_with_original_positions_other_texts_stand_before_the_conversation(
    model_folder: Path, address: str, library: str, sea: str
) -> None:
    options: dict[str, Any] = {"chunk": CHUNK, "window": WINDOW, "attach_options": {"positions": "original"}}
    with (
        MemoryModel.from_pretrained(str(model_folder), memory=address, bank=(), **options) as original,
        Session.open(original, name=sea, reads=[library], top_k=1, min_share=0.0, why=1) as session,
    ):
        assert banks_of(talk(session)) == {library}
        blocks = session.window.cache.recalled.blocks.values()
        assert [int(block.offsets.max()) for block in blocks] == [-1] * len(blocks)


def test_the_commands(model_folder: Path, address: str, model: MemoryModel, library: str, sea: str) -> None:
    def run(*words: object, stdin: str = "") -> command.Ended:
        return command.run(command.application(), *words, "--memory", address, stdin=stdin)

    chat = ("chat", "-s", sea, "--model", model_folder, "--max-new-tokens", 2)
    said = run(*chat, "--embed", "lexical", "--reads", library, stdin="ahoy\n")
    assert (said.exit_code, f"reads {library}" in said.stderr) == (0, True), said
    assert run("session", "reads", sea).stdout == f"session {sea} reads {library}\n"
    assert f"reads      {library}\n" in run("session", "show", sea).stdout
    assert run("session", "reads", sea, "--none").stdout == f"session {sea} reads no bank besides its own\n"
    assert run("session", "reads", sea, "nobody's").exit_code == 1
    assert model.client.sessions.get(name=sea).reads == ()
    missing = run(*chat, "--reads", "nobody's", stdin="ahoy\n")
    assert (missing.exit_code, missing.stderr.count("\n")) == (1, 1)
