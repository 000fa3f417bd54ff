"""The layers that were chosen for a model by measurement, as a small file that `attach` reads.

`kvbank layers --choose` writes the file. This file owns its form and the rule that a choice serves the model alone that
it was measured on: other weights keep what they remember in other layers.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvbank.files import durable
from model_worker.attachment.digest import Reader
from model_worker.errors import InputError
from model_worker.text_files import read_text

VERSION = 1
_LARGEST = 1 << 20  # bytes
# Parts of a reader's digest that say nothing of which layers remember: `attach` is also called without a tokenizer.
_IGNORED = {"tokenizer"}


class LayerChoice(BaseModel):
    """The layers of one model that remember and retrieve.

    version: of the file's form. model: the name that the model had. reader_parts: the parts of its reader digest, but
    for the tokenizer. mode, memory_layers, retrieval_layers: as in `MemoryPlan`. measured: what the choice rests on,
    for people; nothing reads it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: Literal["kvbank layers"] = "kvbank layers"
    version: int = VERSION
    model: str
    reader_parts: dict[str, str]
    mode: Literal["memlong", "per_layer"]
    memory_layers: tuple[int, ...] = Field(min_length=1)
    retrieval_layers: tuple[int, ...] = Field(min_length=1)
    measured: dict[str, Any] = {}

    def check_reader(self, reader: Reader) -> None:
        """Raise InputError unless `reader` is the model that the layers were chosen for, and name what differs."""
        own, asked = named_parts(reader), self.reader_parts
        if differing := sorted(part for part in {*own, *asked} if own.get(part) != asked.get(part)):
            raise InputError(
                f"these layers were chosen for another model ({self.model}): {', '.join(differing)} differ; "
                "choose them for this one with kvbank layers --choose"
            )

    def write(self, path: Path) -> None:
        """Put the choice into the file `path`, in the place of what is there. Raises InputError where it cannot."""
        text = json.dumps(self.model_dump(mode="json"), indent=2) + "\n"
        try:
            durable.replace(path, [text.encode()])
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None


def named_parts(reader: Reader) -> dict[str, str]:
    """Return the parts of a reader's digest that a choice of layers is bound to."""
    return {part: value for part, value in reader.parts.items() if part not in _IGNORED}


def read_layers(path: str | os.PathLike[str]) -> LayerChoice:
    """Read the file of a choice.

    Raises InputError for a file that is missing, damaged, none of `kvbank layers --choose`, or of a later version.
    """
    path = Path(path).expanduser()
    text = read_text(path, _LARGEST)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, Mapping) or found.get("kind") != "kvbank layers":
        raise InputError(f"{path} is no file of kvbank layers --choose")
    if found.get("version") != VERSION:
        raise InputError(f"{path} has version {found.get('version')!r}; this kvbank reads version {VERSION}")
    try:
        return LayerChoice.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
