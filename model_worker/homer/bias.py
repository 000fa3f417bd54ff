"""A bias table says how large significance is at a distance anyway.

The table is subtracted, so that near and far tokens compete fairly. One table belongs to one model under one rope
scaling: it is named by architecture, weights, rope and adapter, shipped or made by `kvbank homer calibrate`, and
refused for any other model (HOMER, arXiv 2404.10308, section 3.2).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvbank.files.durable import make_folder
from model_worker.attachment.attachment import Attachment
from model_worker.errors import InputError

_SHIPPED = Path(__file__).parents[1] / "assets" / "homer"
_PARTS = ("architecture", "weights", "rope", "adapter")


@dataclass(frozen=True, slots=True)
class Bias:
    """A bias table and its name.

    table: float32 `[layers, distances]`, or None for zeros. id: what a payload's producer says of it.
    """

    table: Tensor | None
    id: str


NONE = Bias(None, "none")


def bias_key(attachment: Attachment) -> str:
    """Return the name of a model's table, which depends on everything that moves attention logits."""
    parts = {part: attachment.reader.parts[part] for part in _PARTS}
    return xxhash.xxh3_64_hexdigest(json.dumps(parts, sort_keys=True).encode())


def user_folder() -> Path:
    """Return the folder into which `kvbank homer calibrate` puts tables unless told otherwise."""
    import platformdirs

    return Path(platformdirs.user_data_dir("kvbank")) / "homer"


def load_bias(attachment: Attachment, name: str) -> Bias:
    """Load the table that `name` means: `none`, a file, or `auto`, the user's or the shipped one of this model, if any.

    Raises InputError for a file that is no table, or that belongs to another model or rope scaling.
    """
    if name == "none":
        return NONE
    key = bias_key(attachment)
    if name == "auto":
        found = [folder / f"{key}.safetensors" for folder in (user_folder(), _SHIPPED)]
        path = next((p for p in found if p.is_file()), None)
        if path is None:
            return NONE
    else:
        path = Path(name)
    try:
        with safe_open(path, "pt") as file:
            about, table = file.metadata() or {}, file.get_tensor("bias")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is no bias table: {error}") from None
    if about.get("model") != key:
        raise InputError(f"{path} was calibrated for model {about.get('model')}, this one is {key}")
    return Bias(table.float(), xxhash.xxh3_64_hexdigest(table.numpy().tobytes())[:8])


def save_bias(attachment: Attachment, table: Tensor, about: dict[str, str], path: Path | None = None) -> Path:
    """Write a table for the model of `attachment`, by default where `auto` looks, and return its path."""
    key = bias_key(attachment)
    path = path or user_folder() / f"{key}.safetensors"
    make_folder(path.parent)
    path.write_bytes(save({"bias": table.to(torch.float32).contiguous()}, {**about, "model": key}))
    return path
