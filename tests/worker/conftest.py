"""Tiny models, made once; tests attach and detach them. `tiny.py` has the helpers, imported by name."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import kvbank
from tests.worker.tiny import build

torch.set_num_threads(1)

STORIES = (
    Path(os.environ.get("KVBANK_MODELS") or Path(__file__).parents[2].parent / "shared" / "models") / "stories260K"
)


@pytest.fixture(scope="session")
def model() -> Callable[..., PreTrainedModel]:
    """Return a model by name and dtype. Tests share it: they leave its weights alone, and detach it."""
    made: dict[tuple[str, torch.dtype], PreTrainedModel] = {}

    def get(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        if (name, dtype) not in made:
            made[name, dtype] = build(name).to(dtype)
        return made[name, dtype]

    return get


@pytest.fixture(scope="session")
def stories() -> Path:
    """Return the folder of a small trained model, where it is at hand (KVBANK_MODELS names the folder of models)."""
    if not (STORIES / "config.json").is_file():
        pytest.skip(f"{STORIES} is not there")
    return STORIES


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kvbank.Client]:
    """Connect to a real service over a folder; every test takes a bank of its own."""
    with kvbank.connect(tmp_path_factory.mktemp("memory")) as client:
        yield client
