"""A model is fetched from a hub, by the hub's own client, from a server on this machine that answers alike."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_worker.pretrained.cache import kept_folder, kept_models
from tests.worker_session.conftest import save_model

COMMIT = "0123456789abcdef" * 2 + "01234567"
REPOSITORY = "nobody/tiny"

_OBTAIN = """
import json, sys
from dataclasses import replace
from pathlib import Path
from model_worker.errors import ModelNotFound
from model_worker.pretrained.catalogue import PRETRAINED, Hub
from model_worker.pretrained.obtain import obtain
files, sums = json.loads(sys.argv[1])
entry = replace(PRETRAINED["smollm2"], hub=Hub("nobody/tiny", tuple(files), sums))
try:
    print(obtain(entry, source="hub").new)
except ModelNotFound as error:
    print(error)
"""


class TinyHub:
    """A repository of some files, all of them large ones to the hub.

    asked: the files that were sent. damaged: files of which other bytes are sent.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.asked = files, []
        self.damaged: set[str] = set()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(True)

            def do_HEAD(self) -> None:
                self._answer(False)

            def log_message(self, *said: object) -> None:
                pass

            def _answer(self, with_body: bool) -> None:
                status, headers, body = hub.answer(self.path.partition("?")[0], with_body)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, with_body: bool) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body, as the hub's API and its files have them."""
        sums = {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}
        about = {name: {"size": len(data), "oid": sums[name]} for name, data in self.files.items()}
        if path == f"/api/models/{REPOSITORY}":
            listed = [
                {
                    "rfilename": name,
                    "size": len(data),
                    "lfs": {"sha256": sums[name], "size": len(data), "pointerSize": 1},
                }
                for name, data in self.files.items()
            ]
            return 200, {}, json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": listed}).encode()
        if path == f"/api/models/{REPOSITORY}/tree/{COMMIT}":
            rows = [
                {"type": "file", "path": name, **fields, "lfs": {**fields, "pointerSize": 1}}
                for name, fields in about.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(rows).encode()
        name = path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/")
        if name not in self.files:
            return 404, {}, b""
        if with_body:
            self.asked.append(name)
        data = self.files[name]
        data = bytes(len(data)) if name in self.damaged else data
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{sums[name]}"'}, data


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[TinyHub]:
    plain = save_model(tmp_path / "plain", 1)
    made = TinyHub({path.name: path.read_bytes() for path in plain.iterdir()} | {"onnx/model.onnx": b"large"})
    yield made
    made.server.shutdown()
    made.server.server_close()


def obtained(hub: TinyHub, sums: dict[str, str] | None = None) -> str:
    """Return what a process prints that gets the model from the hub: whether it is new, or the error."""
    files = [name for name in hub.files if "/" not in name]
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server.server_port}", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", _OBTAIN, json.dumps([files, sums or {}])],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_all_files_are_of_one_commit_and_the_rest_of_the_repository_stays_there(hub: TinyHub, cache: Path) -> None:
    assert obtained(hub) == "True"
    folder = kept_folder("smollm2")
    assert folder is not None
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in hub.files} == {
        name: data for name, data in hub.files.items() if "/" not in name
    }
    assert not (folder / "onnx").exists()
    assert not (folder / ".cache").exists()
    assert next(kept_models()).record.source == f"hub {REPOSITORY} at {COMMIT}"
    assert list(cache.glob("downloads/*")) == []


def test_a_damaged_answer_is_refused_and_only_what_is_missing_is_fetched_again(hub: TinyHub, cache: Path) -> None:
    hub.damaged = {"model.safetensors"}
    assert "model.safetensors is damaged or another file" in obtained(hub)
    assert kept_folder("smollm2") is None
    hub.damaged, hub.asked = set(), []
    assert obtained(hub) == "True"
    assert hub.asked == ["model.safetensors"]


def test_weights_that_are_not_those_of_the_catalogue_are_refused(hub: TinyHub, cache: Path) -> None:
    said = obtained(hub, {"model.safetensors": "0" * 64})
    assert "model.safetensors is damaged or another file" in said
    assert said.endswith(f"{'0' * 64} is expected")
    assert kept_folder("smollm2") is None
