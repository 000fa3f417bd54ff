"""A session is one conversation that outlives processes: its turns in the service, a local window, and a bank.

Any worker of the same model goes on with a session, one at a time. This file owns two rules. A turn is in the service,
durable, before anything of it is in the bank: so a killed worker leaves no chunk of a turn that never was. And every
token that leaves the window is in the bank exactly once. (What an unfinished turn pushed out was said before that turn;
it stays in the bank, and is in the window too until it leaves the window again.)

The turns are the truth; window (`window.py`) and bank follow from them. A bank that is not the one which the session
has written is written again from the first token on, and so are chunks that were forgotten because they had attended to
something else that was.
"""

import contextlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self, Unpack, cast

import kvbank
from model_worker.arguments import words
from model_worker.compress import local_rule
from model_worker.embed import Embedder
from model_worker.errors import InputError
from model_worker.model import MemoryModel, Progress
from model_worker.remember.memory import Memory
from model_worker.remember.settings import MemorySettings, changed
from model_worker.session.answer import AnswerEnd, decoded
from model_worker.session.beginning import Beginning
from model_worker.session.decoding import decoding_options
from model_worker.session.kept_trace import kept
from model_worker.session.lease import Lease
from model_worker.session.opening import Opening, SessionOptions, parted
from model_worker.session.record import SessionRecord
from model_worker.session.turn_memory import TurnMemory, end_of
from model_worker.session.window import Feeding, SessionWindow
from model_worker.user_text import encode_between, encode_text, readable
from model_worker.window.chunking import chunks
from model_worker.window.placement import Room
from model_worker.window.recorder import Recorder
from model_worker.window.tova import TovaRule

# The setting of a session that names the bank which has all its chunks, by the bank's uid.
_BANK_UID = "bank_uid"


class Session:
    """A conversation with `model`, made by `open`. It is not for two threads at once.

    Several sessions may share one MemoryModel; each has its own window. why: of so many tokens of an answer one is
    looked at, to keep with its turn why it came; 0: nothing is kept.
    """

    def __init__(
        self, beginning: Beginning, record: SessionRecord, memory: Memory, window: int, local: TovaRule | None = None
    ):
        self.model, self.style = beginning.model, beginning.style
        self.record, self._beginning, self.why = record, beginning, 0
        self.memory = TurnMemory(memory, record)
        self.window = SessionWindow(beginning, record, self.memory, window, local)
        self._bank_uid = ""  # of the session's bank, as it is now

    @classmethod
    def open(
        cls,
        model: MemoryModel,
        *,
        name: str | None = None,
        session_id: str | None = None,
        client: kvbank.Client | None = None,
        window: int | None = None,
        local: str | None = None,
        style: str = "auto",
        progress: Progress | None = None,
        **options: Unpack[SessionOptions],
    ) -> Self:
        """Go on with a session, or begin one, and take its lease, which no other worker can have until `close`.

        name, session_id: which session; neither of them begins one without a name. client: of the service that has it;
        None is the model's own. window, local: local tokens, and the rule by which layers keep some of them, as in
        `MemoryModel`; the model's own by default. A session that was left under another rule goes on with a window made
        from its turns, and warns (RuntimeWarning): tokens that the former rule had kept from outside the window are not
        there. style: see `prompt_format`. progress: called with (tokens done, tokens in all) while a window is made
        from the turns, or the bank written again. options: see `SessionOptions`. Raises kvbank.LeaseHeld where another
        worker has the session, kvbank.SessionNotFound where it is not there and not to be begun; SessionError for
        another model, bank or system prompt than it was begun with; BankMismatch for a bank of another model or
        embedder that is to be read, kvbank.BankNotFound for one that is not there; InputError for settings or a rule
        that make no sense; and what the service raises.

        A bank that the session read before, and that cannot be read now, is told of (RuntimeWarning) and left out.
        """
        session = cls.taken(
            model, name=name, session_id=session_id, client=client, window=window, local=local, style=style, **options
        )
        with contextlib.ExitStack() as failed:
            failed.callback(session.close)
            session.fit(progress)
            failed.pop_all()
        return session

    @classmethod
    def taken(
        cls,
        model: MemoryModel,
        *,
        name: str | None = None,
        session_id: str | None = None,
        client: kvbank.Client | None = None,
        window: int | None = None,
        local: str | None = None,
        style: str = "auto",
        **options: Unpack[SessionOptions],
    ) -> Self:
        """Take the lease of a session and ask for its turns and window, as `open` does; `fit` makes the window then.

        The model does nothing meanwhile, so that others may have it. Arguments and errors: as of `open`.
        """
        asked, memory_options = parted(model, options)
        size, rule = model.window if window is None else window, local_rule(local) or model.local
        connected = client or model.client
        settings = changed(model.settings, memory_options)
        embedder = cast(Embedder, settings.embedder)
        opening = Opening(model, connected, style, asked, _room(model, size, settings), rule, embedder)
        beginning, info = opening.found_or_begun(name, session_id)
        record = SessionRecord(connected, info, Lease(connected, info.session_id, asked.holder))
        with contextlib.ExitStack() as failed:
            failed.callback(record.lease.release)
            record.go_on()
            if not record.turns:
                beginning = opening.begun_anew(beginning, record)
            memory_options.update({"chunk": beginning.begun_with.chunk, "source": info.session_id, "spool": None})
            memory = model.with_bank(info.bank, client=connected, **memory_options)
            memory.others.take((bank for bank in info.reads if bank != info.bank), memory.embedder)
            memory.spool = None  # the turns are the spool: what is not in the bank is made again from them
            session = cls(beginning, record, memory, size, rule)
            session.why = asked.why
            failed.callback(session.window.close)
            session._find_window()
            failed.pop_all()
        return session

    @classmethod
    def begun(
        cls,
        model: MemoryModel,
        *,
        client: kvbank.Client,
        window: int | None = None,
        **options: Unpack[SessionOptions],
    ) -> kvbank.Session:
        """Make a session without turns in the service, to be opened later, and return it. Others: as in `open`."""
        asked, memory_options = parted(model, options)
        settings = changed(model.settings, memory_options)
        embedder, room = cast(Embedder, settings.embedder), _room(model, window or model.window, settings)
        return Opening(model, client, "auto", asked, room, model.local, embedder).found_or_begun(None, None)[1]

    @property
    def info(self) -> kvbank.Session:
        """Return the session as the service said last."""
        return self.record.info

    @property
    def turns(self) -> list[kvbank.Turn]:
        """Return all turns, with their token ids."""
        return list(self.record.turns)

    @property
    def left(self) -> int:
        """Return the offset of the first token of the window: those before it have left."""
        return self.window.start

    def fit(self, progress: Progress | None = None) -> None:
        """Make the window of a session that was `taken`, and its bank again where that has not the session's chunks.

        progress: as of `open`.
        """
        turns = self.record.turns
        if not self._has_chunks:
            self.window.make(0, 0, progress)
            self.record.set(**{_BANK_UID: self._bank_uid})
        elif any(turn.status == "forgotten" for turn in turns) and not self.window.found:
            self._write_again(progress)
        else:
            self.window.rebuild(progress)

    # -- a turn ---------------------------------------------------------------------------------------------------

    def say(
        self,
        text: str,
        *,
        key: str = "",
        items: Sequence[kvbank.Item] | None = None,
        on_text: Callable[[str], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
        stop: Sequence[str] = (),
        progress: Progress | None = None,
        metadata: Callable[[], Mapping[str, str]] = dict,
        **generation: Any,
    ) -> kvbank.Turn:
        """Say something and get the answer; both are durable when this returns.

        key: names the turn; a turn of this key that is there already is returned as it is. items: what the turn says of
        what was said, in the place of `text` as the user's. on_text: called with pieces of the answer as they come.
        stopped: asked at every token; once it returns True the answer ends, and the turn is kept as far as it went.
        stop: texts before which the answer ends. progress: called with (tokens done, tokens in all) before each piece
        that is read; it and `stopped` may wait. metadata: called when the answer is there, for those of its turn.
        generation: options of Hugging Face `generate`, of which max_new_tokens is 256 and temperature 0 (the likeliest
        token) by default; those that a session decides itself, or that a memory cannot keep, raise InputError. When
        this raises, the turn has not taken place, or it is not known whether it has, because the service was lost at
        that moment: the next turn finds out.

        What the memory is asked for is the message alone (of a long one its end), until the answer begins.

        A message longer than the window is recorded in pieces while it is read, since its beginning is remembered
        before its end is read. Control tokens such as `<|im_end|>` in `text` are plain characters. Raises
        kvbank.LeaseLost where another worker has taken the session over meanwhile.
        """
        text, stops = _said(text), words("stop", stop)
        options = decoding_options(self.model, generation)
        with self._attempt(), self._looking() as seen:
            if key and (known := self._known(key)) is not None:
                return known
            whole = self._encode(text)
            feeding = Feeding(progress, len(whole))
            self.window.ask(encode_text(self.model.tokenizer, text), len(whole))
            prompt = self._read_ahead(whole, feeding)
            cached = self._cached
            end = AnswerEnd(self.model, self.style, on_text, stopped, stops)
            written = self.window.generate(prompt, end, options, feeding)
            said = [kvbank.Item("user", text)] if items is None else list(items)
            turn = kvbank.Turn(
                [*said, kvbank.Item("assistant", end.visible(written, last=True))],
                prompt + written,
                prompt_tokens=len(prompt),
                kept=self.memory.kept,
                status="completed" if end.by_itself else "incomplete",
                usage=self._usage(whole, written, cached),
                metadata={**metadata(), **seen()},
                key=key or uuid.uuid4().hex,
            )
            turn = self._commit(turn)
        self.window.keep()
        return turn

    @contextlib.contextmanager
    def _looking(self) -> Iterator[Callable[[], dict[str, str]]]:
        """Look at the answer that the block writes, where that is wanted; yield what returns the metadata that say why
        it came."""
        if not self.why:
            yield dict
            return
        with self.trace(every=self.why) as recorder:
            yield lambda: kept(recorder.trace(), self.info.bank, self._decode).metadata

    def tell(self, text: str, answer: str, *, key: str = "", progress: Progress | None = None) -> kvbank.Turn:
        """Record a turn that took place elsewhere: the model reads message and answer, and writes nothing.

        One of both may be empty. key, progress: as in `say`. Raises what `say` raises.
        """
        answer = readable(answer).strip()
        text = "" if answer and not text else _said(text)
        with self._attempt():
            if key and (known := self._known(key)) is not None:
                return known
            whole = self._encode(text)
            told = encode_text(self.model.tokenizer, self.style.lead + answer) if answer else []
            feeding = Feeding(progress, len(whole) + len(told))
            self.window.ask([], len(whole) + len(told))
            prompt, cached = self._read_ahead(whole, feeding), self._cached
            self.window.feed(prompt + told, feeding)
            turn = kvbank.Turn(
                [kvbank.Item("user", text), kvbank.Item("assistant", answer)],
                prompt + told,
                prompt_tokens=len(prompt),
                kept=self.memory.kept,
                usage=self._usage(whole, told, cached),
                key=key or uuid.uuid4().hex,
            )
            turn = self._commit(turn)
        self.window.keep()
        return turn

    @contextlib.contextmanager
    def _attempt(self) -> Iterator[None]:
        """Let the block have a turn on what the service has; where it raises, the window is made again later."""
        if self.record.go_on():
            self._follow()
        try:
            self._forget_too()
            yield
        except BaseException:
            self.window.forget()
            raise

    def _known(self, key: str) -> kvbank.Turn | None:
        """Return the turn of a key, if the session has it. Raises InputError for one that another session has."""
        found = next((turn for turn in self.record.turns if turn.key == key), None)
        if found is None:
            with contextlib.suppress(kvbank.TurnNotFound), self.record.aside():
                other = self.record.client.sessions.turn(key)
                raise InputError(f"key {key!r} is that of turn {other.number} of session {other.session_id}")
        return found

    def trace(self, *, every: int = 1) -> AbstractContextManager[Recorder]:
        """Record why the answer is what it is, around one `say`; the recorder's `trace()` returns the `Trace`.

        every: look at one in so many tokens of the answer (see `MemoryModel.trace`).
        """
        return self.model.trace(self.window.cache, every=every)

    def _encode(self, text: str) -> list[int]:
        """Return the token ids of a message, with the format's text around it."""
        said, turns = self.record.last_said, self.record.turns
        written = None if said is None else self._decode(said.token_ids[said.prompt_tokens :])
        before, behind = self.style.around(written)
        ids = encode_between(self.model.tokenizer, before, text, behind)
        return ids if turns else self._beginning.ids + ids

    def _read_ahead(self, prompt: list[int], feeding: Feeding) -> list[int]:
        """Read and record what a prompt has beyond one window; return the rest of it."""
        while len(prompt) > self.window.tokens:
            part = next(chunks(prompt, self.window.tokens, self.model.ends))
            prompt = prompt[len(part) :]
            self.window.feed(part, feeding)
            self._commit(kvbank.Turn((), part, prompt_tokens=len(part), kept=self.memory.kept, status="part"))
        return prompt

    def _commit(self, turn: kvbank.Turn) -> kvbank.Turn:
        """Give a turn to the service first, then what it pushed out of the window to the bank; return it as it is."""
        turn = self.record.append(turn)
        self.window.end_turn()
        self.memory.release()
        return turn

    @property
    def _cached(self) -> int:
        """Return how many tokens the next forward attends to that need none of their own."""
        return self.window.cache.physical + self.window.cache.retrieved_tokens

    def _usage(self, prompt: Sequence[int], written: Sequence[int], cached: int) -> dict[str, int]:
        """Return the counts of a turn that is about to be appended. cached: tokens that stood there before it."""
        durable = self.record.tokens + len(prompt) + len(written)
        writes = sum(len(chunk.token_ids) for chunk in self.memory.held if end_of(chunk) <= durable)
        counts = {"prompt_tokens": len(prompt), "output_tokens": len(written)}
        return {**counts, "cached_tokens": cached, "cache_write_tokens": writes}

    def _decode(self, ids: Sequence[int]) -> str:
        return decoded(self.model.tokenizer, ids)

    # -- what was said ----------------------------------------------------------------------------------------------

    def rewind(self, turn: int, progress: Progress | None = None) -> kvbank.Session:
        """Go on behind an earlier turn, 0 for the beginning; return the session.

        The turns behind it stay readable by their keys, and can be forked from. Raises kvbank.TurnNotFound,
        kvbank.LeaseLost.
        """
        with self._attempt():
            self.window.kept()  # a window on its way is of a turn that is the last one until then
            self.record.rewind(turn)
            self._follow()
            self.window.rebuild(progress)
        self.window.keep()
        return self.info

    def fork(
        self, name: str = "", turn: int | None = None, metadata: Mapping[str, str] | None = None
    ) -> kvbank.Session:
        """Begin another session with the turns of this one, up to `turn` (None is the last one), and return it.

        Nothing is copied. Raises kvbank.SessionExists, kvbank.TurnNotFound.
        """
        return self.record.client.sessions.fork(self.info.session_id, name=name, turn=turn, metadata=metadata)

    def forget(self, first: int, last: int | None = None, progress: Progress | None = None) -> kvbank.Receipt:
        """Forget turns for good, from `first` to `last` (None: that one alone), and return the receipt.

        They go here and in all forks. The window is made again without them, and so are chunks that had attended to
        them. Raises kvbank.TurnNotFound.
        """
        with self._attempt():
            self.window.kept()
            receipt = self.record.forget(first, first if last is None else last)
            self._follow()
            self._write_again(progress)
        self.window.keep()
        return receipt

    def _forget_too(self) -> None:
        """Leave nothing of turns that were forgotten elsewhere while this worker had them in its mind.

        What it wrote meanwhile had attended to them: they are forgotten once more, and the window and the chunks behind
        them are made again.
        """
        gone = sorted(self.record.forgotten_meanwhile)
        if not gone:
            return
        for first in (number for number in gone if number - 1 not in gone):
            last = next(number for number in range(first, gone[-1] + 1) if number + 1 not in gone)
            self.record.forget(first, last)
        self._follow()
        self._write_again(None)

    def _follow(self) -> None:
        """Take the turns as they are now, which may be others than before."""
        self.memory.follow()
        self.window.forget()

    def _find_window(self) -> None:
        """Ask the service for what the window is made from: which bank has the chunks, and the window that it has."""
        self._bank_uid = self.record.client.get_bank(self.info.bank).uid
        if not self.record.turns:
            self.record.set(**{_BANK_UID: self._bank_uid})
        if self._has_chunks:
            self.window.find()

    @property
    def _has_chunks(self) -> bool:
        """Tell whether the bank is the one that has the session's chunks."""
        return self.info.settings.get(_BANK_UID) == self._bank_uid

    def _write_again(self, progress: Progress | None) -> None:
        """Make the window, and again the chunks behind the first forgotten turn, which had attended to it.

        The model reads from a window before that turn on.
        """
        turns = self.record.turns
        gone = next((turn.start for turn in turns if turn.status == "forgotten"), self.record.tokens)
        start = max((turn.start for turn in turns if turn.start <= gone - self.window.size), default=0)
        self.window.make(start, gone, progress)

    # -- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let another worker have the session."""
        self.memory.memory.line.wait()
        self.window.close()
        self.record.lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _said(text: object) -> str:
    """Return what is said without blanks at its ends. Raises InputError for none."""
    if not isinstance(text, str):
        raise InputError(f"what is said is a string, not a {type(text).__name__}")
    said = readable(text).strip()
    if not said:
        raise InputError("say something")
    return said


def _room(model: MemoryModel, window: int, settings: MemorySettings) -> Room:
    """Return the positions that window and memory of a session use. settings: of the session's memory."""
    return Room(model.attachment, window, ((settings.top_k or 0) + (settings.recent or 0)) * model.chunk)
