"""One forward of a cache that is traced: how much of each layer's attention goes where is added up as it runs."""

from typing import Any

import torch
from torch import Tensor, nn

from model_worker.attachment.attention import Backend
from model_worker.attachment.attention_weights import attention_weights
from model_worker.attachment.model_parts import layer_of
from model_worker.window.cache_view import CacheView
from model_worker.window.trace_runs import CHUNKS, SINKS, WINDOW, Run


class TracedView(CacheView):
    """A forward that adds to a run what its tokens attend to, and computes what it would compute otherwise.

    run, waiting: see `traced`. A layer with a local rule holds local tokens in an order of its own: the sinks among
    them count as window.
    """

    run: Run
    waiting: int

    def traced(self, run: Run, waiting: int) -> "TracedView":
        """Add to this run. waiting: how many of the window's first tokens are sinks."""
        self.run, self.waiting = run, waiting
        self._labels: dict[tuple[int, ...], Tensor] = {}
        return self

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
        """Compute one layer's attention, and the weights of what the backend is asked for in the end."""
        if layer_of(module) not in self._attachment.plan.retrieval_layers:
            return super().attend(backend, module, query, key, value, mask, **kwargs)

        def watched(
            called: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            begin = 0
            for weights in attention_weights(module, called, query, key, mask, **kwargs):
                self._note(layer_of(module), weights[0], begin)
                begin += weights.shape[1]
            return backend(called, query, key, value, mask, **kwargs)

        return super().attend(watched, module, query, key, value, mask, **kwargs)

    def _note(self, layer: int, weights: Tensor, begin: int) -> None:
        """Add the weights `[tokens, L]` of some tokens, of which `begin` come before them in this forward."""
        if self._valid is not None:
            weights = weights[self._valid[0, begin : begin + len(weights)]]
        labels = self._labelled(layer, weights.shape[1])
        masses = weights.new_zeros(len(weights), CHUNKS + len(self.run.chunks))
        self.run.note(layer, masses.index_add_(1, labels, weights))

    def _labelled(self, layer: int, columns: int) -> Tensor:
        """Return to what each column that a layer attends to belongs, `[columns]`."""
        retrieved, source = self.retrieved(layer), self._attachment.plan.source(layer)
        before = 0 if retrieved is None else retrieved.sinks
        chunks = [chunk.tokens.get(source, 0) for chunk in self.run.chunks]
        local = columns - before - sum(chunks)
        waiting = min(self.waiting, local)
        counts = (before, *chunks, waiting, local - waiting)
        if counts not in self._labels:
            what = torch.tensor([SINKS, *range(CHUNKS, CHUNKS + len(chunks)), SINKS, WINDOW])
            self._labels[counts] = what.repeat_interleave(torch.tensor(counts)).to(self._positions.device)
        return self._labels[counts]
