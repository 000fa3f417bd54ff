"""Models are loaded here for commands, without the bars and remarks of other libraries.

So the output of a command is its own.
"""

import logging
import os
from typing import Any


def quiet_libraries() -> None:
    """Turn off what transformers and the hub's client say while they load, here and in processes that this one starts.

    TRANSFORMERS_VERBOSITY and HF_HUB_VERBOSITY, where they are set, decide instead.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # of all else that draws bars; tqdm reads it when it is imported
    if "HF_HUB_VERBOSITY" not in os.environ:
        # Else the client tells each of its attempts, before the one line that says what cannot be had.
        os.environ["HF_HUB_VERBOSITY"] = "error"
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_quietly(
    name: str,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    rope: str | None = None,
    adapter: str | None = None,
) -> tuple[Any, Any]:
    """Load model and tokenizer as `model_worker.attachment.loading.load_model` does, quietly.

    device: as people name one: `auto` is a GPU where there is one.
    """
    from model_worker.attachment.loading import device_named, load_model

    quiet_libraries()
    return load_model(name, device=device_named(device), dtype=dtype, rope=rope, adapter=adapter)
