"""The tokens that the last token attends to most stay: TOVA (arXiv 2401.06104, section 3.2).

One-shot (default): one forward over the chunk, then one reduction a layer, which the paper does for prompts. With
`block=b` the chunk is fed b tokens at a time and every block is followed by a reduction; block=1 is the paper's online
rule, under which later tokens see survivors only. The two keep different tokens and, above the first layer, different
K-V of the same tokens.

Deviations: scores stay in float32 (the authors' code rounds them to the model's dtype); among equal scores the later
token wins (torch.topk leaves it open). Extensions that the paper only compares with: observers other than the last
token, since the later query is unknown when a chunk is written, and one set a K-V head (`heads=own`). As in the
authors' code, and not as in kvpress, the last token is not protected.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from model_worker.compress.base import Payload, Selection, alone, take
from model_worker.compress.observe import observed
from model_worker.errors import InputError
from model_worker.window.capture import Captured, LayerCapture
from model_worker.window.selection import kept_positions
from model_worker.window.tova import TovaRule

if TYPE_CHECKING:
    from model_worker.attachment.attachment import Attachment


@dataclass(frozen=True)
class Tova(Selection):
    """The method keeps m tokens per layer.

    observer: the tokens whose attention counts, `last`, `window:w` or `all`. heads: one set for all (`shared`) or one a
    K-V head (`own`). block: tokens a forward of the online rule, which observes within a block; None for one-shot.
    """

    observer: str = "last"
    heads: str = "shared"
    block: int | None = None

    name: ClassVar[str] = "tova"
    about: ClassVar[str] = "the tokens that the chunk's last token attends to most"
    paper: ClassVar[str] = "TOVA, arXiv 2401.06104"
    cost: ClassVar[str] = "one query times the chunk's keys, per memory layer; with block=b a forward of its own"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"last|all|window:[1-9]\d*", self.observer):
            raise InputError(f"observer {self.observer!r} is not last, all or window:w with w of at least 1")
        if self.heads not in ("shared", "own"):
            raise InputError(f"heads {self.heads!r} is not shared or own")
        if self.block is not None and self.block < 1:
            raise InputError(f"a block has at least 1 token, not {self.block}")

    @property
    def needs_queries(self) -> bool:
        return self.block is None

    @property
    def encodes(self) -> bool:
        return self.block is not None

    @property
    def rule(self) -> TovaRule:
        """Return the rule by which a cache makes the same choice at decode time."""
        _, _, window = self.observer.partition(":")
        return TovaRule(self.m, {"last": 1, "all": 1 << 30}.get(self.observer) or int(window), self.heads)

    def compress(self, captured: Captured, attachment: "Attachment") -> Payload:
        if self.block is None:
            return super().compress(captured, attachment)
        if len(captured) <= self.m:
            return super().compress(alone(captured, attachment), attachment)
        from model_worker.window.encoding import encode_online

        online, kept = encode_online(attachment, captured.token_ids, self.rule, self.block)
        shared = {i: k[0] if k.shape[0] == 1 else k for i, k in kept.items()}
        return Payload({i: take(online.layers[i], k) for i, k in shared.items()}, self.spec, self.version)

    def keep(self, layer: LayerCapture, index: int, attachment: "Attachment") -> Tensor:
        return kept_positions(self.scores(layer, index, attachment), self.m)

    def scores(self, layer: LayerCapture, index: int, attachment: "Attachment") -> Tensor:
        """Return the attention that each token gets from the observer, float32: `[S]`, or `[Hkv, S]` with heads=own."""
        scores = observed(layer, index, attachment, self.rule.last, self.heads)
        return scores[0] if self.heads == "shared" else scores
