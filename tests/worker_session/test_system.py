"""Sinks of a session: its first tokens, and its system prompt whole, stay over a restart."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvbank
from model_worker.errors import InputError, SessionError
from model_worker.model import MemoryModel
from model_worker.session.prompt import prompt_format
from model_worker.session.session import Session
from tests.worker_session.conftest import CHATML, byte_tokenizer

CHUNK, WINDOW = 16, 48
WORDS = ["the sea is wide", "ships come and go", "what did I say of the sea?"]
SYSTEM = "You speak of the sea."


@pytest.fixture(scope="module")
def model(model_folder: Path, address: str) -> Iterator[MemoryModel]:
    with MemoryModel.from_pretrained(str(model_folder), memory=address, bank=(), chunk=CHUNK, window=WINDOW) as model:
        yield model


@pytest.fixture
def name() -> str:
    return f"system-{uuid.uuid4().hex[:8]}"


def opened(model: MemoryModel, name: str, **options: Any) -> Session:
    return Session.open(model, name=name, **options)


def say(session: Session, *texts: str) -> None:
    for text in texts:
        session.say(text, max_new_tokens=12)


def sinks(session: Session) -> dict[str, Tensor]:
    return session.window.cache.sinks.state()


def said(session: Session) -> list[int]:
    return [token for turn in session.turns for token in turn.token_ids]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert len(one) == 2 + 2 * 3
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("system", "local"),
    [
        pytest.param(None, None, marks=pytest.mark.slow),
        pytest.param(SYSTEM, None, marks=pytest.mark.slow),
        (SYSTEM, "tova:m=60"),
    ],
)
def test_sinks_come_back_with_the_window_and_with_the_turns(
    model: MemoryModel, name: str, system: str | None, local: str | None
) -> None:
    """Windows that are made from the turns have the sinks of the session that never ended."""
    with opened(model, name, system=system, local=local) as session:
        say(session, *WORDS)
        count = 4 if system is None else len("<") + len(system) + len("\n")  # one token a byte, and the beginning
        assert session.window.cache.sinks.held.tolist() == [count]
        expected, ids = sinks(session), said(session)
    with opened(model, name, local=local) as session:
        assert all(torch.equal(expected[name], tensor) for name, tensor in sinks(session).items())
    with opened(model, name, local=local) as session:
        session.window.make(session.turns[-1].kept, session.turns[-1].kept)
        same(sinks(session), expected)
        say(session, *WORDS)
        assert said(session)[: len(ids)] == ids


def test_a_session_that_was_begun_without_sinks_has_none(model: MemoryModel, name: str) -> None:
    """Sessions of earlier releases say nothing of sinks, and go on as they were."""
    digest = model.attachment.reader.digest
    model.client.sessions.create(name=name, reader_digest=digest, settings={"chunk": str(CHUNK), "model": "m"})
    with opened(model, name) as session:
        say(session, *WORDS)
        assert session.left > 0
        assert sinks(session) == {}


def test_a_system_prompt_stands_before_the_first_turn_alone(model: MemoryModel, name: str) -> None:
    with opened(model, name, system=f"  {SYSTEM}\n", style="plain") as session:
        say(session, *WORDS[:2])
        text = model.tokenizer.decode(said(session))
        assert text.startswith(f"<s>{SYSTEM}\nUser: {WORDS[0]}\nAssistant:")
        assert text.count(SYSTEM) == 1
        assert [turn.text("user") for turn in session.turns if turn.status != "part"] == WORDS[:2]
        assert session.info.settings["system"] == SYSTEM


def test_a_session_keeps_its_system_prompt(model: MemoryModel, name: str) -> None:
    with opened(model, name, system=SYSTEM) as session:
        say(session, WORDS[0])
        session.fork(f"{name}-fork")
    with opened(model, name, system=SYSTEM):
        pass
    with pytest.raises(SessionError, match=r"begun with 'You speak of the sea.', and keeps that"):
        opened(model, name, system="Other.")
    with opened(model, f"{name}-plain") as session:
        say(session, WORDS[0])
    with pytest.raises(SessionError, match="begun without a system prompt"):
        opened(model, f"{name}-plain", system="Other.")
    with opened(model, f"{name}-fork", system=SYSTEM) as session:
        assert session.window.cache.sinks.wanted == len(SYSTEM) + 2


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"system": "x" * 420}, InputError, r"422 sinks \+ window 48 \+ 64 positions"),
        ({"system": SYSTEM, "local": "tova:m=20"}, InputError, "no room for 23 sinks"),
        ({"system": 3}, InputError, "system is a string, not a int"),
    ],
)
def test_what_makes_no_sense_begins_no_session(
    model: MemoryModel, name: str, options: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        opened(model, name, **options)
    with pytest.raises(kvbank.SessionNotFound):
        model.client.sessions.get(name=name)


FOLDS = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + CHATML[len("{% for m in messages %}") :]
)
DROPS = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
GLUED = "{% if messages[0].role == 'system' %}[SYS]{{ messages[0].content }}[/SYS] {% endif %}" + DROPS
OWN = "{% if messages[0].role != 'system' %}<|im_start|>system\nI am kind.<|im_end|>\n{% endif %}" + CHATML


@pytest.mark.parametrize(
    ("template", "whole", "system"),
    [
        (CHATML, "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n", 1),
        (OWN, "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n", 1),
        (FOLDS, "<|im_start|>user\nS\n\nU<|im_end|>\n<|im_start|>assistant\n", 0),
        (DROPS, "<|im_start|>user\nS\n\nU<|im_end|>\n<|im_start|>assistant\n", 0),
        (GLUED, "[SYS]S[/SYS] <|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n", 2),
    ],
)
def test_where_a_template_has_the_system_prompt(template: str, whole: str, system: int) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    style = prompt_format("auto", tokenizer, None, system=True)
    assert style.system[0] + "S" + style.system[1] + style.first[0] + "U" + style.first[1] == whole
    assert style.first[0] == {0: "", 1: "<|im_start|>user\n", 2: "<|im_start|>user\n"}[system]
    assert style.later == prompt_format("auto", tokenizer, None).later
