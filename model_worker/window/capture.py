"""The capture of a chunk: what a forward leaves for the memory, handed from the model to the compressors."""

from dataclasses import dataclass

from torch import Tensor

# Memory layer -> (keys `[Hkv, m, D]` before RoPE, values `[Hkv, m, D]`, offsets `[m]` or `[Hkv, m]` of the kept tokens
# inside their chunk): the K-V of a chunk as they are stored and recalled.
Layers = dict[int, tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class LayerCapture:
    """One memory layer's share of a chunk of S tokens.

    keys: `[Hkv, S, D]` before RoPE. values: `[Hkv, S, D]`. queries: `[Hq, S, D]` before RoPE, or None when no
    compressor asked for them.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Captured:
    """One chunk as the model saw it.

    start: offset of its first token in the source. context: `isolated` (encoded alone) or `window` (with its local
    context before it).
    """

    token_ids: list[int]
    start: int
    layers: dict[int, LayerCapture]
    context: str = "window"

    def __len__(self) -> int:
        return len(self.token_ids)
