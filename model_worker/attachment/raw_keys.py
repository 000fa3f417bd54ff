"""Keys are stored as they are before RoPE, so that a chunk can be attended to at any position.

This file owns where such a key comes from. A forward that shows the key as it was projected gives it bit by bit; any
other gives the rotated key, whose rotation is taken back in float32 and rounded once.
"""

from collections.abc import Callable

from torch import Tensor

from model_worker.attachment.reports import LayerReport
from model_worker.attachment.rope import Rope

# How a projection's output lies in memory, and how it becomes the key [B, Hkv, T, D], given Hkv and D.
LAYOUTS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "flat": lambda x, heads, dim: x.view(x.shape[0], x.shape[1], heads, dim).transpose(1, 2),
    "tokens_first": lambda x, heads, dim: x.transpose(1, 2),
    "heads_first": lambda x, heads, dim: x,
}


def raw_keys(
    report: LayerReport, rope: Rope, key: Tensor, projected: Tensor | None, rotation: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Return the keys before RoPE, `[B, Hkv, T, D]`, of what one layer computed in a forward.

    key: `[B, Hkv, T, D]`, rotated. projected: what `k_proj` or `k_norm` returned, where that was noted. rotation:
    cosines and sines of these tokens as the layer received them; None for a layer without positions (NoPE).
    """
    if report.layout is not None and projected is not None:
        return LAYOUTS[report.layout](projected, report.kv_heads, report.head_dim)
    if not rope.rotates:
        return key
    assert rotation is not None
    return rope.unrotate(key, *rotation)
