"""The options of `kvbank reencode`: the new model, and how it writes.

The module is light to import: no torch.
"""

from pathlib import Path
from typing import Annotated

from model_worker.settings.base import Compressor, ModelName, described
from model_worker.settings.model_run import RunsOn


class ReencodeOptions(RunsOn):
    """Options of `kvbank reencode`: the new model, and how it writes."""

    model: ModelName
    compressor: Compressor = "none"
    layers: Annotated[Path | None, described("Layers that remember: a file of `kvbank layers --choose`.")] = None
    embed: Annotated[
        str | None, described("Another embedder for the bank, as of kvbank chat; by default the bank keeps its own.")
    ] = None
