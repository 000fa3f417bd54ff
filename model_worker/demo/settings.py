"""The settings of the demo, light to import: no torch."""

from pathlib import Path
from typing import Annotated

from model_worker.attachment.model_names import SHIPPED
from model_worker.settings.base import Compressor, ModelName, Seed, Settings, at_least, described

LEAST_TEXT = 40_000  # characters: a shorter text has no room for the facts, and evicts too little


class DemoSettings(Settings):
    """Settings of one run of the demo."""

    text: Annotated[Path | None, described("A UTF-8 text to read; default: the Python reference.")] = None
    model: ModelName = SHIPPED
    seed: Annotated[Seed, described("Other seeds plant other facts.")] = 0
    data: Annotated[Path | None, described("Folder to keep; default: a temporary one.")] = None
    capacity: Annotated[int | None, at_least(40), described("Chunks that the bank holds.")] = None
    compressor: Compressor = "none"
    limit: Annotated[int | None, at_least(LEAST_TEXT), described("Read only so many characters.")] = None
