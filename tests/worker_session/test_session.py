"""Sessions of a real service: durable turns, windows that come back, a bank that has each token once."""

import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

import kvbank
from memory_service.api.embedded import LocalServer
from model_worker.errors import InputError, SessionError
from model_worker.model import MemoryModel
from model_worker.session.lease import Lease
from model_worker.session.session import Session
from tests.support.diagonal import rotated
from tests.support.waiting import wait_until

from .conftest import CHATML
from .conversing import CHUNK, WINDOW, WORDS, check_bank, ids, next_logits, own_chunks, say, texts


@pytest.fixture(scope="module")
def model(model_folder: Path, address: str) -> Iterator[MemoryModel]:
    with MemoryModel.from_pretrained(str(model_folder), memory=address, bank=(), chunk=CHUNK, window=WINDOW) as model:
        yield model


@pytest.fixture
def name() -> str:
    return f"session-{uuid.uuid4().hex[:8]}"


def opened(model: MemoryModel, name: str, **options: Any) -> Session:
    return Session.open(model, name=name, **options)


def without_window(session: Session) -> None:
    """Put bytes that are no window into the place of the session's window."""
    session.window.kept()
    record = session.record
    head, epoch = record.info.head, record.lease.epoch
    record.client.sessions.keep_window(record.info.session_id, b"none", epoch=epoch, turn=head, stamp="none")


def test_goes_on_where_it_ended(model: MemoryModel, name: str) -> None:
    with opened(model, name) as session:
        first = say(session, *WORDS[:2])
    with opened(model, name) as session:
        assert session.turns == first
        say(session, *WORDS[2:])
        check_bank(session)
        assert session.left > CHUNK
        assert session.info.head == 4
    assert model.client.sessions.get(name=name).lease is None


def test_an_interrupted_conversation_is_the_same_as_an_uninterrupted_one(model: MemoryModel, name: str) -> None:
    with opened(model, name) as session:
        whole = say(session, *WORDS)
        expected = next_logits(session)
    for word in WORDS:
        with opened(model, f"{name}-cut") as session:
            say(session, word)
    with opened(model, f"{name}-cut") as session:
        assert ids(session.turns) == ids(whole)
        check_bank(session)
        torch.testing.assert_close(next_logits(session), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("harm", ["gone", "old"])
def test_the_window_is_made_again_from_the_turns(model: MemoryModel, name: str, harm: str) -> None:
    """Bytes that are no window are not used, nor is a window that is not of the last turn."""
    with opened(model, name, window=300) as session:
        say(session, *WORDS[:2])
        if harm == "gone":
            say(session, *WORDS[2:])
            without_window(session)
        else:
            session.window.keep = lambda: None  # type: ignore[method-assign]
            say(session, *WORDS[2:])
        assert session.left == 0
        expected = next_logits(session)
    with opened(model, name, window=300) as session:
        torch.testing.assert_close(next_logits(session), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", rotated([CHUNK, CHUNK + 3, 300], 1))
def test_another_window_size(model: MemoryModel, name: str, window: int) -> None:
    with opened(model, name) as session:
        say(session, *WORDS)
    with opened(model, name, window=window) as session:
        say(session, *WORDS[:2])
        assert session.window.cache.physical <= window
        check_bank(session, ahead=window > WINDOW)


def test_a_window_of_one_chunk_is_not_fed_token_by_token(model: MemoryModel, name: str) -> None:
    """Feed 60 tokens and more through it: a chunk takes two forwards, its first token and the rest."""
    fed = list[tuple[int, int]]()
    with opened(model, name, window=CHUNK) as session:
        session.say("the sea " * 8, max_new_tokens=1, progress=lambda done, total: fed.append((done, total)))
        assert len(fed) < fed[0][1] // 4
        check_bank(session)


RULE = "tova:m=20"


def test_a_local_rule_holds_and_an_interrupted_conversation_is_the_same(model: MemoryModel, name: str) -> None:
    """Tokens that the rule kept of what left the window come back with the window, also of a first, short turn."""
    with opened(model, name, local=RULE) as session:
        whole = say(session, *WORDS)
        assert {layer.held for layer in session.window.cache.layers} == {20}
        kept = session.window.cache.layers[1].positions
        expected = next_logits(session)
    for word in WORDS:
        with opened(model, f"{name}-cut", local=RULE) as session:
            say(session, word)
    with opened(model, f"{name}-cut", local=RULE) as session:
        assert ids(session.turns) == ids(whole)
        check_bank(session)
        assert torch.equal(session.window.cache.layers[1].positions, kept)
        torch.testing.assert_close(next_logits(session), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("before", "after"), rotated([(None, RULE), (RULE, "tova:m=21")], 1, every=2))
def test_another_local_rule_is_told(model: MemoryModel, name: str, before: str | None, after: str | None) -> None:
    with opened(model, name, local=before) as session:
        say(session, *WORDS)
    told = f"left under the local rule {before or 'none'} and goes on under {after or 'none'}:"
    with ExitStack() as stack:
        with pytest.warns(RuntimeWarning, match=re.escape(told)):
            session = stack.enter_context(opened(model, name, local=after))
        say(session, "more")
        check_bank(session)
    with opened(model, name, local=after) as session:
        say(session, "and more")


@pytest.mark.parametrize("rule", ["tova", "tova:m=0", "window:m=3", "nonsense:m=3"])
def test_a_local_rule_that_there_is_not(model: MemoryModel, name: str, rule: str) -> None:
    with pytest.raises(InputError):
        opened(model, name, local=rule)
    with pytest.raises(kvbank.SessionNotFound):
        model.client.sessions.get(name=name)


# A worker that kills itself in the middle of its third turn.
KILLED = """
import os, signal, sys
from model_worker.model import MemoryModel
from model_worker.session.session import Session

folder, address, name, *words = sys.argv[1:]
with MemoryModel.from_pretrained(folder, memory=address, bank=(), chunk=16, window=48) as model:
    session = Session.open(model, name=name)
    for word in words[:-1]:
        session.say(word, max_new_tokens=12)
    session.say(words[-1], max_new_tokens=40, stopped=lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_an_answer(model: MemoryModel, model_folder: Path, address: str, name: str) -> None:
    """Go on in another process at once, though the lease of the killed one has not ended."""
    command = [sys.executable, "-c", KILLED, model_folder, address, name, *WORDS[:3]]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert model.client.sessions.get(name=name).lease is not None
    with opened(model, name) as session:
        assert texts(session) == WORDS[:2]
        check_bank(session, ahead=True)
        say(session, *WORDS)
        check_bank(session)


class Crash(BaseException):
    """Ends a worker here."""


@pytest.mark.parametrize("moment", ["before the bank", "after the bank"])
def test_ended_between_turn_bank_and_window(
    model: MemoryModel, name: str, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def crash(*args: object) -> None:
        raise Crash

    with opened(model, name) as session:
        say(session, *WORDS[:2])
        monkeypatch.setattr(session.window, "end_turn" if moment == "before the bank" else "keep", crash)
        with pytest.raises(Crash):
            say(session, WORDS[2])
    with opened(model, name) as session:
        assert texts(session) == WORDS[:3]
        check_bank(session)
        say(session, *WORDS)
        check_bank(session)


@pytest.mark.slow
def test_a_service_that_is_started_again(model_folder: Path, tmp_path: Path) -> None:
    """Fail a turn while the service is away, in one clear error, and go on with the next one."""
    server = LocalServer(tmp_path / "data")
    with (
        MemoryModel.from_pretrained(
            str(model_folder), memory=server.address, bank=(), chunk=CHUNK, window=WINDOW, retry_after=0.01
        ) as model,
        opened(model, "one") as session,
    ):
        said = say(session, *WORDS)
        address = server.address
        server.stop()
        with pytest.raises(kvbank.Unavailable):
            say(session, "lost")
        with LocalServer(tmp_path / "data", listen=address):
            assert texts(session) == WORDS
            say(session, *WORDS[:2])
            assert texts(session) == [*WORDS, *WORDS[:2]]
            assert session.turns[: len(said)] == said
            check_bank(session)


def test_an_answer_of_the_service_that_was_lost(model: MemoryModel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Find out at the next turn, and by its key, that a turn is there whose append was not answered."""
    with opened(model, name) as session:
        say(session, WORDS[0])
        append = session.record.client.sessions.append

        def lost(*args: Any, **options: Any) -> Any:
            append(*args, **options)
            raise kvbank.Unavailable("the connection broke")

        with monkeypatch.context() as patch:
            patch.setattr(session.record.client.sessions, "append", lost)
            with pytest.raises(kvbank.Unavailable):
                session.say(WORDS[1], key=f"{name}-1", max_new_tokens=12)
        again = session.say(WORDS[1], key=f"{name}-1", max_new_tokens=12)
        assert again.number == 2
        assert texts(session) == WORDS[:2]
        say(session, *WORDS[2:])
        check_bank(session)
    with opened(model, f"{name}-other") as other, pytest.raises(InputError, match="is that of turn 2 of session"):
        other.say("ahoy", key=f"{name}-1")


def test_a_bank_that_is_not_there_is_written_again(
    model: MemoryModel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start over where a writing was killed."""
    with opened(model, name) as session:
        say(session, *WORDS)
        model.client.delete_bank(session.info.bank)
    write, written = model.client.write, []

    def crash(*args: Any, **options: Any) -> Any:
        if written:
            raise Crash
        written.append(None)
        return write(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(model.client, "write", crash)
        with pytest.raises(Crash):
            opened(model, name)
    with opened(model, name) as session:
        check_bank(session)
        assert session.left > CHUNK


def test_two_workers_cannot_have_one_session(model: MemoryModel, name: str) -> None:
    with opened(model, name, holder="here") as session:
        with pytest.raises(kvbank.LeaseHeld) as refused:
            opened(model, name)
        assert refused.value.holder == "here"
        with opened(model, f"{name}-two"):
            pass
        say(session, WORDS[0])
    with opened(model, name) as session:
        assert texts(session) == WORDS[:1]


def test_a_worker_that_was_taken_over_from_says_nothing_more(model: MemoryModel, name: str) -> None:
    """Let another one have the session once the lease has ended, and find its turns afterwards."""
    with opened(model, name, holder="one") as first:
        say(first, WORDS[0])
        lease = first.record.lease
        asked: list[None] = []

        def taken_over() -> bool:
            if not asked:
                model.client.sessions.release(first.info.session_id, lease.epoch)
                with opened(model, name, holder="two") as second:
                    say(second, WORDS[1])
            asked.append(None)
            return False

        with pytest.raises(kvbank.LeaseLost):
            say(first, "lost", stopped=taken_over)
        assert texts(first) == WORDS[:1]
        say(first, *WORDS[2:])
        assert texts(first) == WORDS
        check_bank(first)


def test_a_lease_is_kept_alive(model: MemoryModel, name: str) -> None:
    """Find the lease renewed by a thread while nothing is said."""
    with opened(model, name) as session:
        session_id = session.info.session_id
    lease = Lease(model.client, session_id, "here", seconds=3.0)
    taken = lease.take().lease
    assert taken is not None

    def is_renewed() -> bool:
        now = model.client.sessions.get(session_id).lease
        return now is not None and now.expire_time > taken.expire_time

    wait_until(is_renewed)
    with pytest.raises(kvbank.LeaseHeld):
        opened(model, name)
    lease.release()
    with opened(model, name) as session:
        say(session, WORDS[0])


def test_another_model_is_refused_with_both_digests(
    model: MemoryModel, other_model_folder: Path, address: str, name: str
) -> None:
    with opened(model, name) as session:
        say(session, WORDS[0])
    with MemoryModel.from_pretrained(str(other_model_folder), memory=address, bank=()) as other:
        digests = f"{model.attachment.reader.digest}.*{other.attachment.reader.digest}"
        with pytest.raises(SessionError, match=digests):
            opened(other, name)
    with pytest.raises(kvbank.SessionNotFound):
        opened(model, "nobody", create=False)


# -- forks, rewinds, what is forgotten --------------------------------------------------------------------------------


def test_a_fork_has_what_was_said_and_nothing_of_what_follows(model: MemoryModel, name: str) -> None:
    with opened(model, name) as session:
        said = say(session, *WORDS)
        fork = session.fork(f"{name}-fork", turn=2)
        say(session, "a third ship", "a fourth ship")
        check_bank(session)
        with opened(model, f"{name}-fork") as other:
            assert other.info.session_id == fork.session_id
            assert other.turns == said[:2]
            check_bank(other, ahead=True)
            say(other, "another sea", *WORDS)
            check_bank(other)
            assert "a third ship" not in texts(other)
        check_bank(session)
        say(session, *WORDS)
        check_bank(session)


def test_a_rewind_goes_on_behind_an_earlier_turn(model: MemoryModel, name: str) -> None:
    with opened(model, name) as session:
        said = say(session, *WORDS)
        session.rewind(2)
        assert session.turns == said[:2]
        say(session, "another sea")
        assert texts(session) == [*WORDS[:2], "another sea"]
        check_bank(session, ahead=True)
    with opened(model, name) as session:
        say(session, *WORDS)
        check_bank(session)
        session.rewind(0)
        say(session, WORDS[3])
        assert ids(session.turns)[:1] == ids(said)[:1]  # the tokenizer's beginning
        with pytest.raises(kvbank.TurnNotFound):
            session.rewind(9)
        say(session, *WORDS)
        check_bank(session)


def test_a_rewound_conversation_is_as_one_that_never_went_on(model: MemoryModel, name: str) -> None:
    with opened(model, name, window=300) as session:
        say(session, *WORDS[:2])
        without_window(session)
    with opened(model, name, window=300) as session:
        expected = next_logits(session)
    with opened(model, name, window=300) as session:
        session.window.forget()
        say(session, *WORDS[2:])
        session.rewind(2)
        torch.testing.assert_close(next_logits(session), expected, atol=1e-4, rtol=0)


def test_tokens_of_a_turn_elsewhere_are_those_of_a_turn_here(model: MemoryModel, name: str) -> None:
    """Compare what was told with what was said and answered, token by token."""
    with opened(model, name, window=300) as session:
        dictate(session, "Is it?", " Aye.\nUser:")
        dictate(session, "Sure?", " Yes.</s>")
        said = session.turns
    with opened(model, f"{name}-told", window=300) as session:
        told = [session.tell("Is it?", "Aye.", key=f"{name}-told"), session.tell("Sure?", "Yes.")]
        assert [turn.text("assistant") for turn in told] == ["Aye.", "Yes."]
        text = model.tokenizer.decode(ids(session.turns), skip_special_tokens=True)
        assert text == model.tokenizer.decode(ids(said), skip_special_tokens=True)
        assert session.tell("Is it?", "Aye.", key=f"{name}-told") == told[0]
        long = " ".join(f"word{number}" for number in range(60))
        session.tell(long, long)
    with opened(model, f"{name}-told") as session:
        say(session, *WORDS)
        check_bank(session)


@pytest.mark.parametrize("which", rotated([0, 1, 3], 1))
def test_a_window_is_made_around_a_turn_that_is_gone(model: MemoryModel, name: str, which: int) -> None:
    """Chunks that had attended to the turn are written again; sinks are those of the session's beginning."""
    with opened(model, name) as session:
        say(session, *WORDS)
        gone = session.turns[which]
        behind = [chunk for chunk in own_chunks(session) if chunk.start + len(chunk.token_ids) > gone.start]
        if behind:
            model.client.delete_chunks(session.info.bank, [chunk.chunk_id for chunk in behind])
        session.record.turns[which] = replace(gone, status="forgotten", items=(), token_ids=())
        session._write_again(None)
        check_bank(session, ahead=True)
        assert session.window.start < session.record.tokens
        say(session, *WORDS)
        check_bank(session)
        assert texts(session) == [word for at, word in enumerate(WORDS * 2) if at != which]


# -- turns ------------------------------------------------------------------------------------------------------------


class Dictated(LogitsProcessor):
    """Makes a model write what is wanted."""

    def __init__(self, wanted: list[int]):
        self.wanted = iter(wanted)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, next(self.wanted)] = 0
        return forced


def dictate(session: Session, text: str, written: str, limit: int = 100, **options: Any) -> tuple[kvbank.Turn, str]:
    """Say a turn in which the model writes `written`; return the turn and what was shown of it."""
    shown: list[str] = []
    wanted = session.model.tokenizer.encode(written, add_special_tokens=False)
    own = {"on_text": shown.append, "logits_processor": [Dictated(wanted)], "max_new_tokens": limit, **options}
    [turn] = say(session, text, **own)
    return turn, "".join(shown)


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        (" Aye.\nUser:", "Aye."),
        (" Aye.</s>", "Aye."),
        (" Aye.\nUs</s>", "Aye."),
        (" Aye\nor nay</s>", "Aye\nor nay"),
        ("</s>", ""),
        ("\nUser:", ""),
        (" naïve 바다</s>", "naïve 바다"),
    ],
)
def test_what_ends_an_answer_is_not_part_of_it(model: MemoryModel, name: str, written: str, answer: str) -> None:
    with opened(model, name, window=200) as session:
        turn, shown = dictate(session, "Is it?", written)
        assert turn.text("assistant") == shown == answer
        assert turn.status == "completed"
        dictate(session, "Sure?", " Yes.</s>")
        text = model.tokenizer.decode(ids(session.turns), skip_special_tokens=True)
        kept = written.removesuffix("</s>")
        between = "\nUser:"[len("\nUs") :] if kept.endswith("\nUs") else "" if kept.endswith(":") else "\nUser:"
        assert text == f"User: Is it?\nAssistant:{kept}{between} Sure?\nAssistant: Yes."


@pytest.mark.parametrize(
    ("written", "stop", "answer"),
    [
        (" Aye. Nay", ["Nay"], "Aye. "),
        (" one two", ["three", "two", "ne t"], "o"),
        (" Aye; or\nUser:", ["never"], "Aye; or"),
    ],
)
def test_an_answer_ends_before_a_text_of_the_caller_s(
    model: MemoryModel, name: str, written: str, stop: list[str], answer: str
) -> None:
    with opened(model, name, window=200) as session:
        turn, shown = dictate(session, "Is it?", written, stop=stop)
        assert turn.text("assistant") == answer
        assert shown.strip() == answer.strip()
        assert turn.status == "completed"


def test_an_answer_cut_by_its_limit_goes_on_cleanly(model: MemoryModel, name: str) -> None:
    with opened(model, name, window=200) as session:
        turn, _ = dictate(session, "Is it?", " Aye.\nUser:", limit=7)
        assert (turn.text("assistant"), turn.status) == ("Aye.", "incomplete")
        dictate(session, "Sure?", " Yes.</s>")
        assert "Aye.\nUser: Sure?" in model.tokenizer.decode(ids(session.turns))
        check_bank(session)


def test_stopped_by_the_user_is_kept_as_far_as_it_went(model: MemoryModel, name: str) -> None:
    asked: list[None] = []
    with opened(model, name) as session:
        [turn] = say(session, WORDS[0], stopped=lambda: asked.append(None) or len(asked) == 3)  # type: ignore[func-returns-value]
        assert len(turn.token_ids) - turn.prompt_tokens == 3
        assert turn.status == "incomplete"
        assert turn.usage["output_tokens"] == 3
        say(session, *WORDS)
        check_bank(session)


def fail(*args: object) -> bool:
    raise OSError("the terminal is gone")


@pytest.mark.parametrize("where", rotated(["stopped", "progress"], 0, every=2))
def test_a_turn_that_fails_has_not_taken_place(model: MemoryModel, name: str, where: str) -> None:
    with opened(model, name) as session:
        say(session, *WORDS)
        with pytest.raises(OSError, match="terminal"):
            say(session, "x" * 30, **{where: fail})
        check_bank(session, ahead=True)
        say(session, *WORDS)
        check_bank(session)
        assert texts(session) == WORDS * 2


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_an_empty_message_is_refused(model: MemoryModel, name: str, text: str) -> None:
    with opened(model, name) as session, pytest.raises(InputError, match="say something"):
        session.say(text)


def test_a_message_longer_than_the_window(model: MemoryModel, name: str) -> None:
    text, told = " ".join(f"word{number}" for number in range(60)), list[tuple[int, int]]()
    with opened(model, name) as session:
        [turn] = say(session, text, progress=lambda done, total: told.append((done, total)))
        assert turn.text("user") == text
        assert model.tokenizer.decode(ids(session.turns)).startswith(f"<s>User: {text}\nAssistant:")
        assert [done for done, _ in told] == sorted({done for done, _ in told})
        assert told[0][0] == 0
        check_bank(session)


def test_a_long_message_that_was_cut_off(model: MemoryModel, name: str) -> None:
    """Pieces are there, since the beginning of the message has left the window; the next message begins anew."""
    text = " ".join(f"word{number}" for number in range(30))
    with opened(model, name) as session, pytest.raises(OSError, match="terminal"):
        say(session, text, stopped=fail)
    with opened(model, name) as session:
        assert all(turn.status == "part" for turn in session.turns)
        check_bank(session, ahead=True)
        say(session, "hello")
        assert "\nUser: hello\nAssistant:" in model.tokenizer.decode(ids(session.turns))
        check_bank(session)


def test_a_long_conversation_feeds_its_window_only(model: MemoryModel, name: str) -> None:
    with opened(model, name) as session:
        say(session, *WORDS * 3)
        assert len(session.window.ids) < sum(turn.token_count for turn in session.turns) / 2
        check_bank(session)


def test_a_model_with_a_chat_template(model_folder: Path, address: str, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    with MemoryModel.from_pretrained(str(folder), memory=address, bank=(), chunk=CHUNK, window=200) as model:
        model.model.generation_config.eos_token_id = [1, 3]
        with opened(model, name) as session:
            assert dictate(session, "Is it?", "Aye.<|im_end|>")[1] == "Aye."
            dictate(session, "Sure?", "Yes.</s>")
            talk = [("user", "Is it?"), ("assistant", "Aye."), ("user", "Sure?")]
            messages = [{"role": role, "content": content} for role, content in talk]
            expected = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert model.tokenizer.decode(ids(session.turns)) == f"{expected}Yes."
            check_bank(session)
