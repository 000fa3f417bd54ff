"""One forward of a cache with a memory: what its layers attend to, and what they keep of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.attention import Backend, RetrievedKV
from model_worker.attachment.model_parts import layer_of
from model_worker.attachment.raw_keys import raw_keys
from model_worker.attachment.view import ForwardView
from model_worker.window.local import LocalLayer
from model_worker.window.memory_port import MemoryPort
from model_worker.window.selection import received, weighed
from model_worker.window.tova import TovaLayer


class CacheView(ForwardView):
    """The forward of new tokens at RoPE positions `[B, Q]`, of which `valid` `[B, Q]` are no pads.

    layers: those of the cache. memory: for which keys are kept; None to keep none. sinks: `[B]`, the position before
    which tokens in the window are sinks; None where there are none.
    """

    def __init__(
        self,
        attachment: Attachment,
        layers: Sequence[LocalLayer],
        memory: MemoryPort | None,
        retrieved: Mapping[int, RetrievedKV],
        positions: Tensor,
        valid: Tensor,
        sinks: Tensor | None = None,
    ):
        super().__init__(retrieved)
        self._attachment, self._layers, self._memory = attachment, layers, memory
        self._positions, self._sinks = positions, sinks
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
        """Compute one layer's attention; a TOVA layer then holds no more than its rule allows.

        What such a layer holds may differ from the window that `mask` was made for, so its own mask takes its place.
        """
        index = layer_of(module)
        layer = self._layers[index]
        if not isinstance(layer, TovaLayer):
            return super().attend(backend, module, query, key, value, mask, **kwargs)
        seen = layer.follow(self._positions, self._valid)
        if layer.held > query.shape[2]:
            whole = self._attachment.all_seen(query, key.shape[2])
            mask = whole if seen is None else self._attachment.as_mask(seen, query)
        if not layer.overfull:
            return super().attend(backend, module, query, key, value, mask, **kwargs)
        scaling, new = self._attachment.reports[index].scaling, query.shape[2]
        if new == 1 and self.retrieved(index) is None and _is_plain(backend, kwargs):
            self.observe(module, query, key, value, kwargs)
            attention, weights = weighed(query, key, value, scaling, layer.valid)
            result: tuple[Tensor, Tensor | None] = attention, None
        else:
            result = super().attend(backend, module, query, key, value, mask, **kwargs)
            weights = received(query, key, scaling, layer.valid, layer.rule.last)
        layer.reduce(weights, new, self._sinks)
        return result

    def grows(self, layer: int) -> bool:
        return not isinstance(self._layers[layer], TovaLayer)

    def observe(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: Mapping[str, Any]) -> None:
        """Keep unrotated keys of memory layers; transformers has put the rotated ones into the layer already."""
        index = layer_of(module)
        if index not in self._attachment.plan.memory_layers or self._memory is None:
            return
        report, rope = self._attachment.reports[index], self._attachment.ropes[index]
        rotation, new = self.rotations[index], query.shape[2]
        # A projection that was not noted fails here: unrotated keys in its place would be rounded, without a word.
        projected = None if report.layout is None else self.projections.pop(index)
        keys = raw_keys(report, rope, key[:, :, -new:], projected, rotation)
        queries = rope.unrotate(query, *rotation).detach() if self._memory.needs_queries else None
        self._layers[index].keep_raw(keys.detach(), value[:, :, -new:].detach(), queries)


def _is_plain(backend: Backend, kwargs: Mapping[str, Any]) -> bool:
    """Tell whether the backend gives the weighted mean of the values and nothing else, as `weighed` does."""
    extras = kwargs.get("dropout"), kwargs.get("position_bias") is not None, kwargs.get("softcap") is not None
    return backend is sdpa_attention_forward and not any(extras)
