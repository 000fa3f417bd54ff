"""Sessions: one conversation that outlives processes; a durable log, a local window, and a bank of what left it.

This file owns two rules. A turn is in the log, synced, before anything of it is in the bank: so a killed worker leaves
no chunk of a turn that never was. And every token that leaves the window is in the bank exactly once: a chunk is named
by (session, offset, tokens), so what is written again after a crash is a replay. (What an unfinished turn pushed out
was said before it; it stays in the bank, and is in the window too until it leaves that again.)

The log is the truth, window and bank follow from it: the window is kept in a file after each turn, and made again from
the log where that file is missing or old; a bank that is not there is written again from the first token on.
"""

import contextlib
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from safetensors import SafetensorError

import kvbank
from model_worker.arguments import finite, whole
from model_worker.attachment.model_parts import decoder_of
from model_worker.compress import local_rule
from model_worker.errors import InputError, SessionError
from model_worker.model import MemoryModel, Progress
from model_worker.remember.chunking import chunks
from model_worker.remember.memory import Memory
from model_worker.remember.service_link import START_S
from model_worker.remember.spool import Spool
from model_worker.session.answer import AnswerEnd, decoded
from model_worker.session.epoch import BankEpoch
from model_worker.session.log import Header, SessionLog, Turn, now
from model_worker.session.prompt import PromptFormat, prompt_format
from model_worker.session.window_file import read_window, window_stamp, write_window
from model_worker.user_text import encode_between, readable
from model_worker.window.cache import MemoryCache
from model_worker.window.capture import Captured
from model_worker.window.generation import generated, generation_options, plain_decoding
from model_worker.window.local import TovaRule
from model_worker.window.recalled import RecalledChunk

# Entries of a window's stamp; the local rule follows, where there is one.
_STAMP_WITHOUT_RULE = 8


class Session:
    """A conversation with `model`. Made by `open`; not for two threads at once.

    Several sessions may share one MemoryModel; each has its own window and bank.
    """

    def __init__(
        self,
        model: MemoryModel,
        log: SessionLog,
        memory: Memory,
        window: int,
        style: PromptFormat,
        local: TovaRule | None = None,
    ):
        assert log.header is not None
        self.model, self.log, self.header, self.style = model, log, log.header, style
        self.memory = _TurnMemory(memory)
        self._epoch = BankEpoch(model.client, log.header.bank, log.epoch)
        self._window, self._local = window, local
        self._cache: MemoryCache | None = None
        self._ids: list[int] = []  # what the cache counts as seen

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
        **memory_options: Any,
    ) -> Self:
        """Begin the session of `log` or go on with it; the session closes `log`, and so does a failure here.

        name, target: how model and service are called, noted in a new log. window, local: local tokens, and the rule by
        which layers keep some of them, as in `MemoryModel`; the model's own by default. A session that was left under
        another rule goes on with a window made from the log, and warns (RuntimeWarning): what the rule had kept of what
        left the window is not there. style: see `prompt_format`. progress: called with (tokens done, tokens in all)
        while a window is made from the log, or the bank written again. memory_options: as in `Memory`. Raises
        SessionError for another model than it was begun with, and where the bank belongs to another copy of the
        session's folder; InputError for a rule that there is not.
        """
        with contextlib.ExitStack() as failed:
            failed.callback(log.close)
            found, rule = prompt_format(style, model.tokenizer, model.model.config), local_rule(local) or model.local
            digest = model.attachment.reader.digest
            header = log.header or log.begin(model=name, reader=digest, chunk=model.chunk, memory=target)
            if header.reader != digest:
                raise SessionError(
                    f"session {header.name!r} was begun with model {header.model} (reader {header.reader}), this one "
                    f"is {name or 'another'} (reader {digest})"
                )
            from_start = bool(log.turns) and (log.rewriting.exists() or _bank_is_gone(model.client, header))
            if from_start:
                log.rewriting.touch()
            memory = model.with_bank(
                header.bank,
                chunk=header.chunk,
                source=header.uid,
                spool=Spool(log.spool),
                metadata={"session": header.name},
                **memory_options,
            )
            session = cls(model, log, memory, model.window if window is None else window, found, rule)
            session._epoch.claim(max(START_S, memory.link.patience))
            memory.deliver_spooled()
            session._rebuild(from_start, progress)
            log.rewriting.unlink(missing_ok=True)
            failed.pop_all()
            return session

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

        on_text: called with pieces of the answer as they come. stopped: asked at every token; when it says so the
        answer ends there, and the turn is kept as far as it went. progress: called with (tokens done, tokens in all)
        while a message longer than a chunk is read. temperature 0 is greedy. generation: options of
        Hugging Face `generate`; those that a session decides itself, or that a memory cannot keep, raise InputError.
        When this raises, the turn has not taken place, unless `log.turns` has it (a service lost after that, with
        `strict`). A message longer than the window is recorded in pieces while it is read, since its beginning is
        remembered before its end is read. Control tokens such as `<|im_end|>` in `text` are plain characters.
        """
        if not isinstance(text, str):
            raise InputError(f"what is said is a string, not a {type(text).__name__}")
        text = readable(text).strip()
        if not text:
            raise InputError("say something")
        limit = whole("max_new_tokens", max_new_tokens)
        options = self._options(limit, finite("temperature", temperature), generation)
        self._claim()
        try:
            prompt = self._read_ahead(self._encode(text), progress)
            end = AnswerEnd(self.model, self.style, on_text, stopped)
            written = self._generate(prompt, end, options)
            answer = self.style.answer(self._decode(written))
            turn = Turn(text, answer, prompt + written, len(prompt), self.memory.kept, now())
            self._commit(turn)
        except BaseException:
            self._cache = None  # it may have seen what the log has not
            self.memory.held.clear()
            raise
        self._keep_window()
        return turn

    def _options(self, limit: int, temperature: float, given: dict[str, Any]) -> dict[str, Any]:
        """Options of `generate`. A turn's way of decoding and its length are the session's, not the checkpoint's."""
        if temperature < 0:
            raise InputError(f"temperature is 0 or more, not {temperature}")
        least = given.get("min_new_tokens", self.model.model.generation_config.min_new_tokens)
        own = {
            "max_new_tokens": limit,
            "min_new_tokens": None if least is None else min(whole("min_new_tokens", least, least=0), limit),
            **dict.fromkeys(("max_length", "min_length")),  # they count what was said before, as far as the window goes
            **{name: value for name, value in plain_decoding().items() if name not in given},
        }
        if temperature > 0:
            own |= {"do_sample": True, "temperature": temperature}
        else:
            own |= {"do_sample": False, **dict.fromkeys(("temperature", "top_p", "top_k"))}
        asked = {name: value for name, value in given.items() if name != "min_new_tokens"}
        taken = [name for name in ("streamer", "eos_token_id", "pad_token_id") if name in asked]
        if taken:
            raise InputError(f"option {taken[0]} cannot be given here: a session ends and shows its answers itself")
        return generation_options(self.model.model, self.model.tokenizer, asked, own=own)

    def _encode(self, text: str) -> list[int]:
        said = next((turn for turn in reversed(self.log.turns) if not turn.part), None)
        written = None if said is None else self._decode(said.ids[said.prompt :])
        if self.log.turns and self.log.turns[-1].part:
            written = ""  # a message was cut off by a crash, nothing was answered
        before, behind = self.style.around(written)
        ids = encode_between(self.model.tokenizer, before, text, behind)
        if self.log.turns or not self.style.begin:
            return ids
        first = self.model.tokenizer.encode("a")[:1]
        return (first if first == [self.model.tokenizer.bos_token_id] else []) + ids

    def _claim(self) -> None:
        """Say nothing into a bank that another copy of this session has taken over; one that is away is not asked."""
        if self.memory.memory.link.away:
            return
        with contextlib.suppress(kvbank.ServiceError):  # what is wrong shows, and is told, when a chunk is written
            self._epoch.claim(self.memory.memory.link.patience)

    def _read_ahead(self, prompt: list[int], progress: Progress | None) -> list[int]:
        """Read and record what a prompt has beyond one window; returns the rest."""
        total = len(prompt)
        while len(prompt) > self._cache_now.window:  # type: ignore[operator]
            part, prompt = prompt[: self._cache_now.window], prompt[self._cache_now.window :]
            self._feed(part, progress, total - len(prompt) - len(part), total)
            self._commit(Turn("", "", part, len(part), self.memory.kept, now(), part=True))
        return prompt

    def _generate(self, prompt: list[int], end: AnswerEnd, options: dict[str, Any]) -> list[int]:
        """Feed `prompt` and what the model writes; returns that, without an end token."""
        cache, last = self._cache_now, (len(prompt) - 1) % self._piece + 1
        del self._ids[: cache.count_from_window()]
        self._feed(prompt[:-last])
        ids = torch.tensor([self._ids + prompt[-last:]], device=next(self.model.model.parameters()).device)
        ends = {"eos_token_id": end.end_tokens or None, "pad_token_id": end.pad, "streamer": end.printer}
        criteria = [*(options.get("stopping_criteria") or ()), end]
        out = generated(
            self.model.model,
            {**options, **ends, "stopping_criteria": criteria},
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
        )
        written = end.cut(out[0, ids.shape[1] :].tolist())
        self._ids += prompt[-last:]
        fed = cache.get_seq_length() - len(self._ids)  # generate does not feed the token that it ends with
        self._ids += written[:fed]
        self._feed(written[fed:])
        return written

    def _feed(self, ids: Sequence[int], progress: Progress | None = None, done: int = 0, total: int = 0) -> None:
        """Let the model see tokens, in pieces that never make less than a whole chunk leave the window."""
        for piece in chunks(ids, self._piece):
            if progress is not None:
                progress(done, total)
                done += len(piece)
            tensor = torch.tensor([piece], device=next(self.model.model.parameters()).device)
            with torch.no_grad():
                decoder_of(self.model.model)(input_ids=tensor, past_key_values=self._cache_now, use_cache=True)
            self._ids += piece

    def _commit(self, turn: Turn) -> None:
        """The turn to the log first, then what it pushed out of the window to the bank."""
        self.log.append(turn)
        self.memory.release(sum(len(turn.ids) for turn in self.log.turns))

    @property
    def _cache_now(self) -> MemoryCache:
        if self._cache is None:  # a turn failed
            self._rebuild()
        assert self._cache is not None
        return self._cache

    @property
    def _piece(self) -> int:
        assert self._cache_now.window is not None
        return min(self.header.chunk, self._cache_now.window - self.header.chunk + 1)

    def _decode(self, ids: Sequence[int]) -> str:
        return decoded(self.model.tokenizer, ids)

    # -- the window -----------------------------------------------------------------------------------------------

    @property
    def left(self) -> int:
        """Tokens that have left the window."""
        return sum(len(turn.ids) for turn in self.log.turns) - self._cache_now.physical

    def _rebuild(self, from_start: bool = False, progress: Progress | None = None) -> None:
        """Make the window as it was after the last turn: from its file, or from the tokens in the log."""
        ids = [token for turn in self.log.turns for token in turn.ids]
        self.memory.durable, self._ids = len(ids), []
        if not from_start and self._load_window(ids):
            return
        start = self.log.turns[-1].kept if self.log.turns and not from_start else 0
        self.memory.kept = start
        self._cache = self._fresh(start)
        try:
            self._feed(ids[start:], progress, 0, len(ids) - start)
        except BaseException:
            self._cache = None
            raise

    def _fresh(self, start: int) -> MemoryCache:
        return MemoryCache(self.model.attachment, self.memory, window=self._window, start=start, local=self._local)

    def _stamp(self, cache: MemoryCache, tokens: int) -> str:
        """What a window on disk must agree with to be used."""
        memory = self.memory.memory
        stamp = [self.header.uid, self.header.reader, tokens, cache.window, memory.compressor.name, memory.query_tokens]
        stamp += [str(self.model.model.dtype), repr(self.model.attachment.plan)]
        return json.dumps(stamp if cache.local is None else [*stamp, cache.local.spec])

    def _keep_window(self) -> None:
        cache = self._cache_now
        try:
            write_window(self.log.window, cache.state(), self._stamp(cache, sum(len(t.ids) for t in self.log.turns)))
        except (OSError, SafetensorError) as error:
            warnings.warn(
                f"the window was not kept, the next start makes it again: {error}", RuntimeWarning, stacklevel=2
            )

    def _load_window(self, ids: list[int]) -> bool:
        stamp = self._stamp(self._fresh(0), len(ids))
        state = read_window(self.log.window, stamp)
        if state is None:
            self._tell_of_another_rule(stamp)
            return False
        start = len(ids) - state["ids"].shape[1]
        self._cache = self._fresh(start)
        self._cache.restore(state)
        self.memory.kept, self._ids = start, ids[start:]
        return True

    def _tell_of_another_rule(self, stamp: str) -> None:
        before, now_ = _rule_of(window_stamp(self.log.window) or stamp), _rule_of(stamp)
        if before != now_:
            warnings.warn(
                f"session {self.header.name!r} was left under the local rule {before} and goes on under {now_}: its "
                "window is made again from the log, without what the other rule had kept",
                RuntimeWarning,
                stacklevel=2,
            )

    # -- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let another process have the session. What still waits for the service goes with the next start."""
        self.log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _TurnMemory:
    """The memory of a session's cache: holds back what belongs to a turn that is not in the log yet.

    durable: tokens in the log. kept: tokens that are safe in the bank or its spool. held: what waits for the log.
    """

    def __init__(self, memory: Memory):
        self.memory = memory
        self.chunk, self.cadence, self.needs_queries = memory.chunk, memory.cadence, memory.needs_queries
        self.query, self.query_tokens = memory.query, memory.query_tokens
        self.durable = self.kept = 0
        self.held: list[Captured] = []

    def recall(self, rows: Sequence[Sequence[int]]) -> list[list[RecalledChunk]] | None:
        return self.memory.recall(rows)

    def remember(self, rows: Sequence[Captured | None]) -> None:
        self.held += [row for row in rows if row is not None]
        self.release(self.durable)

    def release(self, durable: int) -> None:
        """The log has `durable` tokens now; keep what it covers."""
        self.durable = durable
        while self.held and self.held[0].start + len(self.held[0]) <= durable:
            self.memory.remember([self.held[0]])
            captured = self.held.pop(0)
            self.kept = captured.start + len(captured)


def _rule_of(stamp: str) -> str:
    """The local rule of a window's stamp."""
    rule = json.loads(stamp)[_STAMP_WITHOUT_RULE:]
    return str(rule[0]) if rule else "none"


def _bank_is_gone(client: kvbank.Client, header: Header) -> bool:
    with contextlib.suppress(kvbank.BankNotFound):
        client.get_bank(header.bank, timeout=START_S)
        return False
    return True
