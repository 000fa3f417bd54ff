"""The cache of a model with memory: the order of one forward over a bounded local context.

Each forward makes room (what leaves the window is remembered), recalls, rebases and attends. The decoder's pre-hook
calls `before_forward`, so the order also holds inside `generate()`. Which tokens stand in the window and where is said
by columns.py, what was recalled into it by recalled.py, what each layer holds by local.py, and which tokens stay for
good by sinks.py.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from model_worker.arguments import whole
from model_worker.attachment.attachment import Attachment
from model_worker.attachment.hf_caches import Cache
from model_worker.attachment.model_parts import device_of
from model_worker.attachment.rope import check_below
from model_worker.attachment.view import ForwardState, not_compiled
from model_worker.errors import InputError
from model_worker.window.ahead import Ahead, Asked
from model_worker.window.cache_view import CacheView
from model_worker.window.capture import Captured, LayerCapture
from model_worker.window.chunking import chunks
from model_worker.window.columns import Columns
from model_worker.window.local import LocalLayer
from model_worker.window.memory_port import Begun, MemoryPort
from model_worker.window.queries import Queries
from model_worker.window.recalled import Recalled, RecalledChunk
from model_worker.window.recents import Recents
from model_worker.window.recorder import Recorder
from model_worker.window.sinks import Sinks, sinks_of
from model_worker.window.tova import TovaLayer, TovaRule
from model_worker.window.traced_view import TracedView

_FOLLOWING = -1  # stands for the tokens that follow those of a window


class MemoryCache(Cache, ForwardState):
    """A bounded local context with a memory, passed as `past_key_values`.

    One object serves one batch of conversations, and not two threads at once.

    memory: where to remember and recall; None for a plain bounded window (or for memory set by hand).
    window: local tokens kept, at least one chunk; None for no bound. The oldest chunk leaves when the next tokens would
    not fit. A prompt fed in one call attends to itself in full, whatever the window: feed it in chunks.
    Sliding-window layers bound the window to theirs, since what leaves it is remembered for them too; without a memory
    they do so only where all layers have one. start: offset of the first token in its source, when a
    conversation goes on whose earlier tokens are in the bank already.
    local: None to attend to the window, or the rule by which each layer keeps m tokens of whatever age (TOVA). Chunks
    still leave for the memory with the window, so that both are bounded; old tokens keep their distance, as in the
    paper, also beyond the trained length.
    sinks: the first so many tokens of the stream stay for good: when they leave the window, all layers go on attending
    to them, just before what follows them. They do not count in `window`. None: what the model was made for, else 4;
    none with a local rule, whose paper has none.
    ends: tokens that end a sentence. A chunk that leaves ends behind one of them where it can (see `chunking`); by
    default, and in a batch, a chunk has the memory's length.
    Raises InputError for a window smaller than a chunk, and for a local rule on a model with sliding-window layers, or
    one that has no room for the sinks.
    """

    attachment: Attachment
    layers: list[LocalLayer]

    def __init__(
        self,
        attachment: Attachment,
        memory: MemoryPort | None = None,
        *,
        window: int | None = None,
        start: int = 0,
        local: TovaRule | None = None,
        sinks: int | None = None,
        ends: Collection[int] = frozenset(),
    ):
        sliding = [r.sliding_window for r in attachment.reports if r.sliding_window]
        if sliding and local is not None:
            raise InputError("a model with sliding-window layers keeps its window; it takes no local rule")
        own = 0 if local is not None and sinks is None else sinks_of(sinks, attachment, window, local)
        self.sinks = Sinks(own)
        if sliding and (memory is not None or len(sliding) == len(attachment.reports)):
            window = min([*sliding, *([window] if window is not None else [])])
        smallest = 1 if memory is None else memory.chunk
        if window is not None and window < smallest:
            raise InputError(f"the window of {window} tokens is smaller than a chunk of {smallest}")
        super().__init__(layers=[LocalLayer() if local is None else TovaLayer(local) for _ in attachment.reports])
        self.attachment, self.memory, self.window, self.local = attachment, memory, window, local
        self.columns, self._queries, self._ahead = Columns(start), Queries(memory), Ahead(memory)
        self.recalled = Recalled(attachment, self.sinks)
        self._recents = Recents(0 if memory is None else memory.recent)
        self._ends = frozenset(ends)
        self.recorder: Recorder | None = None
        self.cuts: set[int] = set()
        """Offsets in the source before which a chunk ends, however short it is; for one row."""
        self._alone = False  # whether the window holds one chunk whose forward saw no local token before it

    # -- one forward ----------------------------------------------------------------------------------------------

    def before_forward(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Make room, recall, rebase; return the decoder's keywords with shifted positions and the view.

        Raises InputError for input that does not go on from what was fed, ReaderChanged for another model.
        """
        ids = kwargs.get("input_ids")
        if ids is None:
            raise InputError("a model with memory needs input_ids: embeddings cannot be remembered")
        self._check_whole()
        if self.memory is not None:
            self.attachment.check_forward(ids.shape[1])
        columns = self.columns
        mask, given = kwargs.get("attention_mask"), kwargs.get("position_ids")
        valid, logical = columns.new(ids, mask, given, self.get_seq_length())
        following = columns.following(valid, logical)
        self._make_room(ids.shape[1])
        self._recall(ids, valid)
        self._rebase(logical, valid)
        positions = logical - columns.shift
        limit = self.attachment.rotation_limit
        if limit is not None:
            check_below(limit, positions[valid])
        self._note_alone(ids.shape[1])
        prompt = self._queries.in_prompt or ids.shape[1] > 1
        columns.append(ids, valid, positions, following)
        self._queries.append(ids, valid)
        retrieved = self.recalled.retrieved(columns)
        waiting = None if self.local is None else self.sinks.waiting(columns)
        made = (self.attachment, self.layers, self.memory, retrieved, positions, valid, waiting)
        run = None if self.recorder is None else self.recorder.run(self.recalled, columns, prompt)
        view = CacheView(*made) if run is None else TracedView(*made).traced(run, self._waiting_sinks())
        return {**kwargs, "position_ids": positions, "kvbank": view}

    @not_compiled
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if self.layers[layer_idx].physical + key_states.shape[2] != self.columns.count:
            raise InputError("this cache is used without its memory: the model was detached, or it is another one")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check_whole(self) -> None:
        """Raise InputError after a forward that failed half-way.

        Such a forward leaves layers of different lengths, whose K-V must neither be attended to nor kept.
        """
        if any(layer.physical != self.columns.count for layer in self.layers):
            raise InputError("a forward with this cache failed; start a new one")

    def _make_room(self, new: int) -> None:
        """Let the oldest tokens leave, in chunks, until `new` ones fit into the window."""
        if self.window is None:
            return
        while self.physical and (excess := self.physical + new - self.window) > 0:
            leaving = excess if self.memory is None else self._oldest_chunk(self.memory.chunk, goes_on=True)
            self._leave(min(leaving, self.physical))
        self._follow()

    def _recall(self, ids: Tensor, valid: Tensor) -> None:
        """Recall for the new tokens where that is due, and ask ahead for those behind them where that is due soon."""
        if ids.shape[1] > 1 or self._queries.in_prompt:
            self._ahead.drop()
        queries = self._queries.due(ids, valid)
        if queries and self.memory is not None:
            asked = self._ahead.take() or self._asked_now(self.memory, queries)
            found = asked.answer()
            self._queries.recalled()
            if self.recorder is not None:
                self.recorder.recalled(asked.rows, found is not None)
            if found is not None:
                self.set_memory(found)
        if coming := self._queries.soon(ids, valid, self._ahead.tokens):
            self._ahead.ask(coming, self.recents or None)

    def _asked_now(self, memory: MemoryPort, queries: list[list[int]]) -> Asked:
        """Return a question that is put to the memory when its answer is taken."""
        recent = self.recents
        return Asked(queries, lambda: memory.recall(queries, recent) if recent else memory.recall(queries))

    def _rebase(self, logical: Tensor, valid: Tensor) -> None:
        """Shift positions back when the next ones would leave the trained length; distances stay as they are.

        An empty window starts at 0 again, so that a chunk encoded alone does not depend on where it stood.
        """
        columns = self.columns
        if self.window is None or not bool(valid.any()):
            return
        if not self.layers[0].held:
            columns.shift = int(logical[valid].min())
            return
        trained = self.attachment.trained_length
        if trained is None or int(logical.max()) - columns.shift < trained:
            return
        delta = columns.lowest(logical, valid)
        if delta is None:
            return
        for index, layer in enumerate(self.layers):
            layer.move(self.attachment.ropes[index], columns.positions, delta)
        columns.move_back(delta)

    def _note_alone(self, new: int) -> None:
        """Note, before `new` tokens come in, whether they are a chunk of their own in a window of one chunk."""
        if not self.physical:
            whole = self.memory.chunk if self.memory is not None else 0
            self._alone = self.window == whole and new <= whole and not self.sinks.tokens

    # -- the window -----------------------------------------------------------------------------------------------

    @property
    def physical(self) -> int:
        """Return the number of tokens in the local window now."""
        return self.layers[0].physical

    @property
    def sees_all(self) -> bool:
        """Tell whether the next token of one row attends to the whole window, so that it needs no mask."""
        longest = float("inf") if self.window is None else self.window
        bounds = (report.sliding_window for report in self.attachment.reports if report.sliding_window)
        return self.columns.rows == 1 and all(longest <= bound for bound in bounds) and bool(self.columns.valid.all())

    def flush(self) -> None:
        """Let all local tokens leave the window, in chunks (the last one may be short). Ends a reading; sinks stay."""
        self._check_whole()
        while self.physical:
            self._leave(self.physical if self.memory is None else self._oldest_chunk(self.memory.chunk))
        for layer in self.layers:
            layer.clear()
        self._follow()

    def _oldest_chunk(self, size: int, *, goes_on: bool = False) -> int:
        """Return how many of the oldest columns are the next chunk, of at most `size` tokens.

        goes_on: whether more tokens follow those of the window. A text is cut behind the same tokens in a window of any
        size, since a chunk that is written again has to be the one that was written.
        """
        if not (self._ends or self.cuts) or self.columns.rows > 1:
            return min(size, self.physical)
        ids = self.columns.ids[0].tolist()
        places = [self.columns.column(cut) for cut in self.cuts]
        return len(next(chunks([*ids, _FOLLOWING] if goes_on else ids, size, self._ends, places)))

    def _leave(self, count: int) -> None:
        """Capture the oldest `count` columns for the memory, without their pads, keep sinks of them, and drop them."""
        if self.memory is not None:
            kept = self.memory.remember([self.captured(row, count) for row in range(self.columns.ids.shape[0])])
            if self._recents.most and kept is not None:
                self._recents.add(kept)
        self.sinks.take(self.attachment, self.columns, count, self.layers)
        for layer in self.layers:
            layer.drop(count)
        self.columns.drop(count)
        if self.cuts:
            self.cuts = {cut for cut in self.cuts if cut > self.columns.first_offset}

    def _follow(self) -> None:
        """Attend to the recent chunks, where others have become recent."""
        if self._recents.changed:
            self.recalled.follow(self._recents.rows)
            self._recents.changed = False

    def captured(self, row: int, count: int) -> Captured | None:
        """Return a row's oldest `count` columns as a chunk; None where all are pads."""
        valid = self.columns.valid[row, :count]
        if not bool(valid.any()):
            return None

        def pick(tensor: Tensor) -> Tensor:
            return tensor[row, :, :count][:, valid]

        layers = {}
        for index in self.attachment.plan.memory_layers:
            layer = self.layers[index]
            assert layer.raw_keys is not None
            queries = None if layer.raw_queries is None else pick(layer.raw_queries)
            layers[index] = LayerCapture(pick(layer.raw_keys), pick(layer.window_values), queries)
        ids, start = self.columns.oldest(row, count)
        return Captured(ids, start, layers, "isolated" if self._alone else "window")

    def newest(self, count: int) -> dict[int, LayerCapture]:
        """Return what the memory layers hold of the window's last `count` tokens; for one row."""
        layers = {}
        for index in self.attachment.plan.memory_layers:
            layer = self.layers[index]
            assert layer.raw_keys is not None
            parts = (layer.raw_keys, layer.window_values, layer.raw_queries)
            layers[index] = LayerCapture(*(None if part is None else part[0, :, -count:] for part in parts))  # type: ignore[arg-type]
        return layers

    def count_from_window(self) -> int:
        """Let the logical length begin at the window's first token, and return by how much it shrank.

        Ids and mask of the next forward cover the window only: a conversation of months costs no more than a new one.
        """
        gone = self.layers[0].dropped
        for layer in self.layers:
            layer.dropped = 0
        self.columns.count_from(gone)
        return gone

    def skip(self, count: int) -> None:
        """Let the next token stand `count` tokens later in its source, because those between are gone; for one row.

        A chunk ends before them.
        """
        if self.columns.count:
            self.cuts.add(self.columns.next_offset)
        self.columns.skip(count)

    def ask(self, rows: Sequence[Sequence[int]], prompt: int) -> None:
        """Recall for a question while its prompt comes in.

        rows: the question's token ids in each row, of which the last `query_tokens` are asked for. prompt: how many
        columns the prompt has; while they come in, every forward recalls for the question and for nothing else.
        """
        self._queries.ask(rows, prompt)

    @property
    def awaited(self) -> Begun | None:
        """Return the recall that the forward of the next token would wait for: asked for ahead, and without an answer
        yet; None where it would not wait."""
        return self._ahead.unanswered if self._queries.due_next else None

    # -- what was recalled ----------------------------------------------------------------------------------------

    def set_memory(self, rows: Sequence[Sequence[RecalledChunk]]) -> None:
        """Attend to these chunks from the next forward on; one list a batch row, each in the order of attention.

        They take the place of what was recalled before; recent chunks stay behind them. Layers that a chunk does not
        have are not attended to.
        """
        self.recalled.replace(rows)

    @property
    def retrieved_tokens(self) -> int:
        """Return how many memory tokens a retrieval layer attends to, in the longest row."""
        return self.recalled.tokens

    def set_recent(self, rows: Sequence[Sequence[RecalledChunk]]) -> None:
        """Take these chunks, oldest first, as those that left each row's window last."""
        self._recents.take(rows)
        self._follow()

    @property
    def recents(self) -> list[list[RecalledChunk]]:
        """Return the recent chunks of each row, oldest first; no rows before the first chunk has left."""
        return [list(row) for row in self._recents.rows]

    # -- why it is attended to ------------------------------------------------------------------------------------

    @contextmanager
    def trace(self, tokenizer: Any, every: int = 1) -> Iterator[Recorder]:
        """Record what is recalled and attended to while the context lasts.

        tokenizer: of the model. every: look at the attention of one in so many tokens that are written, and take it for
        that of the others. Raises InputError for a cache that is recorded already, and for an `every` that is no number
        from 1 on.
        """
        if self.recorder is not None:
            raise InputError("this cache is traced already; end that trace first")
        self.recorder = recorder = Recorder(self.attachment, tokenizer, whole("every", every))
        try:
            yield recorder
        finally:
            self.recorder = None

    def _waiting_sinks(self) -> int:
        """Return how many of the window's first columns are sinks, or pads before them; 0 under a local rule."""
        waiting = self.sinks.waiting(self.columns) if self.local is None else None
        return 0 if waiting is None else int((self.columns.positions[0] < waiting[0]).sum())

    # -- from one process to the next -----------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return the window of one conversation and what it attends to, by name; empty without a token in it."""
        if not self.physical:
            return {}
        for layer in self.layers:
            layer.settle()
        found = {**self.columns.state(), **self._queries.state()}
        for index, layer in enumerate(self.layers):
            for name in layer.parts:
                if getattr(layer, name) is not None:
                    found[f"layer.{index}.{name}"] = getattr(layer, name)
        found |= {**self.sinks.state(), **self.recalled.state(), **self._recents.state()}
        return {name: tensor.contiguous() for name, tensor in found.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put a `state` into this fresh cache, whose `start` is the offset of its first token."""
        assert not self.physical
        device = device_of(self.attachment.model)
        state = {name: tensor.to(device) for name, tensor in state.items()}
        self.columns.restore(state)
        self._queries.restore(state)
        for index, layer in enumerate(self.layers):
            own = {name: state[f"layer.{index}.{name}"] for name in layer.parts if f"layer.{index}.{name}" in state}
            layer.restore(own, self.columns.count)
        self.sinks.restore(state)
        self.recalled.restore(state)
        if self._recents.most:
            self._recents.restore(state)
            self._follow()

    # -- what transformers may ask --------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the conversation (not the bank)."""
        super().reset()
        self.columns.reset()
        self.cuts.clear()
        self.sinks.reset()
        self.recalled.clear()
        self._recents.reset()
        self._queries.reset()
        self._ahead.drop()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise InputError("beam search would remember every beam; use greedy decoding or sampling with a memory")
