"""The local window of a session: the tokens that the model has before it, in this process and in the next one.

The window follows from the log. This file owns the rule that a window is only used as it was after the last turn: it is
kept in a file after each turn, and made again from the tokens of the log where a turn failed, or where that file is
missing, old or of other settings.
"""

import json
import warnings
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from safetensors import SafetensorError

from model_worker.attachment.model_parts import decoder_of
from model_worker.model import MemoryModel, Progress
from model_worker.session.answer import AnswerEnd
from model_worker.session.log import SessionLog
from model_worker.session.turn_memory import TurnMemory
from model_worker.session.window_file import read_window, window_stamp, write_window
from model_worker.window.cache import MemoryCache
from model_worker.window.chunking import chunks
from model_worker.window.encoding import encode_sinks
from model_worker.window.generation import generated
from model_worker.window.tova import TovaRule

# Entries of a window's stamp; behind them stands the local rule, if there is one, and the number of sinks, if not 0.
_STAMP_WITHOUT_RULE = 8


class SessionWindow:
    """The window of one session.

    size: tokens of the window. local: the rule by which layers keep some of them. ids: the tokens that the cache counts
    as seen.
    """

    def __init__(self, model: MemoryModel, log: SessionLog, memory: TurnMemory, size: int, local: TovaRule | None):
        self._model, self._log, self._memory = model, log, memory
        self._size, self._local = size, local
        self._cache: MemoryCache | None = None
        self.ids: list[int] = []

    @property
    def cache(self) -> MemoryCache:
        """Return the cache of the window, which is made again first where a turn failed."""
        if self._cache is None:
            self.rebuild()
        assert self._cache is not None
        return self._cache

    @property
    def tokens(self) -> int:
        """Return the most tokens that the window holds."""
        assert self.cache.window is not None
        return self.cache.window

    def forget(self) -> None:
        """Give the cache up, which may have seen what the log has not, and what it handed over for the bank."""
        self._cache = None
        self._memory.held.clear()

    # -- feeding --------------------------------------------------------------------------------------------------

    def feed(self, ids: Sequence[int], progress: Progress | None = None, done: int = 0, total: int = 0) -> None:
        """Let the model see tokens, in pieces that never make less than a whole chunk leave the window.

        progress: called before each piece with the tokens done (from `done` on) and `total`.
        """
        for piece in chunks(ids, self._piece):
            if progress is not None:
                progress(done, total)
                done += len(piece)
            tensor = torch.tensor([piece], device=self._device)
            with torch.no_grad():
                decoder_of(self._model.model)(input_ids=tensor, past_key_values=self.cache, use_cache=True)
            self.ids += piece

    def ask(self, question: Sequence[int], prompt: int) -> None:
        """Recall for the tokens of a question while the `prompt` tokens that come in next are fed."""
        self.cache.ask([question], prompt)

    def generate(self, prompt: list[int], end: AnswerEnd, options: dict[str, Any]) -> list[int]:
        """Feed `prompt` and what the model writes; return that, without an end token."""
        cache, last = self.cache, (len(prompt) - 1) % self._piece + 1
        del self.ids[: cache.count_from_window()]
        self.feed(prompt[:-last])
        ids = torch.tensor([self.ids + prompt[-last:]], device=self._device)
        ends = {"eos_token_id": end.end_tokens or None, "pad_token_id": end.pad, "streamer": end.printer}
        criteria = [*(options.get("stopping_criteria") or ()), end]
        out = generated(
            self._model.model,
            {**options, **ends, "stopping_criteria": criteria},
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
        )
        written = end.cut(out[0, ids.shape[1] :].tolist())
        self.ids += prompt[-last:]
        fed = cache.get_seq_length() - len(self.ids)  # generate does not feed the token that it ends with
        self.ids += written[:fed]
        self.feed(written[fed:])
        return written

    def end_turn(self) -> None:
        """Let a chunk end where the last turn of the log ends."""
        self.cache.cuts.add(sum(len(turn.ids) for turn in self._log.turns))

    @property
    def _piece(self) -> int:
        assert self._log.header is not None
        chunk = self._log.header.chunk
        return min(chunk, self.tokens - chunk + 1)

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self._model.model.parameters()).device
        return device

    # -- after the last turn ----------------------------------------------------------------------------------------

    def rebuild(self, from_start: bool = False, progress: Progress | None = None) -> None:
        """Make the window as it was after the last turn: from its file, or from the tokens in the log.

        from_start: feed all tokens of the log, so that the bank is written again.
        """
        turns = self._log.turns
        ids = [token for turn in turns for token in turn.ids]
        self._memory.durable, self.ids = len(ids), []
        if not from_start and self._load(ids):
            return
        start = turns[-1].kept if turns and not from_start else 0
        self._memory.kept = start
        self._cache = cache = self._fresh(start)
        try:
            if first := ids[: min(start, cache.sinks.wanted)]:
                encode_sinks(cache, first)
            self._follow(start)
            self.feed(ids[start:], progress, 0, len(ids) - start)
            self._follow(len(ids) - self._cache.physical)
        except BaseException:
            self._cache = None
            raise

    def keep(self) -> None:
        """Write the window to its file. A disk that does not take it gives a warning."""
        cache = self.cache
        tokens = sum(len(turn.ids) for turn in self._log.turns)
        try:
            write_window(self._log.window, cache.state(), self._stamp(cache, tokens))
        except (OSError, SafetensorError) as error:
            warnings.warn(
                f"the window was not kept, the next start makes it again: {error}", RuntimeWarning, stacklevel=2
            )

    def _fresh(self, start: int) -> MemoryCache:
        assert self._log.header is not None
        size, rule, sinks = self._size, self._local, self._log.header.sinks
        cache = MemoryCache(
            self._model.attachment,
            self._memory,
            window=size,
            start=start,
            local=rule,
            sinks=sinks,
            ends=self._model.ends,
        )
        cache.cuts |= {end for end in accumulate(len(turn.ids) for turn in self._log.turns) if end > start}
        return cache

    def _stamp(self, cache: MemoryCache, tokens: int) -> str:
        """Return what a window on disk must agree with to be used. tokens: of the log that the window is of."""
        header, memory = self._log.header, self._memory.memory
        assert header is not None
        stamp = [header.uid, header.reader, tokens, cache.window, memory.compressor.name, memory.query_tokens]
        stamp += [str(self._model.model.dtype), repr(self._model.attachment.plan)]
        stamp += [] if cache.local is None else [cache.local.spec]
        return json.dumps([*stamp, {"sinks": header.sinks}] if header.sinks else stamp)

    def _load(self, ids: list[int]) -> bool:
        """Take the window from its file; return False where there is none for these tokens of the log."""
        stamp = self._stamp(self._fresh(0), len(ids))
        state = read_window(self._log.window, stamp)
        if state is None:
            self._tell_of_another_rule(stamp)
            return False
        start = len(ids) - state["ids"].shape[1]
        self._cache = self._fresh(start)
        self._cache.restore(state)
        self._memory.kept, self.ids = start, ids[start:]
        if sum(map(len, self._cache.recents)) < self._memory.recent:
            self._follow(start)
        return True

    def _follow(self, start: int) -> None:
        """Give a window that begins at the offset `start` its recent chunks, as they were stored at first."""
        chunks = self._memory.memory.left_before(start)
        if chunks and len(chunks) >= sum(map(len, self.cache.recents)):  # fewer where the service is away
            self.cache.set_recent([chunks])

    def _tell_of_another_rule(self, stamp: str) -> None:
        """Warn where the file's window was made under another local rule than that of `stamp`."""
        assert self._log.header is not None
        name, before, now = self._log.header.name, _rule_of(window_stamp(self._log.window) or stamp), _rule_of(stamp)
        if before != now:
            warnings.warn(
                f"session {name!r} was left under the local rule {before} and goes on under {now}: its "
                "window is made again from the log, without what the other rule had kept",
                RuntimeWarning,
                stacklevel=2,
            )


def _rule_of(stamp: str) -> str:
    """Return the local rule in a window's stamp."""
    rule = [entry for entry in json.loads(stamp)[_STAMP_WITHOUT_RULE:] if isinstance(entry, str)]
    return rule[0] if rule else "none"
