"""Pretrained weights, where they are in the user's cache; a test that needs some is skipped where they are not."""

from pathlib import Path

import pytest

from model_worker.pretrained.cache import kept_folder
from model_worker.pretrained.catalogue import pretrained


def weights(name: str) -> Path:
    """Return the folder of a pretrained model; skip the test that asks where the model is not on this machine."""
    folder = kept_folder(pretrained(name).name)
    if folder is None:
        pytest.skip(f"{name} is not on this machine: make models")
    return folder
