"""Sessions over a real service: durable turns, windows that come back, a bank that has each token once."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

from memory_service.api.embedded import LocalServer
from model_worker.errors import InputError, SessionError
from model_worker.model import MemoryModel
from model_worker.session.folder import read_session
from model_worker.session.log import SessionLog
from model_worker.session.log_format import Turn
from model_worker.session.session import Session

CHUNK, WINDOW, ANSWER = 16, 48, 12
WORDS = ["the sea is wide", "ships come and go", "what did I say of the sea?", "and who sails the ships?"]

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def model(model_folder: Path, address: str) -> Iterator[MemoryModel]:
    with MemoryModel.from_pretrained(str(model_folder), memory=address, bank=(), chunk=CHUNK, window=WINDOW) as model:
        yield model


@contextmanager
def opened(model: MemoryModel, sessions: Path, name: str = "one", **options: Any) -> Iterator[Session]:
    log = SessionLog.open(sessions, name)
    try:
        session = Session.open(model, log, name="tiny", target="here", **options)
    except BaseException:
        log.close()
        raise
    with session:
        yield session


def say(session: Session, *texts: str, **options: Any) -> list[Turn]:
    return [session.say(text, **{"max_new_tokens": ANSWER, **options}) for text in texts]


def ids(turns: list[Turn]) -> list[int]:
    return [token for turn in turns for token in turn.ids]


def next_logits(session: Session) -> torch.Tensor:
    """Return what the model expects after one more token; the session is not to be used after that."""
    with torch.no_grad():
        return session.model.model(input_ids=torch.tensor([[70]]), past_key_values=session.window.cache).logits[0, -1]


def check_bank(session: Session, *, ahead: bool = False) -> None:
    """Check that all that left the window is in the bank, once, and nothing else is. ahead: the bank may have more of
    what was said, which is in the window too."""
    said = ids(session.log.turns)
    chunks = sorted(session.model.client.list_chunks(session.header.bank), key=lambda chunk: chunk.start)
    in_bank = sum(len(chunk.token_ids) for chunk in chunks)
    assert in_bank == session.left or (ahead and session.left < in_bank <= len(said))
    lengths = [len(chunk.token_ids) for chunk in chunks]
    assert [chunk.start for chunk in chunks] == [sum(lengths[:at]) for at in range(len(lengths))]
    ends = set(accumulate(len(turn.ids) for turn in session.log.turns))
    for chunk, length in zip(chunks, lengths, strict=True):
        after = chunk.start + length
        assert after in ends or length == CHUNK or (length >= CHUNK // 2 and chunk.text[-1] in ".!?\n")
        assert not any(chunk.start < end < after for end in ends), "a chunk has parts of two turns"
    assert [token for chunk in chunks for token in chunk.token_ids] == said[:in_bank]
    assert session.window.cache.columns.ids[0].tolist() == said[session.left :]


def test_goes_on_where_it_ended(model: MemoryModel, tmp_path: Path) -> None:
    with opened(model, tmp_path) as session:
        first = say(session, *WORDS[:2])
    with opened(model, tmp_path) as session:
        assert session.log.turns == first
        say(session, *WORDS[2:])
        check_bank(session)
        assert session.left > CHUNK
    assert read_session(tmp_path, "one")[1][:2] == first


def test_an_interrupted_conversation_is_the_same_as_an_uninterrupted_one(model: MemoryModel, tmp_path: Path) -> None:
    with opened(model, tmp_path, "whole") as session:
        whole = say(session, *WORDS)
        expected = next_logits(session)
    for word in WORDS:
        with opened(model, tmp_path, "cut") as session:
            say(session, word)
    with opened(model, tmp_path, "cut") as session:
        assert ids(session.log.turns) == ids(whole)
        check_bank(session)
        torch.testing.assert_close(next_logits(session), expected, atol=1e-4, rtol=0)


def test_the_window_is_made_again_from_the_log(model: MemoryModel, tmp_path: Path) -> None:
    with opened(model, tmp_path, window=300) as session:
        say(session, *WORDS)
        assert session.left == 0
        expected = next_logits(session)
    (tmp_path / "one" / "window.safetensors").unlink()
    with opened(model, tmp_path, window=300) as session:
        torch.testing.assert_close(next_logits(session), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("harm", ["empty", "flipped", "old"])
def test_a_window_file_that_is_of_no_use_is_not_used(model: MemoryModel, tmp_path: Path, harm: str) -> None:
    path = tmp_path / "one" / "window.safetensors"
    with opened(model, tmp_path) as session:
        say(session, *WORDS)
        old = path.read_bytes()
        say(session, "more")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes({"empty": b"", "flipped": bytes(data), "old": old}[harm])
    with opened(model, tmp_path) as session:
        check_bank(session)
        say(session, *WORDS[:2])
        check_bank(session)


@pytest.mark.parametrize("window", [CHUNK, CHUNK + 3, 300])
def test_another_window_size(model: MemoryModel, tmp_path: Path, window: int) -> None:
    with opened(model, tmp_path) as session:
        say(session, *WORDS)
    with opened(model, tmp_path, window=window) as session:
        say(session, *WORDS[:2])
        assert session.window.cache.physical <= window
        check_bank(session, ahead=window > WINDOW)


RULE = "tova:m=20"


def test_a_local_rule_holds_and_an_interrupted_conversation_is_the_same(model: MemoryModel, tmp_path: Path) -> None:
    """Tokens that the rule kept of what left the window come back with the window, also of a first, short turn."""
    with opened(model, tmp_path, "whole", local=RULE) as session:
        whole = say(session, *WORDS)
        assert {layer.held for layer in session.window.cache.layers} == {20}
        kept = session.window.cache.layers[1].positions
        expected = next_logits(session)
    with opened(model, tmp_path, "window") as session:
        assert ids(say(session, *WORDS)) != ids(whole)
    for word in WORDS:
        with opened(model, tmp_path, "cut", local=RULE) as session:
            say(session, word, max_new_tokens=ANSWER)
    with opened(model, tmp_path, "cut", local=RULE) as session:
        assert ids(session.log.turns) == ids(whole)
        check_bank(session)
        assert torch.equal(session.window.cache.layers[1].positions, kept)
        torch.testing.assert_close(next_logits(session), expected, atol=1e-4, rtol=0)


def test_the_models_own_rule_is_the_sessions(model_folder: Path, address: str, tmp_path: Path) -> None:
    options = {"memory": address, "bank": (), "chunk": CHUNK, "window": WINDOW, "local": "tova:m=7,heads=own"}
    with MemoryModel.from_pretrained(str(model_folder), **options) as model, opened(model, tmp_path) as session:
        say(session, *WORDS[:2])
        assert {layer.held for layer in session.window.cache.layers} == {7}
    with MemoryModel.from_pretrained(str(model_folder), **options) as model, opened(model, tmp_path) as session:
        say(session, *WORDS[2:])
        check_bank(session)


@pytest.mark.parametrize(
    ("before", "after"), [(None, RULE), (RULE, None), (RULE, "tova:m=21"), (RULE, "tova:m=20,observer=window:2")]
)
def test_another_local_rule_is_told(model: MemoryModel, tmp_path: Path, before: str | None, after: str | None) -> None:
    with opened(model, tmp_path, local=before) as session:
        say(session, *WORDS)
    told = f"left under the local rule {before or 'none'} and goes on under {after or 'none'}:"
    with ExitStack() as stack:
        with pytest.warns(RuntimeWarning, match=re.escape(told)):
            session = stack.enter_context(opened(model, tmp_path, local=after))
        check_bank(session)
        say(session, "more")
        check_bank(session)
    with opened(model, tmp_path, local=after) as session:
        say(session, "and more")


@pytest.mark.parametrize("rule", ["tova", "tova:m=0", "window:m=3", "nonsense:m=3"])
def test_a_local_rule_that_there_is_not(model: MemoryModel, tmp_path: Path, rule: str) -> None:
    with pytest.raises(InputError), opened(model, tmp_path, local=rule):
        pass
    with opened(model, tmp_path):
        pass


# A worker that kills itself in the middle of its third turn.
KILLED = """
import os, signal, sys
from pathlib import Path
from model_worker.model import MemoryModel
from model_worker.session.session import Session
from model_worker.session.log import SessionLog

folder, address, sessions, *words = sys.argv[1:]
with MemoryModel.from_pretrained(folder, memory=address, bank=(), chunk=16, window=48) as model:
    session = Session.open(model, SessionLog.open(Path(sessions), "one"), name="tiny", target="here")
    for word in words[:-1]:
        session.say(word, max_new_tokens=12)
    session.say(words[-1], max_new_tokens=40, stopped=lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_killed_in_the_middle_of_an_answer(
    model: MemoryModel, model_folder: Path, address: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, model_folder, address, tmp_path, *WORDS[:3]]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    with opened(model, tmp_path) as session:
        assert [turn.text for turn in session.log.turns] == WORDS[:2]
        check_bank(session, ahead=True)
        say(session, *WORDS)
        check_bank(session)


class Crash(BaseException):
    """Ends a worker here."""


@pytest.mark.parametrize("moment", ["before the bank", "after the bank"])
def test_ended_between_log_bank_and_window(
    model: MemoryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def crash(*args: object) -> None:
        if moment == "before the bank":
            append(*args)  # type: ignore[arg-type]
        raise Crash

    with opened(model, tmp_path) as session:
        say(session, *WORDS[:2])
        append = session.log.append
        where, what = (session.log, "append") if moment == "before the bank" else (session.window, "keep")
        monkeypatch.setattr(where, what, crash)
        with pytest.raises(Crash):
            say(session, WORDS[2])
    with opened(model, tmp_path) as session:
        assert [turn.text for turn in session.log.turns] == WORDS[:3]
        check_bank(session)
        say(session, *WORDS)
        check_bank(session)


def test_the_service_is_started_again(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away during some turns, back on another port: what could not be written was kept, and comes once."""
    for number in range(2):
        server = LocalServer(tmp_path / "data")
        with MemoryModel.from_pretrained(
            str(model_folder), memory=server.address, bank=(), chunk=CHUNK, window=WINDOW
        ) as model:
            with opened(model, tmp_path, retry_after=1000) as session:
                say(session, *WORDS)
                check_bank(session)
                if number == 0:
                    server.stop()
                    with pytest.warns(RuntimeWarning, match="away"):
                        say(session, *WORDS)
                    assert len(session.memory.memory.spool) > 0
            if number == 0:
                continue
            assert len(session.memory.memory.spool) == 0
        server.stop()


def test_a_bank_that_is_not_there_is_written_again(model: MemoryModel, tmp_path: Path) -> None:
    with opened(model, tmp_path) as session:
        say(session, *WORDS)
        model.client.delete_bank(session.header.bank)
    with opened(model, tmp_path) as session:
        check_bank(session)
        assert session.left > 0


def test_a_rewriting_that_was_killed_starts_over(
    model: MemoryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(model, tmp_path) as session:
        say(session, *WORDS)
        model.client.delete_bank(session.header.bank)
    write, written = model.client.write, []

    def crash(*args: Any, **options: Any) -> Any:
        if written:
            raise Crash
        written.append(None)
        return write(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(model.client, "write", crash)
        with pytest.raises(Crash), opened(model, tmp_path):
            pass
    with opened(model, tmp_path) as session:
        check_bank(session)
        assert session.left > CHUNK
    with opened(model, tmp_path) as session:
        assert not session.log.rewriting.exists()


def test_a_long_conversation_feeds_its_window_only(model: MemoryModel, tmp_path: Path) -> None:
    with opened(model, tmp_path) as session:
        say(session, *WORDS * 3)
        assert len(session.window.ids) < sum(len(turn.ids) for turn in session.log.turns) / 2
        check_bank(session)


def test_two_processes_cannot_have_one_session(model: MemoryModel, tmp_path: Path) -> None:
    with opened(model, tmp_path):
        with pytest.raises(SessionError, match="in use by another process"):
            SessionLog.open(tmp_path, "one")
        with opened(model, tmp_path, "two"):
            pass


def test_another_model_is_refused_with_both_digests(
    model: MemoryModel, other_model_folder: Path, address: str, tmp_path: Path
) -> None:
    with opened(model, tmp_path) as session:
        say(session, WORDS[0])
    with MemoryModel.from_pretrained(str(other_model_folder), memory=address, bank=()) as other:
        digests = f"{model.attachment.reader.digest}.*{other.attachment.reader.digest}"
        for _ in range(2):  # the first refusal let go of the log
            with pytest.raises(SessionError, match=digests):
                Session.open(other, SessionLog.open(tmp_path, "one"))


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_turn_that_could_not_be_synced_leaves_no_line(
    model: MemoryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    sync = os.fsync

    def fail(descriptor: int) -> None:
        if threading.current_thread() is threading.main_thread():  # the service is in this process
            raise error
        sync(descriptor)

    with opened(model, tmp_path) as session:
        say(session, WORDS[0])
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", fail)
            with pytest.raises((SessionError, KeyboardInterrupt)):
                say(session, WORDS[1])
        say(session, *WORDS[2:])
        check_bank(session, ahead=True)
    assert [turn.text for turn in read_session(tmp_path, "one")[1]] == [WORDS[0], *WORDS[2:]]


def test_a_full_disk_tears_no_later_line(tmp_path: Path) -> None:
    """Bytes that could not be written must not come out with what is written next."""
    turn = Turn("a" * 500, "", [1], 1, 0, "now")
    with SessionLog.open(tmp_path, "one") as log:
        log.begin(model="m", reader="r", chunk=4, memory="here")
        path, bounds = tmp_path / "one" / "log.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, bounds[1]))
        try:
            with pytest.raises(SessionError, match="could not be written"):
                log.append(turn)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, bounds)
        log.append(turn)
        log.append(turn)
    assert read_session(tmp_path, "one")[1] == [turn, turn]


@pytest.mark.parametrize("keep", [-1, 1])
def test_a_torn_line_is_cut_off(model: MemoryModel, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "one" / "log.jsonl"
    with opened(model, tmp_path) as session:
        say(session, *WORDS[:2])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:keep])
    assert len(read_session(tmp_path, "one")[1]) == 1  # looking changes nothing
    with pytest.warns(RuntimeWarning, match="unfinished turn cut off"):
        SessionLog.open(tmp_path, "one").close()
    with opened(model, tmp_path) as session:
        assert [turn.text for turn in session.log.turns] == WORDS[:1]
        say(session, *WORDS)
        check_bank(session)
    assert [turn.text for turn in read_session(tmp_path, "one")[1]] == [WORDS[0], *WORDS]


def test_a_hole_in_the_log_is_an_error(model: MemoryModel, tmp_path: Path) -> None:
    path = tmp_path / "one" / "log.jsonl"
    with opened(model, tmp_path) as session:
        say(session, *WORDS[:2])
    path.write_bytes(path.read_bytes().replace(WORDS[0].encode(), WORDS[0].upper().encode()))
    with pytest.raises(SessionError, match="line 2 is damaged"):
        SessionLog.open(tmp_path, "one")


def two_turns(sessions: Path, words: str) -> tuple[Path, list[Turn]]:
    """Write a log of two turns, and return what is in it."""
    with SessionLog.open(sessions, "one") as log:
        log.begin(model="m", reader="r", chunk=4, memory="here")
        for text in ("first", words):
            log.append(Turn(text, "answer", [1, 2], 1, 0, "now"))
        return sessions / "one" / "log.jsonl", list(log.turns)


def test_no_flipped_bit_loses_a_turn(tmp_path: Path) -> None:
    """Bits flip in the last line and at the end of the one before: these were acknowledged, and are damaged, not
    torn."""
    path, turns = two_turns(tmp_path, "last words")
    whole = path.read_bytes()
    begin = len(whole) - len(whole.splitlines(keepends=True)[-1]) - 1

    def read() -> list[Turn] | str:
        try:
            return read_session(tmp_path, "one")[1]
        except SessionError as error:
            return str(error)

    refused = 0
    for index in range(8 * begin, 8 * len(whole)):
        flipped = bytearray(whole)
        flipped[index // 8] ^= 1 << index % 8
        path.write_bytes(flipped)
        found = read()
        assert found == turns or "is damaged" in found  # right in spite of it: in the name of the checksum
        refused += found != turns
    assert refused > 7 * (len(whole) - begin)
    with pytest.raises(SessionError, match="line 3 is damaged"):
        SessionLog.open(tmp_path, "one")
    assert path.read_bytes() == flipped


def test_blocks_that_never_came_to_the_disk_are_cut_off(tmp_path: Path) -> None:
    """Lines that were never acknowledged may have zeros for any of their blocks after a power cut, the first, the
    last."""
    path, turns = two_turns(tmp_path, "w" * 3000)
    whole = path.read_bytes()
    begin = len(whole) - len(whole.splitlines(keepends=True)[-1])
    bounds = [begin, *range(begin // 512 * 512 + 512, len(whole), 512), len(whole)]
    for first, last in ((0, 1), (1, 2), (2, 5), (0, 3), (len(bounds) - 2, len(bounds) - 1), (0, len(bounds) - 1)):
        hole = slice(bounds[first], bounds[last])
        path.write_bytes(whole[: hole.start] + bytes(hole.stop - hole.start) + whole[hole.stop :])
        assert read_session(tmp_path, "one")[1] == turns[:1]
        with pytest.warns(RuntimeWarning, match="unfinished turn cut off"):
            SessionLog.open(tmp_path, "one").close()
        assert path.read_bytes() == whole[:begin]


def test_a_session_begun_but_never_used(tmp_path: Path, model: MemoryModel) -> None:
    SessionLog.open(tmp_path, "one").close()  # killed before its first line
    with pytest.raises(SessionError, match="no session"):
        read_session(tmp_path, "one")
    with opened(model, tmp_path) as session:
        say(session, WORDS[0])


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "x" * 65, "a b"])
def test_names_that_are_no_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="session name"):
        SessionLog.open(tmp_path, name)


# -- turns ------------------------------------------------------------------------------------------------------------


class Dictated(LogitsProcessor):
    """Makes a model write what is wanted."""

    def __init__(self, wanted: list[int]):
        self.wanted = iter(wanted)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, next(self.wanted)] = 0
        return forced


def dictate(session: Session, text: str, written: str, limit: int = 100) -> tuple[Turn, str]:
    """Say a turn in which the model writes `written`; return the turn and what was shown of it."""
    shown: list[str] = []
    wanted = session.model.tokenizer.encode(written, add_special_tokens=False)
    [turn] = say(session, text, on_text=shown.append, logits_processor=[Dictated(wanted)], max_new_tokens=limit)
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
def test_what_ends_an_answer_is_not_part_of_it(model: MemoryModel, tmp_path: Path, written: str, answer: str) -> None:
    with opened(model, tmp_path, window=200) as session:
        turn, shown = dictate(session, "Is it?", written)
        assert turn.answer == shown == answer
        dictate(session, "Sure?", " Yes.</s>")
        text = model.tokenizer.decode(ids(session.log.turns), skip_special_tokens=True)
        kept = written.removesuffix("</s>")
        between = "\nUser:"[len("\nUs") :] if kept.endswith("\nUs") else "" if kept.endswith(":") else "\nUser:"
        assert text == f"User: Is it?\nAssistant:{kept}{between} Sure?\nAssistant: Yes."


def test_an_answer_cut_by_its_limit_goes_on_cleanly(model: MemoryModel, tmp_path: Path) -> None:
    with opened(model, tmp_path, window=200) as session:
        assert dictate(session, "Is it?", " Aye.\nUser:", limit=7)[0].answer == "Aye."
        dictate(session, "Sure?", " Yes.</s>")
        assert "Aye.\nUser: Sure?" in model.tokenizer.decode(ids(session.log.turns))
        check_bank(session)


def test_stopped_by_the_user_is_kept_as_far_as_it_went(model: MemoryModel, tmp_path: Path) -> None:
    asked: list[None] = []
    with opened(model, tmp_path) as session:
        [turn] = say(session, WORDS[0], stopped=lambda: asked.append(None) or len(asked) == 3)  # type: ignore[func-returns-value]
        assert len(turn.ids) - turn.prompt == 3
        say(session, *WORDS)
        check_bank(session)


def fail() -> bool:
    raise OSError("the terminal is gone")


def test_a_turn_that_fails_has_not_taken_place(model: MemoryModel, tmp_path: Path) -> None:
    with opened(model, tmp_path) as session:
        say(session, *WORDS)
        with pytest.raises(OSError, match="terminal"):
            say(session, "x" * 30, stopped=fail)
        check_bank(session, ahead=True)
        say(session, *WORDS)
        check_bank(session)
        assert [turn.text for turn in session.log.turns] == WORDS * 2


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_an_empty_message_is_refused(model: MemoryModel, tmp_path: Path, text: str) -> None:
    with opened(model, tmp_path) as session, pytest.raises(InputError, match="say something"):
        session.say(text)


def test_a_message_longer_than_the_window(model: MemoryModel, tmp_path: Path) -> None:
    text = " ".join(f"word{number}" for number in range(60))
    with opened(model, tmp_path) as session:
        [turn] = say(session, text)
        assert turn.text == text
        assert model.tokenizer.decode(ids(session.log.turns)).startswith(f"<s>User: {text}\nAssistant:")
        check_bank(session)


def test_a_long_message_that_was_cut_off(model: MemoryModel, tmp_path: Path) -> None:
    """Pieces are there, since the beginning of the message has left the window; the next message begins anew."""
    text = " ".join(f"word{number}" for number in range(30))
    with opened(model, tmp_path) as session, pytest.raises(OSError, match="terminal"):
        say(session, text, stopped=fail)
    with opened(model, tmp_path) as session:
        assert all(turn.part for turn in session.log.turns)
        check_bank(session, ahead=True)
        say(session, "hello")
        assert "\nUser: hello\nAssistant:" in model.tokenizer.decode(ids(session.log.turns))
        check_bank(session)


def test_a_model_with_a_chat_template(model_folder: Path, address: str, tmp_path: Path) -> None:
    from .conftest import CHATML

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    with MemoryModel.from_pretrained(str(folder), memory=address, bank=(), chunk=CHUNK, window=200) as model:
        model.model.generation_config.eos_token_id = [1, 3]
        with opened(model, tmp_path) as session:
            assert dictate(session, "Is it?", "Aye.<|im_end|>")[1] == "Aye."
            dictate(session, "Sure?", "Yes.</s>")
            talk = [("user", "Is it?"), ("assistant", "Aye."), ("user", "Sure?")]
            messages = [{"role": role, "content": content} for role, content in talk]
            expected = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert model.tokenizer.decode(ids(session.log.turns)) == f"{expected}Yes."
            check_bank(session)
