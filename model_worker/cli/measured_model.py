"""The options of evaluations that say which model is measured, and how its window and memory are set.

An option that is not given leaves the choice to the model's own `kvbank` entry. The module is light to import: no
torch.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from model_worker.attachment.model_names import SHIPPED
from model_worker.settings.base import Compressor, Count, ModelName, Rope, Seed, described
from model_worker.settings.model_run import ModelRun

# Tokens of a text that is made here, all of which are in memory at once.
TextTokens = Annotated[int, Field(ge=1, le=20_000_000)]
_MORE = ("chunk", "order", "query_tokens", "min_score", "context", "compressor", "store_dtype")


class MeasuredModel(ModelRun):
    """A model, the settings of its window and memory, and the seed of a measurement of both."""

    model: ModelName = SHIPPED
    rope: Rope = None
    seed: Annotated[Seed, described("Seed of all that is drawn.")] = 0
    mode: Annotated[str | None, described("memlong or per_layer.")] = None
    chunk: Annotated[Count | None, described("Tokens of a chunk.")] = None
    order: Annotated[
        Literal["time", "score"] | None,
        described("Order of recalled chunks: oldest first, or the best match last."),
    ] = None
    query_tokens: Annotated[Count | None, described("Tokens of a query.")] = None
    min_score: Annotated[float | None, described("Least score of a recalled chunk.")] = None
    context: Annotated[
        Literal["isolated", "window"] | None,
        described("Whether a chunk is encoded alone or in its window."),
    ] = None
    compressor: Compressor = "none"
    store_dtype: Annotated[str | None, described("fp32, fp16 or bf16, of stored K-V.")] = None

    def model_settings(self) -> dict[str, Any]:
        """Return the settings of a `MemoryModel` that were given, by their names."""
        found = {**super().model_settings(), **{name: getattr(self, name) for name in _MORE}}
        if self.mode is not None:
            found["attach_options"] = {**(found["attach_options"] or {}), "mode": self.mode}
        return {name: value for name, value in found.items() if value is not None}
