"""The adapter by which a model learnt to use its memory: a folder of peft with one file more, `kvbank.json`.

`kvbank train memlong` writes it. That file says how the memory is used, as the `kvbank` entry of a model's
configuration does, and on which model the adapter was trained: its weights mean nothing on another one, where they
would be taken without a word.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from model_worker.attachment.digest import Reader, reader_of
from model_worker.attachment.model_parts import plain
from model_worker.attachment.with_peft import put, using_peft
from model_worker.errors import InputError, ModelNotFound, first_line

ENTRY, CONFIG, WEIGHTS = "kvbank.json", "adapter_config.json", "adapter_model.safetensors"
_BOUND = ("architecture", "weights", "rope")  # parts of a reader's digest


class AdapterEntry(BaseModel):
    """An entry is what the file `kvbank.json` says of an adapter.

    version: of the file's form. base: how the model without the adapter was called. base_parts: parts of its reader
    digest. kvbank: how the memory is used, by the names of a configuration's entry.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: Literal["kvbank memlong"] = "kvbank memlong"
    version: Literal[1] = 1
    base: str
    base_parts: dict[str, str]
    kvbank: dict[str, Any]

    @classmethod
    def of(cls, base: Reader, name: str, kvbank: Mapping[str, Any]) -> "AdapterEntry":
        """Return the entry of an adapter that was trained on the model `base`, which is called `name`."""
        return cls(base=name, base_parts={part: base.parts[part] for part in _BOUND}, kvbank=dict(kvbank))

    def write(self, folder: Path) -> None:
        """Put the entry into an adapter's folder."""
        (folder / ENTRY).write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n")

    def check_base(self, model: Any, folder: Path) -> None:
        """Raise InputError unless `model` is the one that the adapter was trained on, and name what differs."""
        parts = reader_of(model).parts
        if differing := [part for part in _BOUND if self.base_parts.get(part) != parts[part]]:
            raise InputError(
                f"the adapter in {folder} was trained on another model ({self.base}): {', '.join(differing)} differ"
            )


def read_entry(folder: Path) -> AdapterEntry:
    """Read the entry of an adapter's folder.

    Raises ModelNotFound for a folder that is not there, or has not the files of an adapter, InputError for a damaged
    entry, and one of a later version.
    """
    if not folder.is_dir():
        raise ModelNotFound(f"there is no adapter folder {str(folder)!r}")
    if missing := [name for name in (CONFIG, WEIGHTS, ENTRY) if not (folder / name).is_file()]:
        raise ModelNotFound(f"{folder} is no adapter of kvbank train memlong: it has no {missing[0]}")
    try:
        return AdapterEntry.model_validate_json((folder / ENTRY).read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{folder / ENTRY}: {where}{': ' if where else ''}{first['msg']}") from None
    except OSError as error:
        raise InputError(f"cannot read {folder / ENTRY}: {error.strerror}") from None


def with_adapter(model: Any, folder: Path) -> Any:
    """Return `model` with the adapter in a folder, in eval mode; the model's configuration says how it is used then.

    Raises what `read_entry` does, and InputError without peft, for an adapter of another model, and for damaged files.
    """
    entry = read_entry(folder)
    entry.check_base(model, folder)
    with using_peft("an adapter") as peft:
        try:
            settings = peft.PeftConfig.from_pretrained(str(folder))
            tensors = load_file(folder / WEIGHTS)
            settings.inference_mode = True
            wrapped = peft.get_peft_model(model, settings)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
            raise InputError(f"the adapter in {folder} is damaged: {first_line(error)}") from None
        put(peft, wrapped, tensors, folder)
    plain(wrapped).config.kvbank = dict(entry.kvbank)
    return wrapped.eval()
