"""One forward in which several conversations write one token each.

The model's linear layers see the tokens of all conversations as rows of one batch, so that its weights are read once.
Attention goes row by row, each over its own cache as it does alone: caches differ in length, memory, sinks and rules,
and nothing of them is padded or copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.attention import Backend
from model_worker.attachment.hf_caches import Cache, DynamicLayer
from model_worker.attachment.model_parts import device_of, layer_of
from model_worker.attachment.probe import tokens_of
from model_worker.attachment.view import ForwardState, ForwardView
from model_worker.window.cache import MemoryCache

# Keywords of a forward: those that a row has, and those that say nothing about one token.
_OF_A_ROW = {"input_ids", "attention_mask", "position_ids", "past_key_values"}
_NOTHING = {"use_cache", "return_dict", "logits_to_keep"}
# Tokens before the step on which a model is tried, of two conversations.
_LENGTHS = (2, 4)


@dataclass(eq=False, slots=True)
class Row:
    """The next token of one conversation, whose cache has made room and recalled for it.

    ids, positions: `[1, 1]`. view: of the cache's forward. error: what went wrong in this row alone.
    """

    cache: MemoryCache
    ids: Tensor
    positions: Tensor
    view: ForwardView
    error: Exception | None = None


def may_join(model: Any, inputs: dict[str, Any]) -> bool:
    """Tell whether a forward of one token, called as `model(**inputs)`, may be made together with others of the model.

    It may where one row attends to a window that it sees in full, and the model computes such rows together as it does
    alone, which is tried once for each attachment.
    """
    cache = inputs.get("past_key_values")
    if type(cache) is not MemoryCache or inputs["input_ids"].shape != (1, 1):
        return False
    others = [value for name, value in inputs.items() if name not in _OF_A_ROW | _NOTHING]
    mask = inputs.get("attention_mask")
    unmasked = cache.sees_all and (mask is None or bool(mask.all()))
    if not unmasked or any(value is not None and value is not False for value in others):
        return False
    if cache.attachment not in _joins:
        _joins[cache.attachment] = _tried(model, cache.attachment)
    return _joins[cache.attachment]


def row_of(inputs: dict[str, Any]) -> Row:
    """Begin the forward of one token that may be joined, and return its row. Raises what the cache raises."""
    cache = inputs["past_key_values"]
    kwargs = {name: inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids")}
    _, kwargs = cache.attachment.enter(cache, (), kwargs)
    return Row(cache, kwargs["input_ids"], kwargs["position_ids"], kwargs["kvbank"])


def forward(model: Any, rows: Sequence[Row]) -> list[Any]:
    """Make the forward of all rows, and return for each what the model would return, or the exception of the row."""
    ids, positions = (torch.cat(parts) for parts in ([row.ids for row in rows], [row.positions for row in rows]))
    made = model(
        input_ids=ids, position_ids=positions, past_key_values=_JointCache(rows), use_cache=True, return_dict=True
    )
    return [
        row.error or CausalLMOutputWithPast(logits=made.logits[at : at + 1], past_key_values=row.cache)
        for at, row in enumerate(rows)
    ]


class _JointCache(Cache, ForwardState):
    """The caches of all rows, as a forward knows them: it holds nothing itself, and no row has a mask."""

    def __init__(self, rows: Sequence[Row]):
        super().__init__(layers=[DynamicLayer() for _ in rows[0].cache.layers])
        self.attachment, self._rows = rows[0].cache.attachment, rows

    def before_forward(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**kwargs, "kvbank": _JointView(self._rows)}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return what comes in, which the view hands to the caches of the rows."""
        return key_states, value_states


class _JointView(ForwardView):
    """The forwards of all rows, as the attention layers see them."""

    def __init__(self, rows: Sequence[Row]):
        super().__init__()
        self._rows = rows

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
        """Compute one layer's attention row by row; a row that fails goes on with zeros, which are thrown away."""
        index, found = layer_of(module), list[Tensor]()
        for at, row in enumerate(self._rows):
            own = slice(at, at + 1)
            try:
                if row.error is None:
                    self._hand_down(row, index, own)
                    keys, values = row.cache.update(key[own], value[own], index)
                    seen = row.cache.attachment.all_seen(query, keys.shape[2])
                    found.append(row.view.attend(backend, module, query[own], keys, values, seen, **kwargs)[0])
            except Exception as error:
                row.error = error
            if row.error is not None:
                found.append(query.new_zeros(1, 1, query.shape[1], value.shape[3]))
        return torch.cat(found), None

    def _hand_down(self, row: Row, layer: int, own: slice) -> None:
        """Give a row's view what hooks have noted of its layer."""
        if layer in self.rotations:
            cos, sin = self.rotations[layer]
            row.view.rotations[layer] = cos[own], sin[own]
        if layer in self.projections:
            row.view.projections[layer] = self.projections[layer][own]


_joins: "WeakKeyDictionary[Attachment, bool]" = WeakKeyDictionary()


@torch.no_grad()
def _tried(model: Any, attachment: Attachment) -> bool:
    """Tell whether a joint step of two short conversations equals their single steps.

    Layers must hold what their attention sees, which the probe has found out.
    """
    if any(report.kind not in ("rope", "nope") for report in attachment.reports):
        return False
    window = min((r.sliding_window for r in attachment.reports if r.sliding_window), default=None)
    steps, singles = [], []
    try:
        for text, length in enumerate(_LENGTHS):
            ids = tokens_of(text, length + 1, model.config.vocab_size).to(device_of(model))
            alone, together = (MemoryCache(attachment, window=window, sinks=0) for _ in range(2))
            for cache in (alone, together):
                model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
            singles.append(model(input_ids=ids[:, -1:], past_key_values=alone, use_cache=True).logits)
            steps.append(row_of({"input_ids": ids[:, -1:], "past_key_values": together}))
        joined = forward(model, steps)
        return all(_close(made.logits, single) for made, single in zip(joined, singles, strict=True))
    except Exception:  # of foreign code, on a forward that nobody has asked for
        return False


def _close(joined: Tensor, single: Tensor) -> bool:
    """Tell whether logits differ by rounding only."""
    bound = 1e-3 if single.dtype in (torch.float32, torch.float64) else 8e-2
    return bool((joined.float() - single.float()).abs().max() <= bound * single.float().abs().max())
