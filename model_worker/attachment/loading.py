"""Models are loaded by name: the shipped one, a local folder, or a hub id."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from model_worker.attachment.adapter import with_adapter
from model_worker.attachment.model_names import SHIPPED, meant, model_folder
from model_worker.attachment.rope_scaling import scale_rope
from model_worker.errors import InputError, ModelNotFound
from model_worker.pretrained.names import made_for

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def device_named(name: str) -> str:
    """Return the device that a command was asked for, `auto` being a GPU where there is one.

    Raises InputError for what is not auto, cpu or cuda, and for CUDA devices that are not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"device {name!r} is not auto, cpu or cuda")
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise InputError(f"there is no CUDA device {name!r} here; use --device cpu")
    return name


def dtype_named(name: str | torch.dtype) -> torch.dtype:
    """Return the dtype of a model's weights by torch's name. Raises InputError for one that no model computes in."""
    found = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype) or found not in _DTYPES:
        raise InputError(f"dtype {name!r} is not one that a model computes in, such as bfloat16")
    return found


def load_model(
    name: str | os.PathLike[str] = SHIPPED,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    rope: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> tuple[Any, Any]:
    """Load `(model, tokenizer)`, in eval mode on `device`.

    dtype: of the weights, or its name; by default float32 for the shipped model on a CPU and as stored otherwise. rope:
    `linear:F`, `ntk:F` or `yarn:F` for F times the trained length (see rope_scaling.py). adapter: the folder of an
    adapter of `kvbank train memlong`, which the model is given (see adapter.py). Raises ModelNotFound in one line where
    transformers would print a page, and InputError for an adapter of another model.
    """
    folder = model_folder(name)
    source = str(name if folder is None else folder)
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device {device!r} is none of torch's: {_reason(error)}") from None
    chosen = dtype or ("float32" if name == SHIPPED and place.type == "cpu" else "auto")
    wanted = chosen if chosen == "auto" else dtype_named(chosen)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = AutoConfig.from_pretrained(source)
        if rope is not None:
            scale_rope(config, rope)
        model, report = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=wanted, output_loading_info=True
        )
    except (InputError, MemoryError):
        raise
    except Exception as error:  # the files of others, read by libraries that fail with whatever they run into
        if folder is None:
            where = f"there is no folder {source!r} here, and it cannot be had from the hub"
            raise ModelNotFound(f"{where}: {_reason(error)}{meant(source)}") from error
        raise ModelNotFound(f"model {source!r} cannot be loaded: {_reason(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelNotFound(
            f"model {source!r} cannot be used: it has no weights for {missing[0]} and {len(missing) - 1} more, which "
            "would be random; an encoder is named by --embed"
        )
    if not isinstance(getattr(config, "kvbank", None) or {}, dict):
        raise ModelNotFound(f"model {source!r} cannot be used: the kvbank entry of its config.json is no mapping")
    if folder is not None and getattr(config, "kvbank", None) is None and (settings := made_for(folder)):
        model.config.kvbank = settings
    model = model.to(place).eval()
    return model if adapter is None else with_adapter(model, Path(adapter).expanduser()), tokenizer


def _reason(error: Exception) -> str:
    """Return the first two lines of what a library says, with the kind of error where the words alone say little."""
    if isinstance(error, UnicodeEncodeError):
        return "its path is not UTF-8, which the libraries that read it need"
    said = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
    return said if isinstance(error, OSError | ValueError) and said else f"{type(error).__name__}: {said}"
