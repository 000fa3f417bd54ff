"""Models for commands, loaded without the bars and remarks of other libraries: what a command prints is its own."""

import os
from typing import Any


def quiet_libraries() -> None:
    """Turn off what transformers and the hub's client say while they load, here and in processes that this one starts.

    TRANSFORMERS_VERBOSITY, where it is set, decides instead.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_quietly(name: str, **options: Any) -> tuple[Any, Any]:
    """Return what `model_worker.loading.load_model` does."""
    from model_worker.loading import load_model

    quiet_libraries()
    return load_model(name, **options)
