"""The options of commands that run a model with a memory: on what, how it attends, by what chunks are found.

An option that is not given leaves the choice to the model's own `kvbank` entry. The module is light to import: no
torch.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from model_worker.settings.base import Count, CountOrZero, Device, Settings, described

_RUN = "How the model runs"


class RunsOn(Settings):
    """What a model runs on and in, and with which adapter."""

    device: Annotated[Device, described("auto, cpu, cuda.", panel=_RUN)] = "auto"
    dtype: Annotated[str | None, described("float32, bfloat16 or float16; by default as stored.", panel=_RUN)] = None
    adapter: Annotated[
        str | None,
        described("Folder of an adapter that uses the memory better (kvbank train memlong).", panel=_RUN),
    ] = None

    def loading(self) -> dict[str, Any]:
        """Return how the model is loaded, by the names of `load_model`."""
        return {name: getattr(self, name) for name in RunsOn.model_fields}


class ModelRun(RunsOn):
    """What a model runs on, and the settings of its window, its memory and its attachment."""

    embed: Annotated[
        str | None,
        described("How chunks are found: lexical, lexical:idf, minilm, hybrid:A+B, a folder, or a hub id.", panel=_RUN),
    ] = None
    window: Annotated[Count | None, described("Local tokens; the rest is in the bank.", panel=_RUN)] = None
    sinks: Annotated[
        CountOrZero | None, described("First tokens of a stream that stay in the local context.", panel=_RUN)
    ] = None
    top_k: Annotated[Count | None, described("Chunks a recall.", panel=_RUN)] = None
    min_share: Annotated[
        float | None,
        Field(ge=0, le=1),
        described("Leave out hits whose score is below this share of the best one's.", panel=_RUN),
    ] = None
    recent: Annotated[
        CountOrZero | None,
        described("Last chunks that left the window, attended to without a search.", panel=_RUN),
    ] = None
    ahead: Annotated[
        CountOrZero | None,
        described(
            "Ask so many tokens before a recall is due, and write on meanwhile; by default when due.", panel=_RUN
        ),
    ] = None
    positions: Annotated[
        str | None, described("Where memory stands: zero, continual, original, near or near:N.", panel=_RUN)
    ] = None
    layers: Annotated[
        Path | None, described("Layers that remember: a file of `kvbank layers --choose`.", panel=_RUN)
    ] = None

    def model_settings(self) -> dict[str, Any]:
        """Return the settings of a `MemoryModel` that were given, by their names."""
        given = {name: getattr(self, name) for name in ("window", "sinks", "top_k", "min_share", "recent")}
        attached = {name: getattr(self, name) for name in ("positions", "layers")}
        attached = {name: value for name, value in attached.items() if value is not None}
        own = {} if self.ahead is None else {"ahead": self.ahead}
        return {**given, **own, "embedder": self.embed, "attach_options": attached or None}
