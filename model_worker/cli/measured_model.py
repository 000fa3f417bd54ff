"""The options of evaluations that say which model is measured, and how its window and memory are set.

A field that is not given leaves the choice to the model's own `kvbank` entry. The module is light to import: no torch.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from model_worker.attachment.model_names import SHIPPED
from model_worker.settings.base import Count, CountOrZero, ModelName, Rope, Seed, Settings, described

_MODEL, _MEMORY = "The model and its window", "The memory"
# Fields that are options of `attach`, and those that are settings of a model by another name.
_ATTACHED = ("mode", "positions", "memory_layers", "retrieval_layers", "layers")
_LOADED = ("model", "rope", "dtype", "seed")


class MeasuredModel(Settings):
    """A model, the settings of its window and memory, and the seed of a measurement of both."""

    model: ModelName = SHIPPED
    rope: Rope = None
    dtype: Annotated[str | None, described("float32, bfloat16 or float16; by default as stored.", panel=_MODEL)] = None
    seed: Annotated[Seed, described("Seed of all that is drawn.")] = 0
    window: Annotated[Count | None, described("Tokens of the local window.", panel=_MODEL)] = None
    sinks: Annotated[
        CountOrZero | None, described("First tokens of a stream that stay in the local context.", panel=_MODEL)
    ] = None
    positions: Annotated[
        str | None,
        described("Where memory stands: zero, continual, original, near or near:N.", panel=_MODEL),
    ] = None
    mode: Annotated[str | None, described("memlong or per_layer.", panel=_MODEL)] = None
    memory_layers: Annotated[
        tuple[CountOrZero, ...], described("A layer that remembers, several times; by default the model's.")
    ] = ()
    retrieval_layers: Annotated[
        tuple[CountOrZero, ...], described("A layer that attends to memory, several times; by default the model's.")
    ] = ()
    layers: Annotated[
        Path | None, described("Layers that remember: a file of `kvbank layers --choose`.", panel=_MODEL)
    ] = None
    chunk: Annotated[Count | None, described("Tokens of a chunk.", panel=_MEMORY)] = None
    top_k: Annotated[Count | None, described("Chunks that a recall finds.", panel=_MEMORY)] = None
    recent: Annotated[
        CountOrZero | None,
        described("Last chunks that left the window, attended to without a search.", panel=_MEMORY),
    ] = None
    order: Annotated[
        Literal["time", "score"] | None,
        described("Order of recalled chunks: oldest first, or the best match last.", panel=_MEMORY),
    ] = None
    query_tokens: Annotated[Count | None, described("Tokens of a query.", panel=_MEMORY)] = None
    min_score: Annotated[float | None, described("Least score of a recalled chunk.", panel=_MEMORY)] = None
    min_share: Annotated[
        float | None, described("Least share of the best score that a recalled chunk has, 0 to 1.", panel=_MEMORY)
    ] = None
    embed: Annotated[str | None, described("Embedder: lexical, a folder, or a name.", panel=_MEMORY)] = None
    context: Annotated[
        Literal["isolated", "window"] | None,
        described("Whether a chunk is encoded alone or in its window.", panel=_MEMORY),
    ] = None
    compressor: Annotated[str, described("How chunks are compressed, e.g. tova:m=48.", panel=_MEMORY)] = "none"
    store_dtype: Annotated[str | None, described("fp32, fp16 or bf16, of stored K-V.", panel=_MEMORY)] = None

    def loading(self) -> dict[str, Any]:
        """Return the options with which the model is loaded."""
        return {name: getattr(self, name) for name in ("rope", "dtype") if getattr(self, name) is not None}

    def memory(self) -> dict[str, Any]:
        """Return the options of a `MemoryModel` that were given."""
        own = {name for name in MeasuredModel.model_fields if name not in (*_LOADED, *_ATTACHED)}
        found = {name: getattr(self, name) for name in own if getattr(self, name) is not None}
        attached = {name: getattr(self, name) for name in _ATTACHED if getattr(self, name)}
        return {**found, **({"attach_options": attached} if attached else {})}
