"""The cache of a model with memory: a bounded local context, what it captured, and what it retrieved.

This file owns the order of one forward: make room (what leaves the window is remembered), recall, rebase, attend. The
decoder's pre-hook calls `before_forward`, so the order also holds inside `generate()`.

Tokens are counted twice. Logical positions grow for ever and are what transformers sees (`get_seq_length`); the
positions that enter RoPE are shifted back from time to time, so that they stay within the trained length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.attention import Backend, RetrievedKV
from model_worker.attachment.raw_keys import raw_keys
from model_worker.attachment.rope import check_below
from model_worker.attachment.view import ForwardState, ForwardView, not_compiled
from model_worker.errors import InputError
from model_worker.window.capture import Captured, LayerCapture
from model_worker.window.local import LocalLayer, TovaLayer, TovaRule
from model_worker.window.selection import received, weighed


@dataclass(frozen=True, slots=True)
class RecalledChunk:
    """A chunk that attention may use.

    start: offset of the chunk in its source. layers: memory layer -> (keys `[Hkv, m, D]` before RoPE, values
    `[Hkv, m, D]`, offsets `[m]` or `[Hkv, m]` of the kept tokens inside the chunk).
    """

    chunk_id: int
    start: int
    layers: dict[int, tuple[Tensor, Tensor, Tensor]]


class MemoryPort(Protocol):
    """What the cache asks of a memory (see memory.py)."""

    chunk: int
    cadence: int
    query_tokens: int
    query: str

    @property
    def needs_queries(self) -> bool:
        """Whether queries of memory layers are to be captured too."""

    def remember(self, rows: Sequence[Captured | None]) -> None:
        """Keep what left the local window; one entry a batch row."""

    def recall(self, rows: Sequence[Sequence[int]]) -> list[list[RecalledChunk]] | None:
        """Chunks for each row's query tokens, ascending by id; None to go on with what was recalled before."""


@dataclass(slots=True)
class _Block:
    """Recalled K-V of one memory layer, unrotated and padded over the batch.

    offsets: `[B, 1 or Hkv, R]`, in the source.
    """

    keys: Tensor
    values: Tensor
    offsets: Tensor
    valid: Tensor


class MemoryCache(Cache, ForwardState):
    """Pass it as `past_key_values`. One object a batch of conversations; not for two threads at once.

    memory: where to remember and recall; None for a plain bounded window (or for memory set by hand).
    window: local tokens kept, at least one chunk; None for no bound. The oldest chunk leaves when the next tokens would
    not fit. A prompt fed in one call attends to itself in full, whatever the window: feed it in chunks.
    Sliding-window layers bound the window to theirs, since what leaves it is remembered for them too; without a memory
    they do so only where all layers have one. start: offset of the first token in its source, when a
    conversation goes on whose earlier tokens are in the bank already.
    local: None to attend to the window, or the rule by which each layer keeps m tokens of whatever age (TOVA). Chunks
    still leave for the memory with the window, so that both are bounded; old tokens keep their distance, as in the
    paper, also beyond the trained length.
    """

    attachment: Attachment

    def __init__(
        self,
        attachment: Attachment,
        memory: MemoryPort | None = None,
        *,
        window: int | None = None,
        start: int = 0,
        local: TovaRule | None = None,
    ):
        sliding = [r.sliding_window for r in attachment.reports if r.sliding_window]
        if sliding and local is not None:
            raise InputError("a model with sliding-window layers keeps its window; it takes no local rule")
        if sliding and (memory is not None or len(sliding) == len(attachment.reports)):
            window = min([*sliding, *([window] if window is not None else [])])
        smallest = 1 if memory is None else memory.chunk
        if window is not None and window < smallest:
            raise InputError(f"the window of {window} tokens is smaller than a chunk of {smallest}")
        super().__init__(layers=[LocalLayer() if local is None else TovaLayer(local) for _ in attachment.reports])
        self.attachment, self.memory, self.window, self.local = attachment, memory, window, local
        self._start = start
        self._ids = self._valid = self._positions = torch.empty(0, 0)
        self._next: Tensor | None = None  # logical position of each row's next token `[B]`, negative before its first
        self._recent: list[list[int]] = []
        self._since_recall: int | None = None
        self._shift = 0
        self._alone = False  # whether what stands in the window is one chunk that saw nothing local before it
        self._blocks: dict[int, _Block] = {}
        self._rotated: tuple[Tensor, dict[Any, RetrievedKV]] | None = None

    # -- one forward ----------------------------------------------------------------------------------------------

    def before_forward(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Make room, recall, rebase; return the keywords with shifted positions and the view."""
        ids = kwargs.get("input_ids")
        if ids is None:
            raise InputError("a model with memory needs input_ids: embeddings cannot be remembered")
        self._check_whole()
        if self.memory is not None:
            self.attachment.check_forward(ids.shape[1])
        valid, logical = self._columns(ids, kwargs.get("attention_mask"), kwargs.get("position_ids"))
        following = self._following(valid, logical)
        self._make_room(ids.shape[1])
        self._recall(ids, valid)
        self._rebase(logical, valid)
        positions = logical - self._shift
        limit = self.attachment.rotation_limit
        if limit is not None:
            check_below(limit, positions[valid])
        self._record(ids, valid, positions)
        self._next = following
        view = _CacheView(self, self._retrieved(), positions, valid)
        return {**kwargs, "position_ids": positions, "kvbank": view}

    @not_compiled
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if self.layers[layer_idx].physical + key_states.shape[2] != self._ids.shape[1]:
            raise InputError("this cache is used without its memory: the model was detached, or it is another one")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check_whole(self) -> None:
        """A forward that failed half-way leaves layers of different lengths, whose K-V nobody may attend to or keep."""
        if any(layer.physical != self._ids.shape[1] for layer in self.layers):
            raise InputError("a forward with this cache failed; start a new one")

    def _columns(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which new columns are tokens (not pads), and their logical positions; both `[B, Q]`."""
        rows, new = ids.shape
        seen = self.get_seq_length()
        if self._recent and len(self._recent) != rows:
            raise InputError(
                f"this cache follows {len(self._recent)} rows, the input has {rows}: no beam search, and not several "
                "sequences for a prompt that was fed before"
            )
        if mask is not None and (mask.ndim != 2 or mask.shape[1] != seen + new):
            raise InputError(f"attention_mask must cover all {seen + new} tokens so far, got {tuple(mask.shape)}")
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -new:].bool()
        if positions is None:
            if mask is None:
                positions = torch.arange(seen, seen + new, device=ids.device)[None]
            else:
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        return valid, positions.expand(rows, -1)

    def _following(self, valid: Tensor, logical: Tensor) -> Tensor:
        """The logical position of each row's next token, `[B]`; InputError unless these go on from the last one."""
        if self._next is not None and logical.shape[1] == 1 and bool((valid & (logical == self._next[:, None])).all()):
            return self._next + 1  # as while text is written, in fewer steps
        count = valid.long().cumsum(-1)
        first = logical.gather(1, valid.int().argmax(dim=1, keepdim=True))[:, 0]
        start = first if self._next is None else torch.where(self._next < 0, first, self._next)
        expected = start[:, None] + count - 1
        if bool(((logical != expected) & valid).any()):
            row, column = ((logical != expected) & valid).nonzero()[0].tolist()
            raise InputError(
                f"position {int(logical[row, column])} in row {row} does not go on from the last one: "
                f"{int(expected[row, column])} follows. A cache is fed each token once, in order; generation with "
                "use_cache=False feeds all of them again"
            )
        before = torch.full_like(start, -1) if self._next is None else self._next
        return torch.where(count[:, -1] > 0, start + count[:, -1], before)

    def _make_room(self, new: int) -> None:
        if self.window is None:
            return
        while self.physical and (excess := self.physical + new - self.window) > 0:
            self._leave(min(excess if self.memory is None else self.memory.chunk, self.physical))

    def _recall(self, ids: Tensor, valid: Tensor) -> None:
        """At a chunk boundary, or whenever a prompt comes in (more than one token)."""
        if self.memory is not None:
            due = ids.shape[1] > 1 or self._since_recall is None or self._since_recall >= self.memory.cadence
            queries = self._queries(self.memory, ids, valid) if due else []
            if any(queries):
                found = self.memory.recall(queries)
                self._since_recall = 0
                if found is not None:
                    self.set_memory(found)
        self._since_recall = (self._since_recall or 0) + ids.shape[1]

    def _queries(self, memory: MemoryPort, ids: Tensor, valid: Tensor) -> list[list[int]]:
        """The query tokens of each row: a prompt speaks for itself, as a segment in MemLong; a few tokens do not."""
        queries = []
        for index, past in enumerate(self._recent or [[] for _ in ids]):
            new = ids[index][valid[index]].tolist() if memory.query == "with_input" else []
            enough = len(new) > 1 and 8 * len(new) >= memory.query_tokens
            queries.append((new if enough else past + new)[-memory.query_tokens :])
        return queries

    def _rebase(self, logical: Tensor, valid: Tensor) -> None:
        """Shift positions back when the next ones would leave the trained length; distances stay as they are.

        An empty window starts at 0 again, so that a chunk encoded alone does not depend on where it stood.
        """
        if self.window is None or not bool(valid.any()):
            return
        if not self.layers[0].held:
            self._move_to(int(logical[valid].min()))
            return
        trained = self.attachment.trained_length
        if trained is None or int(logical.max()) - self._shift < trained:
            return
        live = self._positions[self._valid] if self.physical else logical[valid] - self._shift
        if not live.numel():
            return
        delta = int(live.min())
        for index, layer in enumerate(self.layers):
            layer.move(self.attachment.ropes[index], self._positions, delta)
        self._positions = self._positions - delta
        self._move_to(self._shift + delta)

    def _move_to(self, shift: int) -> None:
        """Retrieved keys at `original` positions move with the shift, whether or not the window looks the same."""
        if shift != self._shift:
            self._shift, self._rotated = shift, None

    def _record(self, ids: Tensor, valid: Tensor, positions: Tensor) -> None:
        if not self.physical:
            self._ids, self._valid, self._positions = ids, valid, positions
            whole = self.memory.chunk if self.memory is not None else 0
            self._alone = self.window == whole and ids.shape[1] <= whole
        else:
            self._ids = torch.cat([self._ids, ids], dim=1)
            self._valid = torch.cat([self._valid, valid], dim=1)
            self._positions = torch.cat([self._positions, positions], dim=1)
        keep = self.memory.query_tokens if self.memory else 0
        recent = self._recent or [[] for _ in ids]
        self._recent = [(row + ids[i][valid[i]].tolist())[-keep:] if keep else [] for i, row in enumerate(recent)]

    # -- the window -----------------------------------------------------------------------------------------------

    @property
    def physical(self) -> int:
        """Tokens in the local window now."""
        return self.layers[0].physical

    def flush(self) -> None:
        """Let all local tokens leave the window, in chunks (the last one may be short). Ends a reading."""
        self._check_whole()
        while self.physical:
            self._leave(self.physical if self.memory is None else min(self.memory.chunk, self.physical))
        for layer in self.layers:
            layer.clear()

    def _leave(self, count: int) -> None:
        """The oldest `count` columns leave: captured for the memory without their pads, then dropped."""
        if self.memory is not None:
            self.memory.remember([self._captured(row, count) for row in range(self._ids.shape[0])])
        for layer in self.layers:
            layer.drop(count)
        self._ids, self._valid, self._positions = (x[:, count:] for x in (self._ids, self._valid, self._positions))

    def _captured(self, row: int, count: int) -> Captured | None:
        valid = self._valid[row, :count]
        if not bool(valid.any()):
            return None

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[row, :, :count][:, valid]

        layers = {}
        for index in self.attachment.plan.memory_layers:
            layer = self.layers[index]
            layers[index] = LayerCapture(pick(layer.raw_keys), pick(layer.window_values), pick(layer.raw_queries))  # type: ignore[arg-type]
        start = int(self._positions[row, :count][valid][0]) + self._shift + self._start
        context = "isolated" if self._alone else "window"
        return Captured(self._ids[row, :count][valid].tolist(), start, layers, context)

    def count_from_window(self) -> int:
        """Let the logical length begin at the window's first token; returns by how much it shrank.

        Ids and mask of the next forward cover the window only: a conversation of months costs no more than a new one.
        """
        gone = self.layers[0].dropped
        for layer in self.layers:
            layer.dropped = 0
        self._start, self._shift = self._start + gone, self._shift - gone
        if self._next is not None:
            self._next = torch.where(self._next < 0, self._next, self._next - gone)
        return gone

    # -- what was recalled ----------------------------------------------------------------------------------------

    def set_memory(self, rows: Sequence[Sequence[RecalledChunk]]) -> None:
        """Attend to these chunks from the next forward on; one list a batch row, each in the order of attention.

        Layers that a chunk does not have are not attended to.
        """
        self._rotated = None
        self._blocks = {}
        if any(rows):
            present = set.intersection(*(set(chunk.layers) for row in rows for chunk in row))
            for layer in present.intersection(self.attachment.plan.memory_layers):
                self._blocks[layer] = _block(rows, layer, next(self.attachment.model.parameters()))

    @property
    def retrieved_tokens(self) -> int:
        """Memory tokens that a retrieval layer attends to (the longest row)."""
        return max((b.keys.shape[2] for b in self._blocks.values()), default=0)

    def _retrieved(self) -> dict[int, RetrievedKV]:
        """Recalled K-V by retrieval layer, rotated; rotated again only when the window or the memory moved."""
        if not self._blocks:
            return {}
        first = _first_live(self._positions, self._valid)
        if self._rotated is None or not torch.equal(self._rotated[0], first):
            self._rotated = (first, {})
        done = self._rotated[1]
        plan, ropes = self.attachment.plan, self.attachment.ropes
        result = {}
        for layer in plan.retrieval_layers:
            if plan.source(layer) not in self._blocks:
                continue
            key = (plan.source(layer), ropes[layer].key, layer if layer in self.attachment.gates else None)
            if key not in done:
                done[key] = self._rotate(self._blocks[plan.source(layer)], layer, first)
            result[layer] = done[key]
        return result

    def _rotate(self, block: _Block, layer: int, first: Tensor) -> RetrievedKV:
        if self.attachment.plan.positions == "zero":
            positions = (first - 1)[:, None].expand_as(block.valid)
        elif self.attachment.plan.positions == "continual":
            order = block.valid.long().cumsum(-1)
            positions = first[:, None] - order[:, -1:] + order - 1
        else:
            positions = block.offsets - self._start - self._shift  # by head, where heads keep different tokens
        keys = self.attachment.ropes[layer].rotate(block.keys, positions)
        valid = None if bool(block.valid.all()) else block.valid
        return RetrievedKV(keys, block.values, valid, self.attachment.gates.get(layer))

    # -- from one process to the next -----------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """The window of one conversation and what it attends to, by name; empty when there is no token in it."""
        if not self.physical:
            return {}
        for layer in self.layers:
            layer.settle()
        found = {"ids": self._ids, "valid": self._valid, "positions": self._positions}
        found["recent"] = torch.tensor(self._recent[0], dtype=torch.long)
        found["since_recall"] = torch.tensor(self._since_recall or 0)
        for index, layer in enumerate(self.layers):
            for name in layer.parts:
                if getattr(layer, name) is not None:
                    found[f"layer.{index}.{name}"] = getattr(layer, name)
        for index, block in self._blocks.items():
            for part in fields(block):
                found[f"block.{index}.{part.name}"] = getattr(block, part.name)
        return {name: tensor.contiguous() for name, tensor in found.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put a `state` into this fresh cache, whose `start` is the offset of its first token."""
        assert not self.physical
        like = next(self.attachment.model.parameters())
        state = {name: tensor.to(like.device) for name, tensor in state.items()}
        self._ids, self._valid, self._positions = state["ids"], state["valid"], state["positions"]
        self._recent, self._since_recall = [state["recent"].tolist()], int(state["since_recall"])
        self._shift = -int(self._positions[0, 0])
        self._next = self._positions[:, -1] + self._shift + 1
        for index, layer in enumerate(self.layers):
            own = {name: state[f"layer.{index}.{name}"] for name in layer.parts if f"layer.{index}.{name}" in state}
            layer.restore(own, self._ids.shape[1])
        for index in {int(name.split(".")[1]) for name in state if name.startswith("block.")}:
            self._blocks[index] = _Block(*(state[f"block.{index}.{part.name}"] for part in fields(_Block)))

    # -- what transformers may ask --------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the conversation (not the bank)."""
        super().reset()
        self._ids = self._valid = self._positions = torch.empty(0, 0)
        self._recent, self._since_recall, self._shift, self._next = [], None, 0, None
        self._blocks, self._rotated = {}, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise InputError("beam search would remember every beam; use greedy decoding or sampling with a memory")


class _CacheView(ForwardView):
    def __init__(self, cache: MemoryCache, retrieved: Mapping[int, RetrievedKV], positions: Tensor, valid: Tensor):
        super().__init__(retrieved)
        self._cache, self._positions = cache, positions
        self._valid = None if bool(valid.all()) else valid

    def attend(
        self,
        backend: Backend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What a layer holds may differ from the window that `mask` was made for; it is cut down after attention."""
        index = int(module.layer_idx)  # type: ignore[arg-type]
        layer = self._cache.layers[index]
        if not isinstance(layer, TovaLayer):
            return super().attend(backend, module, query, key, value, mask, **kwargs)
        seen = layer.follow(self._positions, self._valid)
        if layer.held > query.shape[2]:
            mask = None if seen is None else self._cache.attachment.as_mask(seen, query)
        if not layer.overfull:
            return super().attend(backend, module, query, key, value, mask, **kwargs)
        scaling, new = self._cache.attachment.reports[index].scaling, query.shape[2]
        if new == 1 and self.retrieved(index) is None and _is_plain(backend, kwargs):
            self.observe(module, query, key, value, kwargs)
            attention, weights = weighed(query, key, value, scaling, layer.valid)
            result: tuple[Tensor, Tensor | None] = attention, None
        else:
            result = super().attend(backend, module, query, key, value, mask, **kwargs)
            weights = received(query, key, scaling, layer.valid, layer.rule.last)
        layer.reduce(weights, new)
        return result

    def observe(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: Mapping[str, Any]) -> None:
        """Keep unrotated keys of memory layers; transformers has put the rotated ones into the layer already."""
        attachment, layer = self._cache.attachment, int(module.layer_idx)  # type: ignore[arg-type]
        if layer not in attachment.plan.memory_layers or self._cache.memory is None:
            return
        report, rope, new = attachment.reports[layer], attachment.ropes[layer], query.shape[2]
        rotation = self.rotations[layer]
        keys = raw_keys(report, rope, key[:, :, -new:], self.projections.pop(layer, None), rotation)
        queries = rope.unrotate(query, *rotation).detach() if self._cache.memory.needs_queries else None
        self._cache.layers[layer].keep_raw(keys.detach(), value[:, :, -new:].detach(), queries)


def _is_plain(backend: Backend, kwargs: Mapping[str, Any]) -> bool:
    """Whether the backend gives the weighted mean of the values and nothing else, as `weighed` does."""
    extras = kwargs.get("dropout"), kwargs.get("position_bias") is not None, kwargs.get("softcap") is not None
    return backend is sdpa_attention_forward and not any(extras)


def _block(rows: Sequence[Sequence[RecalledChunk]], layer: int, like: Tensor) -> _Block:
    parts = [[(*chunk.layers[layer], chunk.start) for chunk in row] for row in rows]
    length = max(sum(keys.shape[1] for keys, *_ in row) for row in parts)
    heads, _, dim = next(keys.shape for row in parts for keys, *_ in row)
    shape = (len(rows), heads, length, dim)
    own = heads if any(offsets.ndim == 2 for row in parts for _, _, offsets, _ in row) else 1
    block = _Block(
        torch.zeros(shape, dtype=like.dtype, device=like.device),
        torch.zeros(shape, dtype=like.dtype, device=like.device),
        torch.zeros((len(rows), own, length), dtype=torch.long, device=like.device),
        torch.zeros((len(rows), length), dtype=torch.bool, device=like.device),
    )
    for index, row in enumerate(parts):
        at = 0
        for keys, values, offsets, start in row:
            to = at + keys.shape[1]
            block.keys[index, :, at:to] = keys
            block.values[index, :, at:to] = values
            block.offsets[index, :, at:to] = offsets + start
            block.valid[index, at:to] = True
            at = to
    return block


def _first_live(positions: Tensor, valid: Tensor) -> Tensor:
    """Position of the first token (not pad) in the window, by row; `[B]`."""
    first = valid.int().argmax(dim=1)
    return positions.gather(1, first[:, None])[:, 0]
