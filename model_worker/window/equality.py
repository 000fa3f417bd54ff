"""The proof that accepts a model: what it remembers is, at its original positions, what it would have seen.

Six tokens go through the model at once, and again as three that are remembered and three that attend to them. Whatever
a family does with keys, values, masks or positions, attention and logits of the last three are the same, or the model
is refused. No table of architectures is needed, so that a family that does not exist yet is exact or refused too.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.hf_caches import DynamicCache
from model_worker.attachment.model_parts import device_of
from model_worker.attachment.probe import tokens_of
from model_worker.errors import UnsupportedModel
from model_worker.window.cache import MemoryCache
from model_worker.window.capture import Captured
from model_worker.window.recalled import RecalledChunk

_TOKENS, _SHIFT = 6, 37
# Shares of the largest value: a difference up to the first is always rounding, one beyond the second never is. Between
# them a difference may be 8 times the one that the model itself makes when its own cache cuts the same tokens or when
# they stand elsewhere, which is large for a deep model in half precision.
_BOUNDS = {torch.float64: (1e-6, 1e-4), torch.float32: (1e-4, 2e-2)}
_HALF_BOUNDS, _TIMES_OWN = (5e-2, 0.25), 8.0


class _Everything:
    """A memory of one row that recalls all that it was given."""

    cadence, query_tokens, query, needs_queries, recent = 1, 1, "with_input", False, 0

    def __init__(self, chunk: int):
        self.chunk = chunk
        self._chunks: list[Captured] = []

    def remember(self, rows: Sequence[Captured | None]) -> None:
        self._chunks += [row for row in rows if row is not None]

    def recall(self, rows: Sequence[Sequence[int]], without: object = None) -> list[list[RecalledChunk]]:
        return [
            [
                RecalledChunk(i, c.start, {n: (x.keys, x.values, torch.arange(len(c))) for n, x in c.layers.items()})
                for i, c in enumerate(self._chunks)
            ]
        ]


def prove_equality(trial: Attachment, text: int = 0) -> None:
    """Raise UnsupportedModel unless remembering three tokens in all layers of `trial` is the same as seeing them.

    trial: attached with `per_layer` and `original`, all layers remembering. text: see `tokens_of`.
    """
    windows = [r.sliding_window for r in trial.reports if r.sliding_window]
    part = min(_TOKENS, *windows, _TOKENS) // 2
    if part == 0:
        raise UnsupportedModel("a sliding window of one token leaves nothing to remember")
    model: Any = trial.model
    device = device_of(model)
    ids = tokens_of(text, 2 * part, model.config.vocab_size).to(device)
    whole = _last(part, _forward(trial, ids, None, 0))
    remembered = _in_pieces(trial, ids, part, MemoryCache(trial, _Everything(part), window=part, sinks=0))
    always, never = _BOUNDS.get(whole["logits"].dtype, _HALF_BOUNDS)
    differing = {what: far for what, seen in whole.items() if (far := _far(remembered[what], seen)) > always}
    if not differing:
        return
    away = _SHIFT if trial.rotation_limit is None else min(_SHIFT, trial.rotation_limit - 2 * part)
    elsewhere = _last(part, _forward(trial, ids, None, away))
    by_cache = _in_pieces(trial, ids, part, DynamicCache(config=model.config))
    for what, far in differing.items():
        rounding = max(_far(other[what], whole[what]) for other in (by_cache, elsewhere))
        if far > min(never, _TIMES_OWN * rounding):
            raise UnsupportedModel(
                f"{type(model).__name__}: {part} tokens that are remembered are not the same as {part} tokens that are "
                f"seen: the {what} differ by {far:.1e} of their size, where rounding makes {rounding:.1e}"
            )


def _in_pieces(trial: Attachment, ids: Tensor, size: int, cache: Any) -> dict[str, Tensor]:
    """Return what `_forward` does of the last `size` tokens, when `cache` has those before them, as many at a time."""
    for piece in torch.split(ids, size, dim=1):
        outputs = _forward(trial, piece, cache)
    return outputs


def _forward(trial: Attachment, ids: Tensor, cache: Any, start: int | None = None) -> dict[str, Tensor]:
    """Return outputs of all attention modules and logits, `[1, T, ...]`, by name. start: another first position."""
    outputs: dict[str, Tensor] = {}
    positions = None if start is None else torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    with _watched(trial.attention_modules, outputs), torch.no_grad():
        answer = trial.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=cache is not None)
    return {**outputs, "logits": answer.logits}


def _last(count: int, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the outputs of the last `count` tokens."""
    return {name: tensor[:, -count:] for name, tensor in outputs.items()}


@contextmanager
def _watched(modules: dict[int, nn.Module], outputs: dict[str, Tensor]) -> Iterator[None]:
    """Keep in `outputs`, while it lasts, what the attention modules return, projected or not."""

    def keeper(layer: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            outputs[f"attention of layer {layer}"] = output[0] if isinstance(output, tuple) else output

        return keep

    handles = [module.register_forward_hook(keeper(layer)) for layer, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _far(a: Tensor, b: Tensor) -> float:
    """Return the largest difference as a share of the largest value of `b`.

    It is infinity where shapes differ or something is not finite.
    """
    if a.shape != b.shape:
        return math.inf
    far = float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-12))
    return far if math.isfinite(far) else math.inf
