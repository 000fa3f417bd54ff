"""The settings of the demo, light to import: no torch."""

from pathlib import Path
from typing import Annotated

from model_worker.attachment.model_names import SHIPPED
from model_worker.settings.base import Compressor, ModelName, Seed, at_least, described
from model_worker.settings.model_run import ModelRun

READ_BY_OTHERS = 120_000  # characters: about 30,000 tokens, which a model of 135 M reads in three minutes of one core
LEAST_TEXT = 20_000  # characters: the end of a shorter one does not fill a window, and too little is evicted


class DemoSettings(ModelRun):
    """Settings of one run of the demo."""

    text: Annotated[Path | None, described("A UTF-8 text to read; default: the Python reference.")] = None
    model: ModelName = SHIPPED
    seed: Annotated[Seed, described("Other seeds plant other facts.")] = 0
    data: Annotated[Path | None, described("Folder to keep; default: a temporary one.")] = None
    capacity: Annotated[int | None, at_least(40), described("Chunks that the bank holds.")] = None
    compressor: Compressor = "none"
    facts: Annotated[
        int, at_least(2), described("Facts in the text; the model is asked for half of them while it reads.")
    ] = 20
    limit: Annotated[
        int | None,
        at_least(LEAST_TEXT),
        described(
            f"Read only so many characters; default: all, with another model than the shipped {READ_BY_OTHERS:,}."
        ),
    ] = None

    @property
    def characters(self) -> int | None:
        """Return how many characters of the text are read; None for all."""
        return READ_BY_OTHERS if self.limit is None and self.model != SHIPPED else self.limit
