"""The name of a model means the shipped one, a pretrained one of the catalogue, a folder, or a hub id.

Names go first: a folder `smollm2` of the working directory is written `./smollm2`. A path that is not there is told
from a hub id before anything is loaded, and is never asked of a hub. Light to import: no torch.
"""

import os
import re
from pathlib import Path

from model_worker.errors import InputError, ModelNotFound
from model_worker.pretrained.catalogue import PRETRAINED, Kind, nearest
from model_worker.pretrained.names import check_encoder, named_folder

SHIPPED = "kvbank-small"
_ASSETS = Path(__file__).parents[1] / "assets"
# NAME or OWNER/NAME; letters, digits, "-", "_" and ".", of which none is first.
_HUB_ID = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)


def model_folder(name: str | os.PathLike[str], kind: Kind = "language model") -> Path | None:
    """Return the folder that `name` means; None for what may be a hub id.

    kind: what the model is to be. Raises ModelNotFound for a path that is not there, or is no model's folder, and for a
    pretrained model that is not in the cache; InputError for a pretrained model of the other kind, and for a language
    model's folder where an encoder is wanted.
    """
    try:
        text = os.fspath(name)
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise InputError(f"a model is named by a string or a path, not a {type(name).__name__}")
    if isinstance(name, str) and (found := named_folder(name, kind)) is not None:
        return found
    path = _ASSETS / text if text == SHIPPED else Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(f"{path} is not a model folder: it has no config.json")
        if kind == "encoder":
            check_encoder(path)
        return path
    if path.is_file():
        raise ModelNotFound(f"{path} is a file; a model is named by its folder")
    if isinstance(name, Path) or not _HUB_ID.fullmatch(text) or (Path(text).parts[:-1] and path.parent.is_dir()):
        raise ModelNotFound(f"there is no model folder {text!r}")
    return None


def lasting(name: str) -> str:
    """Return a name that means the same from another working directory: of a folder its absolute path."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name not in (SHIPPED, *PRETRAINED) and path.is_dir() else name


def meant(name: str) -> str:
    """Return the end of a sentence that says which model may be meant by a name that is none; empty for no idea."""
    near = nearest(name, (SHIPPED, *PRETRAINED))
    return f"; did you mean {near}?" if near else ""
