"""The layout of a training: which layers remember and retrieve, and how window and memory are used, in training and
afterwards.

What the settings leave out comes from the `kvbank` entry of the model's configuration, where the entry is of the same
mode, and otherwise from the model's depth.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model_worker.attachment.attachment import Attachment
from model_worker.embed.spec import lasting_spec
from model_worker.errors import InputError
from model_worker.train.memlong.choosing import Search, Shares
from model_worker.train.memlong.rows import Blocks
from model_worker.train.memlong.settings import MemlongTraining
from model_worker.window.sinks import sinks_of

_WINDOW, _CHUNK, _TOP_K, _RECENT, _NEAR = 256, 64, 4, 4, "near:32"
_DRILLED = 32  # tokens of the smallest chunk that facts are told in
_EVERY = 4  # MemLong: of 26 layers 13, 17, 21 and 25 retrieve


@dataclass(frozen=True, slots=True)
class Layout:
    """How one model is trained to use its memory, and is used afterwards.

    attach: options of `attach`. context: `isolated` or `window`. The other fields are settings of a `MemoryModel`.
    """

    attach: Mapping[str, Any]
    context: str
    chunk: int
    window: int
    top_k: int
    recent: int
    query_tokens: int
    sinks: int | None
    min_share: float | None
    min_score: float | None

    @classmethod
    def of(cls, settings: MemlongTraining, config: Any) -> "Layout":
        """Return the layout that the settings ask for. config: the model's.

        Raises InputError for numbers that do not fit each other.
        """
        own: Mapping[str, Any] = getattr(config, "kvbank", None) or {}
        mode = settings.mode or own.get("mode", "memlong")
        own = own if own.get("mode") == mode else {}
        chunk = settings.chunk or own.get("chunk", _CHUNK)
        made = cls(
            _attach(settings, mode, own, config.num_hidden_layers),
            settings.context or own.get("context", "isolated" if mode == "memlong" else "window"),
            chunk,
            settings.window or own.get("window", max(_WINDOW, chunk)),
            settings.top_k or own.get("top_k", _TOP_K),
            own.get("recent", _RECENT) if settings.recent is None else settings.recent,
            settings.query_tokens or own.get("query_tokens", 3 * chunk),
            own.get("sinks") if settings.sinks is None else settings.sinks,
            own.get("min_share"),
            _min_score(settings, own),
        )
        made._check(settings)
        return made

    def _check(self, settings: MemlongTraining) -> None:
        """Raise InputError for a window of no whole chunks, a memory that is too small, and shares beyond a whole."""
        if self.window % self.chunk or self.window < 2 * self.chunk:
            raise InputError(f"the window of {self.window} tokens is not two or more chunks of {self.chunk}")
        if settings.memory < max(settings.blocks, self.recent + self.top_k):
            raise InputError(
                f"a memory of {settings.memory} chunks is smaller than the {settings.blocks} blocks of a step, or than "
                f"the {self.recent} recent and {self.top_k} found chunks that a block attends to"
            )
        if settings.only_recent + settings.nothing + settings.other + settings.itself > 1:
            raise InputError("only-recent, nothing, other and itself are shares of the blocks, together at most 1")
        if settings.drills and self.chunk < _DRILLED:
            raise InputError(f"drills tell whole facts in a chunk: it has at least {_DRILLED} tokens, not {self.chunk}")
        layers = self.attach
        if self.context == "window" and layers["mode"] == "memlong":
            memory, retrieval = layers["memory_layers"][0], layers["retrieval_layers"]
            if retrieval[0] < memory:
                raise InputError(f"layer {retrieval[0]} runs before the memory layer {memory} has K-V in its window")

    @property
    def above(self) -> int:
        """Return the first layer that is trained where what makes the memory's K-V is frozen.

        In mode memlong the memory layer itself is frozen, as in MemLong.
        """
        first: int = self.attach["memory_layers"][0]
        return first + 1 if self.attach["mode"] == "memlong" else first

    @property
    def search(self) -> Search:
        """Return how chunks are chosen."""
        order = "time" if self.attach["mode"] == "memlong" else "score"
        return Search(self.recent, self.top_k, order, self.min_share, self.min_score)

    def blocks(self, attachment: Attachment) -> Blocks:
        """Return how rows are cut. Raises InputError for a window that is longer than the model's sliding layers."""
        sliding = [report.sliding_window for report in attachment.reports if report.sliding_window]
        if sliding and self.window > min(sliding):
            raise InputError(f"the window of {self.window} tokens is longer than the model's sliding {min(sliding)}")
        return Blocks(self.chunk, self.window // self.chunk - 1)

    def sinks_of(self, attachment: Attachment) -> int:
        """Return how many tokens of a document are sinks. Raises InputError for more than stand in a window."""
        count = sinks_of(self.sinks, attachment, self.window)
        if count >= self.window:
            raise InputError(f"{count} sinks do not fit into a window of {self.window} tokens")
        return count

    def entry(self, attachment: Attachment) -> dict[str, Any]:
        """Return the `kvbank` entry of a configuration by which the model is used as it was trained."""
        plan = attachment.plan
        entry = {
            "mode": plan.mode,
            "positions": plan.positions,
            "memory_layers": list(plan.memory_layers),
            "retrieval_layers": list(plan.retrieval_layers),
            "chunk": self.chunk,
            "context": self.context,
            "window": self.window,
            "top_k": self.top_k,
            "recent": self.recent,
            "query_tokens": self.query_tokens,
            "sinks": self.sinks_of(attachment),
        }
        least = {"min_share": self.min_share, "min_score": self.min_score}
        return {**entry, **{name: value for name, value in least.items() if value is not None}}


def shares_of(settings: MemlongTraining) -> Shares:
    """Return the shares of blocks by what they attend to."""
    return Shares(settings.only_recent, settings.nothing, settings.other, settings.itself)


def _min_score(settings: MemlongTraining, own: Mapping[str, Any]) -> float | None:
    """Return the least score of a found chunk. That of the model's entry holds for the embedder of the entry alone."""
    if settings.min_score is not None or own.get("embed") != lasting_spec(settings.embed):
        return settings.min_score
    score: float | None = own.get("min_score")
    return score


def _attach(settings: MemlongTraining, mode: str, own: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Return the options of `attach`. own: the model's entry of this mode. depth: layers of the model."""
    asked = _layers(settings.retrieval_layers)
    positions = settings.positions or own.get("positions", _NEAR if mode == "memlong" else "continual")
    if mode == "per_layer":
        if settings.memory_layer is not None:
            raise InputError("in mode per_layer the memory layers are those of --retrieval-layers")
        layers = asked or own.get("retrieval_layers") or list(range(depth))
        return {"mode": mode, "positions": positions, "memory_layers": layers, "retrieval_layers": layers}
    memory = settings.memory_layer
    if memory is None:
        memory = (own.get("memory_layers") or [depth // 2])[0]
        retrieval = asked or own.get("retrieval_layers")
    else:
        retrieval = asked
    if memory >= depth:
        raise InputError(f"layer {memory} cannot be the memory layer: the model has {depth}, counted from 0")
    retrieval = retrieval or list(range(memory, depth, _EVERY))
    return {"mode": mode, "positions": positions, "memory_layers": [memory], "retrieval_layers": retrieval}


def _layers(text: str | None) -> list[int]:
    """Return layers of a text such as 2,3,4. Raises InputError for what is no number."""
    try:
        return sorted({int(part) for part in (text or "").split(",") if part.strip()})
    except ValueError:
        raise InputError(f"retrieval-layers are numbers between commas, not {text!r}") from None
