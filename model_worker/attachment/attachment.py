"""A model with a memory: the hooks on it, its plan, and the check that it is still the model that was attached.

Public extension points of transformers only: the attention interface, the mask interface, the cache, and forward hooks.
"""

from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from model_worker.attachment.backends import PREFIX, set_attention
from model_worker.attachment.cache_guard import CacheGuard
from model_worker.attachment.digest import Reader
from model_worker.attachment.model_parts import config_of, decoder_of, plain
from model_worker.attachment.plan import MemoryPlan
from model_worker.attachment.reader_watch import ReaderWatch
from model_worker.attachment.reports import LayerReport, ProbedLayers
from model_worker.attachment.rope import rotation_limit
from model_worker.attachment.view import ForwardState, enter_attention, leave_attention, not_compiled, note_projection
from model_worker.errors import InputError


class Attachment:
    """A model with a memory. Made by `attach`; `detach` leaves the model as it was.

    watch: the reader whose digest K-V carry; None for an attachment that is only tried. `check_unchanged` and
    `check_forward` notice replaced and changed weights, and switched, merged or disabled adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: MemoryPlan,
        layers: ProbedLayers,
        gates: Mapping[int, Tensor],
        backend: str,
        watch: ReaderWatch | None,
    ):
        self.model, self.plan, self._watch = model, plan, watch
        self.decoder = decoder_of(model)
        self.reports, self.ropes, self.attention_modules = layers.reports, layers.ropes, layers.modules
        self.gates = dict(gates)
        self._backend = backend
        self._handles: list[Any] = []
        if watch is not None:
            self._handles.append(CacheGuard(plain(model)))
        self._handles.append(self.decoder.register_forward_pre_hook(_before_forward(self), with_kwargs=True))
        for layer in plan.memory_layers:
            self._hook(self.attention_modules[layer], self.reports[layer])

    def _hook(self, attention: nn.Module, report: LayerReport) -> None:
        """Put the hooks on one memory layer by which its rotation and projected keys are noted."""
        self._handles.append(attention.register_forward_pre_hook(enter_attention, with_kwargs=True))
        self._handles.append(attention.register_forward_hook(leave_attention, always_call=True))
        if report.capture == "projection":
            normed = isinstance(getattr(attention, "k_norm", None), nn.Module)
            projection = attention.get_submodule("k_norm" if normed else "k_proj")
            self._handles.append(projection.register_forward_hook(note_projection))

    @property
    def made_for(self) -> Mapping[str, Any]:
        """Return what the model was made for: the `kvbank` entry of its configuration, empty where it has none."""
        entry: Mapping[str, Any] = getattr(config_of(plain(self.model)), "kvbank", None) or {}
        return entry

    @property
    def kv_heads(self) -> int:
        """Return the number of K-V heads of the memory layers."""
        return self.reports[self.plan.memory_layers[0]].kv_heads

    @property
    def head_dim(self) -> int:
        """Return the size of one head of the memory layers."""
        return self.reports[self.plan.memory_layers[0]].head_dim

    @property
    def trained_length(self) -> int | None:
        """Return how many positions may be used; None where nothing bounds them.

        The number is what the model was trained for, where its configuration says so, and at most the position at which
        its rotation changes.
        """
        trained = getattr(config_of(self.model), "max_position_embeddings", None)
        return min((n for n in (trained, self.rotation_limit) if n is not None), default=None)

    @property
    def rotation_limit(self) -> int | None:
        """Return the position at which the rotation of all positions changes (see rope.py); None if it never does."""
        return rotation_limit(config_of(self.model))

    def as_mask(self, seen: Tensor, query: Tensor) -> Tensor:
        """Return who sees whom, bool `[B, 1 or Hkv, Q, L]`, in the form that the model's backend takes."""
        if seen.shape[1] > 1:
            seen = seen.repeat_interleave(query.shape[1] // seen.shape[1], dim=1)
        if self._backend == "sdpa":
            return seen
        return torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill(
            ~seen, torch.finfo(query.dtype).min
        )

    def all_seen(self, query: Tensor, length: int) -> Tensor | None:
        """Return the mask of queries `[B, Hq, Q, D]` that see all of `length` keys, as the model's backend takes it."""
        return None if self._backend == "sdpa" else query.new_zeros(1, 1, query.shape[2], length)

    @property
    def reader(self) -> Reader:
        """Return the digest of the model as it was attached, and the digest's parts."""
        return self._watched.reader

    def check_forward(self, tokens: int) -> None:
        """Raise ReaderChanged when the model is no longer the one whose digest its K-V carry.

        The check is cheap, for each forward with a memory: it looks at how often tensors were written, and when more
        than one of `tokens` comes in, at where tensors are and some of their values too.
        """
        if self._watch is None:  # it is only tried, and nothing is kept
            return
        if tokens > 1:
            self._watch.check_sampled()
        else:
            self._watch.check_counted()

    def check_unchanged(self, *, whole: bool = False) -> None:
        """Raise ReaderChanged as `check_forward` does. whole: look at every byte of the weights, as before a write."""
        if whole:
            self._watched.check_whole()
        else:
            self._watched.check_sampled()

    @property
    def tokenizer(self) -> object | None:
        """Return the tokenizer that the reader was attached with."""
        return self._watched.tokenizer

    @property
    def _watched(self) -> ReaderWatch:
        assert self._watch is not None
        return self._watch

    def enter(self, cache: ForwardState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the decoder's arguments for a forward with `cache`, which is this attachment's.

        Raises InputError where the model's attention was replaced since `attach`.
        """
        active = config_of(plain(self.model))._attn_implementation
        if active != PREFIX + self._backend:
            raise InputError(f"attention was set to {active!r} after attach, which knows no memory; detach first")
        if args:
            kwargs = {"input_ids": args[0], **kwargs}
            args = args[1:]
        return args, cache.before_forward(kwargs)

    def detach(self) -> None:
        """Remove the hooks and give the model its own attention back; its caches refuse to go on.

        A second call does nothing, since by then the model may be attached anew.
        """
        if not self._handles:
            return
        self.unhook()
        set_attention(self.model, self._backend)

    def unhook(self) -> None:
        """Remove the hooks and leave the attention function, for an attachment that was only tried."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _before_forward(attachment: Attachment) -> Callable[..., Any]:
    """Return the decoder's pre-hook, which hands a forward with a memory to `attachment`.

    The hook refers to the attachment weakly: a model does not keep alive what is known of its attachment elsewhere (by
    weak keys, as HOMER's trees and ICAE's adapters are).
    """
    owner = ref(attachment)

    @not_compiled
    def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, ForwardState):
            return None
        attached = owner()
        if attached is None or cache.attachment is not attached or module is not attached.decoder:
            raise InputError("this cache belongs to another attachment; make one for this model")
        return attached.enter(cache, args, kwargs)

    return before_forward
