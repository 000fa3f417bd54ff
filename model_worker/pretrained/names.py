"""A name of the catalogue means the folder of that model in the cache.

The names go first: a folder of the working directory that has the name of a pretrained model is written `./NAME`. The
module is light to import: no torch.
"""

import json
from pathlib import Path
from typing import Any

from model_worker.errors import InputError, ModelNotFound
from model_worker.pretrained.cache import kept_folder
from model_worker.pretrained.catalogue import PRETRAINED, Kind
from model_worker.pretrained.record import read_record

_OPTIONS = {"language model": "--model", "encoder": "--embed"}


def named_folder(name: str, kind: Kind) -> Path | None:
    """Return the folder of the pretrained model `name`; None for a name that is not in the catalogue.

    kind: what the model is to be. Raises InputError for a model of the other kind, ModelNotFound for one that is not in
    the cache, with the command that fetches it.
    """
    found = PRETRAINED.get(name)
    if found is None:
        return None
    if found.kind != kind:
        raise InputError(
            f"{name} is {_a(found.kind)}, and {_a(kind)} is wanted here: name it by {_OPTIONS[found.kind]}"
        )
    folder = kept_folder(name)
    if folder is None:
        beside = f"; the folder {name} is named as ./{name}" if Path(name).is_dir() else ""
        raise ModelNotFound(f"{name} is not on this machine yet: kvbank model get {name}{beside}")
    return folder


def made_for(folder: Path) -> dict[str, Any]:
    """Return the settings that are good for the pretrained model in `folder`; of any other folder, none."""
    record = read_record(folder)
    found = None if record is None else PRETRAINED.get(record.name)
    return {} if found is None else dict(found.made_for)


def check_encoder(folder: Path) -> None:
    """Refuse a folder whose weights are for generating text, and not said to be for embedding it. Raises InputError."""
    if kind_of(folder) == "language model":
        raise InputError(f"{folder} is a language model, and an encoder is wanted here: name it by --model")


def kind_of(folder: Path) -> Kind | None:
    """Return what a folder's files say that its model is; None where they say nothing."""
    if (folder / "modules.json").is_file() or (folder / "1_Pooling").is_dir():
        return "encoder"
    try:
        made = json.loads((folder / "config.json").read_bytes()).get("architectures") or []
    except (OSError, ValueError, AttributeError):
        return None  # what is wrong with the folder shows when it is loaded
    if not made:
        return None
    writes = any(str(each).endswith(("ForCausalLM", "LMHeadModel")) for each in made)
    return "language model" if writes else "encoder"


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
