"""A session is one conversation that outlives processes: a durable log, a local window, and a bank of what left it.

This file owns two rules. A turn is in the log, synced, before anything of it is in the bank: so a killed worker leaves
no chunk of a turn that never was. And every token that leaves the window is in the bank exactly once: a chunk is named
by (session, offset, tokens), so what is written again after a crash is a replay. (What an unfinished turn pushed out
was said before that turn; it stays in the bank, and is in the window too until it leaves the window again.)

The log is the truth; window (`window.py`) and bank follow from it. A bank that is not there is written again from the
first token on.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self, Unpack, cast

import kvbank
from model_worker.compress import local_rule
from model_worker.errors import InputError
from model_worker.model import MemoryModel, Progress
from model_worker.remember.memory import Memory
from model_worker.remember.service_link import START_S
from model_worker.remember.settings import MemoryOptions, MemorySettings, changed, check_names
from model_worker.remember.spool import Spool
from model_worker.session.answer import AnswerEnd, decoded
from model_worker.session.beginning import Asked, Beginning
from model_worker.session.decoding import decoding_options
from model_worker.session.epoch import BankEpoch
from model_worker.session.log import SessionLog
from model_worker.session.log_format import Header, Turn, now
from model_worker.session.turn_memory import TurnMemory
from model_worker.session.window import SessionWindow
from model_worker.user_text import encode_between, encode_text, readable
from model_worker.window.chunking import chunks
from model_worker.window.placement import Room
from model_worker.window.recorder import Recorder
from model_worker.window.tova import TovaRule

# Settings of its memory that a session decides itself.
_OWN = ("chunk", "source", "spool", "metadata")


class SessionOptions(MemoryOptions, total=False):
    """What a session is opened with besides its model and its window: settings of its memory, and what it begins with.

    system: stands before the first turn, as the chat template has it; its tokens stay for good, as sinks do. bank: the
    name of the bank that a new session makes for itself. A session keeps both as it was begun. None: those, or no
    system prompt, and a bank that is called by the session. embed, adapter: how the model's embedder is called, and
    the folder of its adapter, which are noted in a new log, so that the next process can make the same.
    """

    system: str | None
    bank: str | None
    embed: str
    adapter: str


class Session:
    """A conversation with `model`, made by `open`. It is not for two threads at once.

    Several sessions may share one MemoryModel; each has its own window and bank.
    """

    def __init__(self, beginning: Beginning, memory: Memory, window: int, local: TovaRule | None = None):
        self.model, self.log, self.style = model, log, _ = beginning.model, beginning.log, beginning.style
        assert log.header is not None
        self.header, self._beginning = log.header, beginning
        self.memory = TurnMemory(memory)
        self.window = SessionWindow(model, log, self.memory, window, local)
        self._epoch = BankEpoch(model.client, log.header.bank, log.epoch)

    @classmethod
    def open(
        cls,
        model: MemoryModel,
        log: SessionLog,
        *,
        name: str = "",
        target: str = "",
        window: int | None = None,
        local: str | None = None,
        style: str = "auto",
        progress: Progress | None = None,
        **options: Unpack[SessionOptions],
    ) -> Self:
        """Begin the session of `log`, or go on with it. `log` is closed with the session, and by a failure here.

        name, target: how model and service are called, noted in a new log. window, local: local tokens, and the rule by
        which layers keep some of them, as in `MemoryModel`; the model's own by default. A session that was left under
        another rule goes on with a window made from the log, and warns (RuntimeWarning): tokens that the former rule
        had kept from outside the window are not there. style: see `prompt_format`. progress: called with (tokens done,
        tokens in all) while a window is made from the log, or the bank written again. options: what the session begins
        with, and fields of `MemorySettings` in which its memory differs from the model's. Raises SessionError for
        another model, bank or system prompt than the session was begun with, for a bank that is not the session's, and
        where the bank belongs to another copy of the session's folder; InputError for settings or a rule that make no
        sense.
        """
        with contextlib.ExitStack() as failed:
            failed.callback(log.close)
            asked, memory_options = _parted(options)
            if model.settings.recall == "reread":
                raise InputError('a session attends to its memory; recall="reread" is for generate')
            size, rule = model.window if window is None else window, local_rule(local) or model.local
            beginning = Beginning.of(model, log, style, asked)
            room = _room(model, size, memory_options)
            sinks = beginning.sinks(size, rule, room)
            header = beginning.header(name, target, sinks)
            gone = beginning.bank_is_gone(header)
            from_start = bool(log.turns) and (gone or log.rewriting.exists())
            if from_start:
                log.rewriting.touch()
            memory_options.update(_own(header, log))
            memory = model.with_bank(header.bank, **memory_options)
            session = cls(beginning, memory, size, rule)
            session._epoch.claim(max(START_S, memory.link.patience))
            memory.deliver_spooled()
            session.window.rebuild(from_start, progress)
            log.rewriting.unlink(missing_ok=True)
            failed.pop_all()
            return session

    @property
    def left(self) -> int:
        """Return the number of tokens that have left the window."""
        return sum(len(turn.ids) for turn in self.log.turns) - self.window.cache.physical

    # -- a turn ---------------------------------------------------------------------------------------------------

    def say(
        self,
        text: str,
        *,
        on_text: Callable[[str], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
        progress: Progress | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        **generation: Any,
    ) -> Turn:
        """Say something and get the answer; both are durable when this returns.

        on_text: called with pieces of the answer as they come. stopped: asked at every token; once it returns True the
        answer ends, and the turn is kept as far as it went. progress: called with (tokens done, tokens in all) while a
        message longer than a chunk is read. temperature: 0 takes the likeliest token. generation: options of Hugging
        Face `generate`; those that a session decides itself, or that a memory cannot keep, raise InputError. When this
        raises, the turn has not taken place, unless `log.turns` has it (a service lost after that, with `strict`).

        What the memory is asked for is the message alone (of a long one its end), until the answer begins.

        A message longer than the window is recorded in pieces while it is read, since its beginning is remembered
        before its end is read. Control tokens such as `<|im_end|>` in `text` are plain characters.
        """
        if not isinstance(text, str):
            raise InputError(f"what is said is a string, not a {type(text).__name__}")
        text = readable(text).strip()
        if not text:
            raise InputError("say something")
        options = decoding_options(self.model, max_new_tokens, temperature, generation)
        self._claim()
        try:
            prompt = self._encode(text)
            self.window.ask(encode_text(self.model.tokenizer, text), len(prompt))
            prompt = self._read_ahead(prompt, progress)
            end = AnswerEnd(self.model, self.style, on_text, stopped)
            written = self.window.generate(prompt, end, options)
            answer = self.style.answer(self._decode(written))
            turn = Turn(text, answer, prompt + written, len(prompt), self.memory.kept, now())
            self._commit(turn)
        except BaseException:
            self.window.forget()
            raise
        self.window.keep()
        return turn

    def trace(self, *, every: int = 1) -> AbstractContextManager[Recorder]:
        """Record why the answer is what it is, around one `say`; the recorder's `trace()` returns the `Trace`.

        every: look at one in so many tokens of the answer (see `MemoryModel.trace`).
        """
        return self.model.trace(self.window.cache, every=every)

    def _encode(self, text: str) -> list[int]:
        """Return the token ids of a message, with the format's text around it."""
        said = next((turn for turn in reversed(self.log.turns) if not turn.part), None)
        written = None if said is None else self._decode(said.ids[said.prompt :])
        if self.log.turns and self.log.turns[-1].part:
            written = ""  # a message was cut off by a crash, and has no answer
        before, behind = self.style.around(written)
        ids = encode_between(self.model.tokenizer, before, text, behind)
        return ids if self.log.turns else self._beginning.ids + ids

    def _claim(self) -> None:
        """Refuse a turn whose bank another copy of this session has taken over; a bank that is away is not asked.

        Raises SessionError.
        """
        if self.memory.memory.link.away:
            return
        with contextlib.suppress(kvbank.ServiceError):  # what is wrong shows, and is told, when a chunk is written
            self._epoch.claim(self.memory.memory.link.patience)

    def _read_ahead(self, prompt: list[int], progress: Progress | None) -> list[int]:
        """Read and record what a prompt has beyond one window; return the rest of it."""
        total = len(prompt)
        while len(prompt) > self.window.tokens:
            part = next(chunks(prompt, self.window.tokens, self.model.ends))
            prompt = prompt[len(part) :]
            self.window.feed(part, progress, total - len(prompt) - len(part), total)
            self._commit(Turn("", "", part, len(part), self.memory.kept, now(), part=True))
        return prompt

    def _commit(self, turn: Turn) -> None:
        """Write a turn to the log first, then what the turn pushed out of the window to the bank."""
        self.log.append(turn)
        self.window.end_turn()
        self.memory.release(sum(len(turn.ids) for turn in self.log.turns))

    def _decode(self, ids: list[int]) -> str:
        return decoded(self.model.tokenizer, ids)

    # -- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the log, so that another process can have the session.

        Chunks that still wait for the service are delivered at the next start.
        """
        self.log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _parted(options: SessionOptions) -> tuple[Asked, MemoryOptions]:
    """Return what a session is asked to begin with, and the settings of the memory.

    Raises InputError for names that are no settings, and for settings that a session decides itself.
    """
    asked: dict[str, Any] = dict(options)
    system, bank, embed, adapter = (asked.pop(name, None) for name in ("system", "bank", "embed", "adapter"))
    if system is not None and not isinstance(system, str):
        raise InputError(f"system is a string, not a {type(system).__name__}")
    check_names(MemorySettings, asked)
    if taken := [name for name in _OWN if name in asked]:
        raise InputError(f"setting {taken[0]} cannot be given here: a session decides it itself")
    return Asked(system, bank, embed or "", adapter or ""), cast(MemoryOptions, asked)


def _room(model: MemoryModel, window: int, asked: MemoryOptions) -> Room:
    """Return the positions that window and memory of a session use; what is asked for replaces the model's settings."""
    settings = changed(model.settings, asked)
    return Room(model.attachment, window, ((settings.top_k or 0) + (settings.recent or 0)) * model.chunk)


def _own(header: Header, log: SessionLog) -> MemoryOptions:
    """Return the settings of a session's memory that the session decides itself."""
    return {
        "chunk": header.chunk,
        "source": header.uid,
        "spool": Spool(log.spool),
        "metadata": {"session": header.name},
    }
