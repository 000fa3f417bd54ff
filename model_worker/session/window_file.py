"""The file that keeps the local window of a session between processes.

It is never synced, since the log can make the window again. This file owns the rule that such a file is used only when
its stamp is the one asked for and its checksum holds; any other file counts as none.
"""

from pathlib import Path

import safetensors
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvbank.files import private
from kvbank.files.durable import renamed


def write_window(path: Path, state: dict[str, Tensor], stamp: str) -> None:
    """Replace the file at `path` by the window's tensors. stamp: see `read_window`. Raises OSError."""
    with renamed(path.with_suffix(".tmp"), path) as temporary:
        private.make_file(temporary)
        save_file(state, temporary, {"stamp": stamp, "xxh3": _checksum(state)})


def read_window(path: Path, stamp: str) -> dict[str, Tensor] | None:
    """Read the tensors that were written under `stamp`; None where there are none."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
        state = load_file(path) if found.get("stamp") == stamp else {}
    except (OSError, safetensors.SafetensorError):
        return None
    return state if state and found.get("xxh3") == _checksum(state) else None


def window_stamp(path: Path) -> str | None:
    """Read the stamp of the file at `path`; None where it has none."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("stamp")
    except (OSError, safetensors.SafetensorError):
        return None


def _checksum(state: dict[str, Tensor]) -> str:
    digest = xxhash.xxh3_64()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
