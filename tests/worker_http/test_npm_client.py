"""The npm client of OpenAI, where KVBANK_NODE_MODULES names a folder in which `npm install openai` has put it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.worker_http.conftest import MODEL, Running

MODULES = Path(os.environ.get("KVBANK_NODE_MODULES", "node_modules"))
pytestmark = [
    pytest.mark.skipif(not shutil.which("node"), reason="there is no node on this machine"),
    pytest.mark.skipif(not (MODULES / "openai").is_dir(), reason="KVBANK_NODE_MODULES names no folder with openai"),
]


def test_the_npm_client_gets_what_the_python_client_gets(worker: Running, tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(MODULES.resolve())
    script = shutil.copy(Path(__file__).with_name("smoke.mjs"), tmp_path)
    environment = {**os.environ, "BASE_URL": f"{worker.url}/v1", "MODEL": MODEL}
    ended = subprocess.run(["node", script], capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["chat"]
    assert found["first"] == found["streamed"]
    assert found["second"] == found["found"]
    assert found["cached"] > 0
    assert (found["last"], found["missing"]) == ("response.incomplete", 404)
    assert found["items"] == ["user", "user", "assistant"]
