"""The examples do what they say."""

import io
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvbank
from memory_service.api.embedded import LocalServer
from tests.worker_session.conftest import save_model

EXAMPLES = Path(__file__).parents[1] / "examples"
NODE = EXAMPLES / "node"


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, *words: object) -> str:
    """Run an example in this process, which has torch already, and return what it prints."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_a_chat_goes_on_where_it_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("KVBANK_CACHE", "XDG_DATA_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    words = (tmp_path / "memory", "sea", save_model(tmp_path / "model", seed=1))
    for turns, said in enumerate(("a ship\n", "a storm\n")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        first, *answer = run(monkeypatch, capsys, "chat.py", *words).splitlines()
        assert (first, bool("".join(answer))) == (f"sea: {turns} turns so far", True)
    with kvbank.connect(tmp_path / "memory") as client:
        session = client.sessions.get(name="sea")
        assert [turn.text("user") for turn in client.sessions.turns(session.session_id)] == ["a ship", "a storm"]


def test_passages_of_files_are_found_for_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mill, harbour = tmp_path / "mill.txt", tmp_path / "harbour.txt"
    mill.write_text("Snow fell on the old mill.")
    harbour.write_text("The harbour was empty.")
    for files in ((mill, harbour), ()):
        said = run(monkeypatch, capsys, "remember.py", tmp_path / "memory", "What fell on the mill?", *files)
        assert said.split("\n\n")[1] == f"[{mill}] Snow fell on the old mill."
        assert said.endswith("Question: What fell on the mill?\n")


def test_a_client_of_node_writes_and_verifies_a_chunk(tmp_path: Path) -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not on the PATH")
    if not (NODE / "node_modules").is_dir():
        pytest.skip("the packages of the example are not there: npm install --prefix examples/node")
    with LocalServer(tmp_path, listen="127.0.0.1:0") as server:
        command = ["node", NODE / "chunk.js", server.address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said == {"written": said["found"], "found": said["found"], "verified": ["k.1", "v.1", "pos.1"]}
        with kvbank.connect(server.address) as client:
            (chunk,) = client.fetch("node", [int(said["written"])], reader_digest="a1" * 32)
        assert chunk.tensors is not None
        assert float(chunk.tensors["v.1"].min()) == float(chunk.tensors["v.1"].max()) == 2
