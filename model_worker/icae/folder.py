"""The folder of an adapter: a peft adapter repository with two more files.

    adapter_config.json, adapter_model.safetensors    LoRA, loadable by peft alone
    icae_memory.safetensors                           `memory_token_embed.weight`, float32 [k + 3, d]
    icae_config.json                                  config.py, and the adapter's digest

This file owns that a folder is whole or refused: icae_config.json is put there last, and taken away first.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvbank.files.durable import make_folder, sync_folder
from model_worker.attachment import with_peft
from model_worker.errors import InputError, ModelNotFound, first_line
from model_worker.icae.config import IcaeConfig

CONFIG, MEMORY, ROWS = "icae_config.json", "icae_memory.safetensors", "memory_token_embed.weight"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
SHIPPED = ("kvbank-small-icae", "kvbank-small-icae-kv")  # of the shipped model
_ASSETS = Path(__file__).parents[1] / "assets"


def using_peft() -> AbstractContextManager[Any]:
    """Give the package peft, without its warnings. Raises InputError, with how to install it, where it is missing."""
    return with_peft.using_peft("ICAE")


def find(name: str | Path, revision: str | None = None) -> Path:
    """Return a shipped adapter's folder, the folder `name`, or a hub id's in the local cache, fetched if need be.

    Raises ModelNotFound.
    """
    folder = _ASSETS / name if str(name) in SHIPPED else Path(name)
    if folder.is_dir():
        missing = [f for f in (ADAPTER_CONFIG, ADAPTER, MEMORY, CONFIG) if not (folder / f).is_file()]
        if missing:
            raise ModelNotFound(f"{folder} is not an ICAE adapter: it has no {missing[0]}")
        return folder
    text = str(name)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise ModelNotFound(f"there is no adapter folder {text}")
    from huggingface_hub import snapshot_download

    try:
        wanted = [ADAPTER_CONFIG, ADAPTER, MEMORY, CONFIG]
        return find(Path(snapshot_download(text, revision=revision, allow_patterns=wanted)))
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"adapter {text!r} cannot be loaded: {first_line(error)}") from None


def read(folder: Path) -> tuple[IcaeConfig, Tensor, str]:
    """Read configuration, rows `[k + 3, d]` and digest of a folder that `find` found.

    The digest is empty for an import on trust. Raises InputError for files that are damaged or do not fit each other.
    """
    try:
        said = json.loads((folder / CONFIG).read_text())
        digest = said.pop("digest", "")
        rows = load_file(folder / MEMORY)
    except (OSError, ValueError, AttributeError, TypeError, SafetensorError) as error:
        raise InputError(f"the adapter in {folder} is damaged: {error}") from None
    config = IcaeConfig.from_dict(said)
    if not isinstance(digest, str):
        raise InputError(f"{folder / CONFIG}: the digest is {digest!r}")
    if set(rows) != {ROWS} or rows[ROWS].ndim != 2 or not rows[ROWS].is_floating_point():
        raise InputError(f"{folder / MEMORY} is damaged: it holds not {ROWS} alone, a matrix of numbers")
    if len(rows[ROWS]) != config.slots + 3:
        raise InputError(
            f"{folder / MEMORY} holds rows {tuple(rows[ROWS].shape)}; {config.slots} slots need {config.slots + 3}"
        )
    return config, rows[ROWS].float(), digest


def write(folder: Path, config: IcaeConfig, rows: Tensor, adapter: Callable[[Path], None], *, digest: str = "") -> None:
    """Put an adapter into `folder`, made if need be. `adapter` writes peft's files into the folder it is given.

    digest: of all that makes slots, by which files that do not belong together are noticed.

    A kill leaves what was there before, the new adapter, or a folder without icae_config.json, which is refused.
    """
    make_folder(folder)
    staged = Path(tempfile.mkdtemp(prefix=".icae-", dir=folder))
    try:
        adapter(staged)
        save_file({ROWS: rows.detach().float().cpu().contiguous()}, staged / MEMORY)
        said = config.to_dict() | ({"digest": digest} if digest else {})
        (staged / CONFIG).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
        files = sorted(staged.iterdir(), key=lambda path: path.name == CONFIG)
        for path in files:
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        (folder / CONFIG).unlink(missing_ok=True)
        sync_folder(folder)
        for path in files:
            if path.name == CONFIG:
                sync_folder(folder)
            path.replace(folder / path.name)
        sync_folder(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
