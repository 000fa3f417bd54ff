"""What each layer of a model does with positions, found by running the model twice on a few tokens.

The probe runs when a model is attached. It tells rotary layers from others by behaviour, not by a table of
architectures, so that a model can be refused with a reason instead of being corrupted silently.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model_worker.attachment.hf_caches import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from model_worker.attachment.model_parts import device_of, evaluating, layer_of
from model_worker.attachment.raw_keys import LAYOUTS
from model_worker.attachment.reports import LayerReport, ProbedLayers
from model_worker.attachment.rope import Rope, rotation_limit
from model_worker.attachment.view import ForwardView
from model_worker.errors import UnsupportedModel

_SHIFT = 37  # positions between the two runs
_TOKENS = 6


class _Unusable(Exception):
    """Why a layer cannot hold a memory, and the kind of `LayerReport` that it is."""

    def __init__(self, reason: str, kind: str = "unsupported"):
        super().__init__(reason)
        self.kind = kind


@dataclass(slots=True)
class _Seen:
    """One layer during one forward: what its attention was given, and what its cache returned (`updated`)."""

    module: nn.Module
    key: Tensor
    value: Tensor
    kwargs: dict[str, Any]
    calls: int = 1
    updated: tuple[Tensor, Tensor] | None = None
    rotation: Any = None
    projections: dict[str, Tensor] = field(default_factory=dict)


class _Recorder(ForwardView):
    """A forward of which everything is kept that the attention layers see."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[int, _Seen] = {}

    def observe(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: Any) -> None:
        layer = layer_of(module)
        before = self.layers.get(layer)
        self.layers[layer] = _Seen(module, key, value, dict(kwargs), 1 if before is None else before.calls + 1)


class _SpyCache(DynamicCache):
    """A cache that keeps what it returned to each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.updated: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.updated[layer_idx] = keys, values
        return keys, values


def probe(model: Any, decoder: nn.Module, text: int = 0) -> ProbedLayers:
    """Run `model`, whose stack of layers is `decoder`, on the text of that number, and report what each layer does.

    The attention function of this package must be active on `model`. Raises UnsupportedModel for a model that is not
    one stack of attention layers.
    """
    _check_stack(model)
    limit = rotation_limit(model.config)
    shift = _SHIFT if limit is None else min(_SHIFT, limit - _TOKENS)
    if shift < 1:
        raise UnsupportedModel(f"its rotation changes at position {limit}: that leaves no room for a memory")
    first, second = _run(model, decoder, 0, text), _run(model, decoder, shift, text)
    count = int(getattr(model.config, "num_hidden_layers", 0))
    rotary = next((m for name, m in decoder.named_modules() if name.split(".")[-1] == "rotary_emb"), None)
    types = getattr(model.config, "layer_types", None) or [None] * count
    reports, ropes, modules = [], {}, {}
    for layer in range(count):
        if layer not in first:
            reports.append(LayerReport(layer, "unsupported", "its attention does not receive the memory"))
            continue
        seen = first[layer]
        modules[layer] = seen.module
        try:
            _check_keys(seen)
            rope, unrotated = _rotation(seen, second[layer], shift, rotary, types[layer], limit)
        except _Unusable as refusal:
            reports.append(LayerReport(layer, refusal.kind, str(refusal)))
            continue
        reports.append(_report(layer, seen, rope, unrotated))
        ropes[layer] = rope
    return ProbedLayers(reports, ropes, modules)


def tokens_of(text: int, count: int, vocabulary: int) -> Tensor:
    """Return the first `count` token ids, `[1, count]`, of a text that a model is tried on; texts have numbers."""
    first = 1 + text * _TOKENS
    return torch.arange(first, first + count)[None] % int(vocabulary)


def _check_stack(model: Any) -> None:
    """Raise UnsupportedModel for other layers than attention, which remember something else than keys and values."""
    config = model.config
    missing = [name for name in ("num_hidden_layers", "vocab_size") if not hasattr(config, name)]
    if missing:
        raise UnsupportedModel(
            f"{type(model).__name__} is made of several models: its configuration has no {missing[0]} of its own; "
            "attach the language model inside it"
        )
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            types = getattr(config, "layer_types", None) or []
            kind = types[index] if index < len(types) else "unknown"
            raise UnsupportedModel(
                f"{type(model).__name__}: layer {index} ({kind}) keeps a {type(layer).__name__}: what it remembers is "
                "not keys and values alone"
            )


def _run(model: Any, decoder: nn.Module, offset: int, text: int) -> dict[int, _Seen]:
    """Run `model` on a text whose first token stands at position `offset`, and return what each layer saw."""
    recorder, cache = _Recorder(), _SpyCache()
    rotations: dict[int, Any] = {}
    projections: dict[int, dict[str, Tensor]] = {}
    device = device_of(model)
    ids = tokens_of(text, _TOKENS, model.config.vocab_size).to(device)
    positions = torch.arange(offset, offset + _TOKENS, device=device)[None]
    with _hooks(decoder, rotations, projections), evaluating(model), torch.no_grad():
        model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, kvbank=recorder)
    for layer, seen in recorder.layers.items():
        seen.updated = cache.updated.get(layer)
        seen.rotation = rotations.get(id(seen.module))
        seen.projections = projections.get(id(seen.module), {})
    return recorder.layers


@contextmanager
def _hooks(decoder: nn.Module, rotations: dict[int, Any], projections: dict[int, dict[str, Tensor]]) -> Iterator[None]:
    """Note, while it lasts, rotation and key projections of each attention module, by the module's `id`."""

    def note_rotation(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rotations[id(module)] = kwargs.get("position_embeddings")

    def noter(owner: nn.Module, name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            projections.setdefault(id(owner), {})[name] = output

        return note

    with ExitStack() as stack:
        for module in decoder.modules():
            if not hasattr(module, "layer_idx"):
                continue
            handle = module.register_forward_pre_hook(note_rotation, with_kwargs=True)
            stack.callback(handle.remove)
            for name in ("k_norm", "k_proj"):
                child = getattr(module, name, None)
                if isinstance(child, nn.Module):
                    stack.callback(child.register_forward_hook(noter(module, name)).remove)
        yield


def _check_keys(seen: _Seen) -> None:
    """Raise _Unusable unless the layer's attention runs once, on the very keys and values that its cache holds."""
    if seen.calls > 1:
        raise _Unusable(f"its attention runs {seen.calls} times in one forward")
    if seen.updated is None or not all(map(_same, seen.updated, (seen.key, seen.value))):
        raise _Unusable(
            "its cache does not hold the keys and values that attention sees (a latent, or K-V of another layer)"
        )


def _rotation(
    first: _Seen, second: _Seen, shift: int, rotary: nn.Module | None, layer_type: str | None, limit: int | None
) -> tuple[Rope, Tensor]:
    """Return the rotation of a layer that ran at two places, and its keys without it, `[1, Hkv, T, D]`.

    rotary, layer_type, limit: see `Rope`. A layer whose keys are the same at both places has no rotation (NoPE).
    Raises _Unusable where taking the rotation back does not give the same key at both places.
    """
    same = _close(first.key, second.key)
    if first.rotation is None:
        raise _Unusable("it has no rotary positions, so remembered keys cannot be moved", "no-rope")
    if not _is_cos_sin(first.rotation) or (rotary is None and not same):
        raise _Unusable("its rotary embedding is not a pair of cosines and sines")
    if same:
        return Rope(first.module, None), first.key
    rope = Rope(first.module, rotary, layer_type, limit)
    try:
        unrotated = rope.unrotate(first.key, *first.rotation)
        positions = torch.arange(shift, shift + _TOKENS, device=first.key.device)[None]
        fits = _close(unrotated, rope.unrotate(second.key, *second.rotation))
        fits = fits and _close(rope.rotate(unrotated, positions), second.key)
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        raise _Unusable(f"its rotation cannot be called: {error}") from error
    if not fits:
        raise _Unusable("taking its rotation back does not give a key that is free of position")
    return rope, unrotated


def _report(layer: int, seen: _Seen, rope: Rope, unrotated: Tensor) -> LayerReport:
    """Report a layer that can hold a memory; its key is captured as projected, if a projection equals it."""
    projected = list(seen.projections.values())[-1:]  # k_norm, where there is one, comes after k_proj
    layout = next((name for p in projected for name in LAYOUTS if _is_key(p, name, unrotated)), None)
    return LayerReport(
        layer,
        "rope" if rope.rotates else "nope",
        capture="unrotated" if layout is None else "projection",
        layout=layout,
        kv_heads=unrotated.shape[1],
        head_dim=unrotated.shape[3],
        scaling=float(seen.kwargs.get("scaling") or unrotated.shape[3] ** -0.5),
        sliding_window=seen.kwargs.get("sliding_window"),
    )


def _is_key(projected: Tensor, layout: str, unrotated: Tensor) -> bool:
    """Tell whether a projection's output, read in that layout, is the key before RoPE."""
    if (layout == "flat") != (projected.ndim == 3) or projected.numel() != unrotated.numel():
        return False
    key = LAYOUTS[layout](projected, unrotated.shape[1], unrotated.shape[3])
    return key.shape == unrotated.shape and _close(key, unrotated)


def _is_cos_sin(rotation: Any) -> bool:
    """Tell whether a rotation is a pair of real tensors."""
    return (
        isinstance(rotation, tuple)
        and len(rotation) == 2
        and all(isinstance(x, Tensor) and not x.is_complex() for x in rotation)
    )


def _same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors have one shape and, up to rounding, the same values."""
    return a.shape == b.shape and _close(a, b)


def _close(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors of one shape differ by rounding only, measured by the largest value of `b`."""
    bound = 1e-3 if a.dtype == torch.float32 else 8e-2
    return bool((a.float() - b.float()).abs().max() <= bound * b.float().abs().max().clamp(min=1e-6))
