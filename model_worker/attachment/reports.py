"""What is known of each layer of a model: the probe writes it down, everything else reads it."""

from dataclasses import dataclass

from torch import nn

from model_worker.attachment.rope import Rope


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer as the probe saw it.

    kind: `rope`, `nope` (no rotation at all), `no-rope` (the position is inside the key) or `unsupported`; reason: why
    a layer of the last two kinds cannot be used.
    capture: how the key before RoPE is had: `projection` (bit by bit as projected, in the `layout` of raw_keys.py) or
    `unrotated` (the exact inverse of the rotation, in float32, rounded once).
    scaling: the factor of attention logits. sliding_window: its length in tokens, where the layer has one.
    """

    layer: int
    kind: str
    reason: str = ""
    capture: str = ""
    layout: str | None = None
    kv_heads: int = 0
    head_dim: int = 0
    scaling: float = 1.0
    sliding_window: int | None = None


@dataclass(frozen=True, slots=True)
class ProbedLayers:
    """All layers of a model as the probe saw them.

    reports: in the order of the layers. ropes: the rotations of usable layers. modules: the attention modules.
    """

    reports: list[LayerReport]
    ropes: dict[int, Rope]
    modules: dict[int, nn.Module]
