"""A model may have another window, and other recent chunks, for sessions than for all else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from model_worker.attachment.loading import load_model
from model_worker.errors import InputError
from model_worker.session.preset import SessionPreset
from tests.support import command


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """Copy a tiny model, whose sessions have a window of 40 tokens and one recent chunk."""
    copied = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((copied / "config.json").read_text(encoding="utf-8"))
    config["kvbank"] = {"chunk": 16, "window": 200, "recent": 2, "session": {"window": 40, "recent": 1}}
    (copied / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return copied


def left(folder: Path, address: str, name: str, *options: object) -> int:
    """Return how many tokens have left the window of a session in which 150 bytes were said."""
    called = ["chat", "-s", name, "--memory", address, "--model", folder, *options]
    for text in ("ahoy " * 30, "aye"):
        ended = command.run(command.application(), *called, "--max-new-tokens", 2, stdin=f"{text}\n")
        assert ended.exit_code == 0, ended.stderr
    greeting = ended.stderr.partition(" tokens in bank")[0]
    return int(greeting.rpartition(" ")[2].replace(",", "")) if "tokens in bank" in ended.stderr else 0


def test_a_chat_has_the_window_of_sessions(folder: Path, address: str, sea: str) -> None:
    assert 110 <= left(folder, address, sea) <= 140
    assert left(folder, address, f"{sea}-asked", "--window", 180) == 0


def test_what_a_person_asks_for_decides(folder: Path) -> None:
    model, _ = load_model(folder)
    assert SessionPreset.of(model, 16) == SessionPreset(40, 1)
    assert SessionPreset.of(model, 64).window == 64  # no window is smaller than a chunk
    assert SessionPreset.of(model, 16, window=20, recent=0) == SessionPreset(20, 0)
    model.config.kvbank = None
    assert SessionPreset.of(model, 16) == SessionPreset()
    assert SessionPreset().memory == {}


@pytest.mark.parametrize(
    ("entry", "said"),
    [([1], "is no mapping"), ({"window": "x"}, "window in the session entry"), ({"recent": -1}, "at least 0, not -1")],
)
def test_an_entry_that_makes_no_sense(folder: Path, entry: Any, said: str) -> None:
    model, _ = load_model(folder)
    model.config.kvbank = {"session": entry}
    with pytest.raises(InputError, match=said):
        SessionPreset.of(model, 16)
