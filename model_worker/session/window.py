"""The local window of a session: the tokens that the model has before it, in this process and in the next one.

The window follows from the turns. This file owns the rule that a window is only used as it was after the last turn: it
is kept in the service after each turn, and made again from the tokens of the turns where a turn failed, or where the
kept one is missing, old or of other settings. A turn that was forgotten has no tokens: the window goes on behind it.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

import kvbank
from model_worker.attachment.model_parts import decoder_of
from model_worker.model import MemoryModel, Progress
from model_worker.session.answer import AnswerEnd
from model_worker.session.beginning import Beginning
from model_worker.session.record import SessionRecord
from model_worker.session.turn_memory import TurnMemory
from model_worker.session.window_bytes import window_bytes, window_state
from model_worker.window.cache import MemoryCache
from model_worker.window.encoding import encode_sinks
from model_worker.window.generation import generated
from model_worker.window.stepping import Step
from model_worker.window.tova import TovaRule


@dataclass
class Feeding:
    """Tells how far the feeding of `total` tokens is: `progress` is called before each piece with (done, total)."""

    progress: Progress | None = None
    total: int = 0
    done: int = 0

    def piece(self, count: int) -> None:
        """Note that a piece of so many tokens comes next."""
        if self.progress is not None:
            self.progress(self.done, self.total)
        self.done += count


class SessionWindow:
    """The window of one session.

    size: tokens of the window, as they were asked for. local: the rule by which layers keep some of them. ids: the
    tokens that the cache counts as seen. found: whether the service had a window when it was asked last, whole or not.
    step: makes the forwards of tokens that are written; None: the model does.
    """

    def __init__(
        self,
        beginning: Beginning,
        record: SessionRecord,
        memory: TurnMemory,
        size: int,
        local: TovaRule | None,
    ):
        self._model: MemoryModel = beginning.model
        self._beginning, self._record, self._memory = beginning, record, memory
        self.size, self._local = size, local
        self._cache: MemoryCache | None = None
        self._keeping: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "keep-window")
        self.ids: list[int] = []
        self.found = False
        self._ahead: list[kvbank.Window | None] = []  # what `find` has found, until it is used
        self.step: Step | None = None

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

    @property
    def start(self) -> int:
        """Return the offset of the window's first token in the session: what stands before it has left."""
        return self.cache.columns.first_offset

    def forget(self) -> None:
        """Give the cache up, which may have seen what no turn has, and what it handed over for the bank."""
        self._cache = None
        self._memory.held.clear()

    # -- feeding --------------------------------------------------------------------------------------------------

    def feed(self, ids: Sequence[int], feeding: Feeding | None = None) -> None:
        """Let the model see tokens, in pieces that never make less than a whole chunk leave the window."""
        while ids:
            piece, ids = list(ids[: self._piece]), ids[self._piece :]
            if feeding is not None:
                feeding.piece(len(piece))
            tensor = torch.tensor([piece], device=self._device)
            with torch.no_grad():
                decoder_of(self._model.model)(input_ids=tensor, past_key_values=self.cache, use_cache=True)
            self.ids += piece

    def ask(self, question: Sequence[int], prompt: int) -> None:
        """Recall for the tokens of a question while the `prompt` tokens that come in next are fed; for none: not."""
        self.cache.ask([question], prompt)

    def generate(self, prompt: list[int], end: AnswerEnd, options: dict[str, Any], feeding: Feeding) -> list[int]:
        """Feed `prompt` and what the model writes; return that, without an end token."""
        cache, last = self.cache, prompt
        del self.ids[: cache.count_from_window()]
        while len(last) > (piece := self._piece):
            self.feed(last[:piece], feeding)
            last = last[piece:]
        feeding.piece(len(last))
        ids = torch.tensor([self.ids + last], device=self._device)
        ends = {"eos_token_id": end.end_tokens or None, "pad_token_id": end.pad, "streamer": end.printer}
        criteria = [*(options.get("stopping_criteria") or ()), end]
        out = generated(
            self._model.model,
            {**options, **ends, "stopping_criteria": criteria},
            step=self.step,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
        )
        written = end.cut(out[0, ids.shape[1] :].tolist())
        self.ids += last
        fed = cache.get_seq_length() - len(self.ids)  # generate does not feed the token that it ends with
        self.ids += written[:fed]
        self.feed(written[fed:])
        return written

    def end_turn(self) -> None:
        """Let a chunk end where the last turn ends."""
        self.cache.cuts.add(self._record.tokens)

    @property
    def _piece(self) -> int:
        """Return how many tokens may come in next: a chunk, or what does not make less than a whole chunk leave."""
        chunk, room = self._memory.chunk, self.tokens - self.cache.physical
        return min(chunk, max(room, self.tokens - chunk + 1))

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self._model.model.parameters()).device
        return device

    # -- after the last turn ----------------------------------------------------------------------------------------

    def rebuild(self, progress: Progress | None = None) -> None:
        """Make the window as it was after the last turn: from the service, or from the tokens of the last turns."""
        turns = self._record.turns
        if not self._load():
            kept = turns[-1].kept if turns else 0
            self.make(kept, kept, progress)

    def find(self) -> None:
        """Ask the service for its window, which the next `rebuild` takes: so that nothing waits for it then."""
        self._ahead = [self._read()]

    def _read(self) -> kvbank.Window | None:
        """Return the window that the service has; None where there is none, or none that is whole."""
        self.found = False
        try:
            window = self._record.client.sessions.read_window(self._record.info.session_id)
        except kvbank.NotFound:
            return None
        except kvbank.DataLoss:
            window, self.found = None, True
        self.found = self.found or window is not None
        return window

    def make(self, start: int, kept: int, progress: Progress | None = None) -> None:
        """Make the window from the tokens of the turns, from the offset `start` on.

        kept: chunks that end up to this offset are in the bank, and are not written again. progress: called with
        (tokens done, tokens in all).
        """
        self._memory.held.clear()
        self._memory.kept, self.ids = kept, []
        runs = list(self._runs(start))
        if runs and isinstance(first := runs[0], int):
            start, runs = start + first, runs[1:]
        self._cache = cache = self._fresh(start)
        feeding = Feeding(progress, sum(len(run) for run in runs if not isinstance(run, int)))
        try:
            if start and (sinks := self._first_tokens(start)[: cache.sinks.wanted]):
                encode_sinks(cache, sinks)
            self._follow(start)
            for run in runs:
                if isinstance(run, int):
                    cache.skip(run)
                else:
                    self.feed(run, feeding)
            self._follow(cache.columns.first_offset)
        except BaseException:
            self._cache = None
            raise

    def _runs(self, start: int) -> Iterator[list[int] | int]:
        """Yield the tokens behind an offset that stand together, and how many are gone between them, in order."""
        ids, gone = list[int](), 0
        for turn in self._record.turns:
            end = turn.start + turn.token_count
            if end <= start:
                continue
            if turn.status == "forgotten":
                if ids:
                    yield ids
                ids, gone = [], gone + end - max(start, turn.start)
                continue
            if gone:
                yield gone
            ids, gone = [*ids, *turn.token_ids[max(0, start - turn.start) :]], 0
        if ids or gone:
            yield ids or gone

    def _first_tokens(self, before: int) -> list[int]:
        """Return the first tokens of the session up to an offset, as far as they are there, or its beginning's."""
        ids: list[int] = []
        for turn in self._record.turns:
            if turn.status == "forgotten" or len(ids) >= before:
                break
            ids += turn.token_ids
        return ids[:before] or self._beginning.ids

    def keep(self) -> None:
        """Send the window to the service, in a thread: the next turn need not wait. What fails gives a warning."""
        if self._memory.held:  # a window stands for all before it, and some of that is not in the bank yet
            return
        self.kept()
        record, cache = self._record, self.cache
        data = window_bytes(cache.state())
        self._keeping = self._thread.submit(
            record.client.sessions.keep_window,
            record.info.session_id,
            data,
            epoch=record.lease.epoch,
            turn=record.info.head,
            stamp=self._stamp(cache),
        )

    def kept(self) -> None:
        """Wait until the window of the last turn is in the service, or could not be kept."""
        keeping, self._keeping = self._keeping, None
        if keeping is None:
            return
        try:
            keeping.result()
        except (kvbank.LeaseLost, kvbank.TurnConflict):
            pass  # another worker has its own; or a turn came before the window, and its own window follows
        except kvbank.KVBankError as error:
            text = f"the window was not kept, the next start makes it again: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def close(self) -> None:
        """Wait for what is on its way."""
        self.kept()
        self._thread.shutdown()

    def _fresh(self, start: int) -> MemoryCache:
        cache = MemoryCache(
            self._model.attachment,
            self._memory,
            window=self.size,
            start=start,
            local=self._local,
            sinks=self._beginning.begun_with.sinks,
            ends=self._model.ends,
        )
        cache.cuts |= {end for end in self._record.ends if end > start}
        return cache

    def _stamp(self, cache: MemoryCache) -> str:
        """Return what a window must agree with to be used."""
        memory, attachment = self._memory.memory, self._model.attachment
        last = self._record.turns[-1].key if self._record.turns else ""
        stamp = {"reader": attachment.reader.digest, "turn": last, "tokens": self._record.tokens}
        stamp |= {"window": cache.window, "compressor": memory.compressor.name, "query_tokens": memory.query_tokens}
        stamp |= {"dtype": str(self._model.model.dtype), "plan": repr(attachment.plan), "sinks": cache.sinks.wanted}
        return json.dumps({**stamp, "local": "none" if cache.local is None else cache.local.spec}, sort_keys=True)

    def _load(self) -> bool:
        """Take the window that the service has; return False where it has none for the last turn."""
        self.kept()
        found = self._ahead.pop() if self._ahead else self._read()
        if found is None or found.turn != self._record.info.head:
            return False
        stamp = self._stamp(self._fresh(0))
        if found.stamp != stamp:
            self._tell_of_another_rule(found.stamp, stamp)
            return False
        state = window_state(found.data)
        if state is None:
            return False
        gone = int(state["holes"][:, 1].sum()) if "holes" in state else 0
        start = self._record.tokens - state["ids"].shape[1] - gone
        self._cache = self._fresh(start)
        self._cache.restore(state)
        self._memory.kept, self.ids = start, state["ids"][0].tolist()
        if sum(map(len, self._cache.recents)) < self._memory.recent:
            self._follow(start)
        return True

    def _follow(self, start: int) -> None:
        """Give a window that begins at the offset `start` its recent chunks, as they were stored at first."""
        chunks = self._memory.left_before(start)
        if chunks and len(chunks) >= sum(map(len, self.cache.recents)):  # fewer where the service is away
            self.cache.set_recent([chunks])

    def _tell_of_another_rule(self, found: str, wanted: str) -> None:
        """Warn where the service's window was made under another local rule. found, wanted: stamps."""
        try:
            before, now = (json.loads(stamp) for stamp in (found, wanted))
            was, other = before.pop("local"), now.pop("local")
        except (ValueError, KeyError, AttributeError):
            return
        if was != other and before == now:
            warnings.warn(
                f"session {self._record.info.name!r} was left under the local rule {was} and goes on under {other}: "
                "its window is made again from its turns, without what the other rule had kept",
                RuntimeWarning,
                stacklevel=2,
            )
