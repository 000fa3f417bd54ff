"""The attention sinks of a window: the first tokens of a stream, which stay for good (StreamingLLM, arXiv 2309.17453).

Pretrained models put the attention that they have no use for on the first tokens, and fall apart when those leave the
window. While the tokens stand in the window they are tokens as any others. When they leave it, the K-V of every layer
are kept here, keys before RoPE, so that they can be attended to at any position.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from model_worker.arguments import whole
from model_worker.attachment.attachment import Attachment
from model_worker.errors import InputError
from model_worker.window.columns import Columns
from model_worker.window.local import LocalLayer
from model_worker.window.selection import gather
from model_worker.window.tova import TovaRule

SINKS = 4
# The share of a key's largest number by which a bank may have rounded any of its numbers (bf16: 2^-9).
_ROUNDING = 2**-6


def sinks_of(
    asked: int | None,
    attachment: Attachment,
    window: int | None,
    local: TovaRule | None = None,
    room: int | None = None,
) -> int:
    """Return how many tokens of a stream are sinks: what is `asked`, else what the model was made for, else 4.

    window: the window that is asked for. Where the model does not say, it has none in mode memlong and, if all of its
    layers slide, in a window that is no smaller than theirs: it was trained with a window that moves. local: a rule
    that keeps m tokens, among which there is room for m - 1 sinks. room: positions that are left for sinks by default.
    Raises InputError for no whole number, and for more sinks than the rule has room for.
    """
    if asked is None:
        rooms = [room, None if local is None else local.m - 1]
        return min([_default(attachment, window), *(each for each in rooms if each is not None)])
    count = whole("sinks", asked, least=0)
    if local is not None and count >= local.m:
        raise InputError(f"{local.spec} has no room for {count} sinks: let it keep more tokens, or have fewer sinks")
    return count


def _default(attachment: Attachment, window: int | None) -> int:
    made_for = attachment.made_for.get("sinks")
    if made_for is not None:
        return whole("sinks of the model's kvbank entry", made_for, least=0)
    sliding = [report.sliding_window for report in attachment.reports if report.sliding_window]
    its_own = len(sliding) == len(attachment.reports) and (window is None or window >= min(sliding))
    return 0 if its_own or attachment.plan.mode == "memlong" else SINKS


class Sinks:
    """The sinks that have left a window, of each row of a batch.

    wanted: how many tokens of a stream are sinks. held: `[B]`, how many of each row have left the window; None before
    the first. offsets: `[B, S]`, in the source. layers: by layer, keys before RoPE and values, both `[B, Hkv, S, D]`.
    A row that has fewer sinks than another has them first.
    """

    def __init__(self, wanted: int):
        self.wanted = wanted
        self.reset()

    def reset(self) -> None:
        """Forget the sinks of all rows."""
        self.held: Tensor | None = None
        self.offsets = torch.empty(0, 0, dtype=torch.long)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def tokens(self) -> int:
        """Return how many sinks have left the window, in the row that has most."""
        return 0 if self.held is None else int(self.held.max())

    @property
    def there(self) -> Tensor:
        """Return which of the sinks that have left the window a row has, bool `[B, tokens]`."""
        assert self.held is not None
        return torch.arange(self.tokens, device=self.held.device) < self.held[:, None]

    def among(self, layer: int, keys: Tensor, offsets: Tensor) -> Tensor:
        """Return which recalled tokens are sinks that have left the window, bool `[B, R]`.

        keys: `[B, Hkv, R, D]`, of this layer, before RoPE. offsets: `[B, 1 or Hkv, R]`, in the source. A bank has other
        texts too, with tokens at the same offsets. So a chunk's tokens are sinks as far as their keys are, from the
        chunk's first one on: two texts that begin alike have the same K-V there.
        """
        at = self.offsets[:, None, None, : self.tokens]
        same = (offsets[..., None] == at) & self.there[:, None, None]
        if not bool(same.any()):
            return same[:, 0, :, 0]
        own = gather(self.layers[layer][0], same.int().argmax(dim=3).expand(-1, keys.shape[1], -1))
        near = (keys - own).abs().amax(dim=3) <= _ROUNDING * own.abs().amax(dim=3)
        return _runs(same.any(dim=3) & near, offsets).all(dim=1)

    def waiting(self, columns: Columns) -> Tensor | None:
        """Return up to which RoPE position the tokens in the window are sinks, `[B]`; None where no row has one there.

        A token before that position is a sink. The sinks in a window are its first tokens.
        """
        if self.held is None:
            return columns.first() + self.wanted if self.wanted else None
        left = self.wanted - self.held
        none = torch.iinfo(left.dtype).min
        return torch.where(left > 0, columns.first() + left, none) if bool((left > 0).any()) else None

    def take(self, attachment: Attachment, columns: Columns, count: int, layers: Sequence[LocalLayer]) -> None:
        """Keep the sinks among the oldest `count` columns, which are about to leave the window.

        layers: of the window, one for each layer of the model.
        """
        valid = columns.valid[:, :count]
        held = torch.zeros_like(valid[:, 0], dtype=torch.long) if self.held is None else self.held
        slot = held[:, None] + valid.long().cumsum(-1) - 1
        chosen = valid & (slot < self.wanted)
        if not bool(chosen.any()):
            return
        last = int(chosen.any(0).nonzero().max()) + 1
        chosen, positions = chosen[:, :last], columns.positions[:, :last]
        rows, places = chosen.nonzero(as_tuple=True)
        to = slot[rows, places]
        if self.held is None:
            self.offsets = positions.new_zeros(len(valid), self.wanted)
        without_holes = (positions[rows, places] + columns.origin).tolist()
        self.offsets[rows, to] = positions.new_tensor([columns.offset(place) for place in without_holes])
        for index, layer in enumerate(layers):
            parts = layer.take_sinks(attachment.ropes[index], positions, chosen)
            if index not in self.layers:
                shapes = [(len(valid), part.shape[1], self.wanted, part.shape[3]) for part in parts]
                self.layers[index] = (parts[0].new_zeros(shapes[0]), parts[1].new_zeros(shapes[1]))
            for kept, part in zip(self.layers[index], parts, strict=True):
                kept[rows, :, to] = part[rows, :, places].detach()
        self.held = held + chosen.long().sum(-1)

    # -- from one process to the next -----------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of the sinks by name."""
        if self.held is None:
            return {}
        found = {"sinks.held": self.held, "sinks.offsets": self.offsets}
        for index, (keys, values) in self.layers.items():
            found |= {f"sinks.{index}.keys": keys, f"sinks.{index}.values": values}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Hold the sinks of a `state`, whatever else is in it."""
        self.reset()
        if "sinks.held" not in state:
            return
        self.held, self.offsets = state["sinks.held"], state["sinks.offsets"]
        for index in {int(name.split(".")[1]) for name in state if name.startswith("sinks.") and name.count(".") == 2}:
            self.layers[index] = (state[f"sinks.{index}.keys"], state[f"sinks.{index}.values"])


def _runs(wanted: Tensor, offsets: Tensor) -> Tensor:
    """Return the tokens that are `wanted` as all before them in their chunk are, bool `[B, H, R]`.

    offsets: `[B, 1 or H, R]`, in the source; they ascend within a chunk.
    """
    begins = torch.ones_like(offsets, dtype=torch.bool)
    begins[..., 1:] = offsets[..., 1:] <= offsets[..., :-1]
    unwanted = (~wanted).long().cumsum(-1)
    before = (unwanted - (~wanted).long()).masked_fill(~begins, 0).cummax(-1).values
    return wanted & (unwanted == before)
