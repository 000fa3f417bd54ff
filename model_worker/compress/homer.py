"""HOMER as a chunk compressor: what is stored is the root of a tree over the chunk (arXiv 2404.10308).

The tree needs a suffix, whose last token is the query of every significance, and may have a prefix. At write time no
question is known, so (`affix`):

* `tail`: the chunk's own first and last tokens. They are stored and count towards m; the authors' perplexity script
  does the same.
* `probe`: a fixed instruction behind the chunk, which is not stored; the chunk's first tokens stand in front.

Deviations: `balanced` trees by default (see homer/schedule.py), of which exactly m tokens are left; keys are stored
before RoPE with the chunk's own offsets, so the reader places them (in the tree, leaves share positions); only the
K-V of memory layers are carried through the tree. The stored suffix of a merged tree is the mean over its leaves, as in
the paper. `width` > 1 lets merged nodes hold so many times m and cuts to m in the last layer only. `pool` and `merges`
are extensions (see homer/tree.py and homer/schedule.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from model_worker.compress.base import Compressor, Payload, alone, take
from model_worker.errors import InputError
from model_worker.window.capture import Captured

if TYPE_CHECKING:
    from model_worker.attachment.attachment import Attachment
    from model_worker.homer.tree import Result

PROBE = " In short, the passage says that"
_SINKS, _TAIL = 4, 16


@dataclass(frozen=True)
class Homer(Compressor):
    """The method keeps m tokens, the same in all layers (mode `paper`: at most m).

    leaf: tokens of a leaf, affixes not counted. affix: `tail` or `probe`, see above. mode: `balanced` or `paper`.
    warmup: layers before the first merge (3/8 of them). prefix, suffix: lengths of the affixes (4 and 16, less where m
    is small; with `probe` the suffix is the instruction). width: how many times m a merged node may hold. bias: `auto`,
    `none` or a table's file (see `kvbank homer calibrate`). pool: neighbours over which significance is the maximum.
    merges: heights that run layers (all that can).
    """

    m: int
    leaf: int = 256
    affix: str = "tail"
    mode: str = "balanced"
    warmup: int | None = None
    prefix: int | None = None
    suffix: int | None = None
    width: int = 1
    bias: str = "auto"
    pool: int = 1
    merges: int | None = None

    name: ClassVar[str] = "homer"
    about: ClassVar[str] = "the root of a tree that halves the chunk on its way up the layers"
    paper: ClassVar[str] = "HOMER, arXiv 2404.10308"
    cost: ClassVar[str] = "a forward of its own, over fewer tokens the higher the layer"

    def __post_init__(self) -> None:
        from model_worker.homer.schedule import MODES

        if self.m < 1 or self.leaf < 1 or self.width < 1:
            raise InputError("m, leaf and width of homer are at least 1")
        if self.affix not in ("tail", "probe"):
            raise InputError(f"affix {self.affix!r} is not tail or probe")
        if self.mode not in MODES:
            raise InputError(f"mode {self.mode!r} is not one of {MODES}")
        if self.suffix is not None and (self.affix == "probe" or self.suffix < 1):
            raise InputError("suffix is the length of a tail, at least 1")
        stored = (self.prefix or 0) + (self.suffix or self.affix == "tail")
        if stored > self.m:
            raise InputError(f"{stored} affix tokens do not fit into m={self.m}")

    @property
    def encodes(self) -> bool:
        return True

    def compress(self, captured: Captured, attachment: "Attachment") -> Payload:
        from model_worker.homer.bias import load_bias
        from model_worker.homer.schedule import Shape, default_warmup
        from model_worker.homer.tree import trees_of

        trees, ids = trees_of(attachment), captured.token_ids
        bias = load_bias(attachment, self.bias)
        version = f"{self.version}+bias.{bias.id}"
        if len(ids) <= self.m:
            whole = alone(captured, attachment).layers
            offsets = torch.arange(len(ids))
            return Payload({i: take(layer, offsets) for i, layer in whole.items()}, self.spec, version)
        first, last = self._affixes()
        probe = _probe(attachment) if self.affix == "probe" else []
        suffix = probe or ids[len(ids) - last :]
        context = ids[first : len(ids) - (0 if probe else last)]
        affixes = first + len(suffix)
        target = self.m + len(probe)
        chunk = max(target * self.width, affixes + 2)
        if self.mode == "paper":
            chunk += (chunk - affixes) % 2  # the paper halves downwards: an odd capacity would lose a token
        warmup = default_warmup(trees.layers) if self.warmup is None else self.warmup
        shape = Shape(chunk, target, warmup, self.leaf + affixes, self.mode, self.merges)
        wanted = attachment.plan.memory_layers
        root = trees.build(shape, ids[:first], context, suffix, bias=bias.table, wanted=wanted, pool=self.pool)
        return Payload(dict(_stored(root, len(probe), attachment)), self.spec, version)

    def _affixes(self) -> tuple[int, int]:
        """Return the stored lengths of prefix and suffix, by default at most a sixteenth and a quarter of m."""
        first = min(_SINKS, self.m // 16, self.m - (self.suffix or 0)) if self.prefix is None else self.prefix
        if self.affix == "probe":
            return first, 0
        room = self.m - first if self.prefix is not None else max(1, self.m // 4)
        return first, min(_TAIL, room) if self.suffix is None else self.suffix


def _stored(
    root: "Result", unstored: int, attachment: "Attachment"
) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor]]]:
    """Yield each memory layer with its K-V: prefix, then what the tree left of context and suffix.

    unstored: tokens of a suffix that is no part of the chunk, and is left out.
    """
    first, end = len(root.prefix), len(root.tokens) - unstored
    offsets = torch.cat([torch.arange(first, device=root.tokens.origins.device), root.tokens.origins[:end]])
    for layer in attachment.plan.memory_layers:
        before = root.prefix.keys[layer], root.prefix.values[layer]
        tree = root.tokens.keys[layer][:, :end], root.tokens.values[layer][:, :end]
        keys, values = (torch.cat(pair, dim=1) for pair in zip(before, tree, strict=True))
        yield layer, (keys, values, offsets.to(torch.int32))


def _probe(attachment: "Attachment") -> list[int]:
    """Return the token ids of the instruction behind a chunk. Raises InputError without a tokenizer."""
    tokenizer: Any = attachment.tokenizer
    if tokenizer is None:
        raise InputError("affix=probe needs a tokenizer: attach(model, tokenizer)")
    return list(tokenizer.encode(PROBE, add_special_tokens=False))
