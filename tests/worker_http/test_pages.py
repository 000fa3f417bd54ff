"""The page about HTTP: its commands do what it says, and it names what is taken."""

import json
import re
import subprocess
from pathlib import Path

from model_worker.http.errors import _TABLE
from model_worker.http.session_name import HEADERS
from tests.worker_http.conftest import MODEL, Running

TEXT = (Path(__file__).parents[2] / "docs" / "http.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_its_commands_are_answered(worker: Running) -> None:
    for block in BLOCKS:
        command = block.replace("http://127.0.0.1:8000", worker.url).replace("smollm2", MODEL)
        command = command.replace('"messages"', '"max_tokens": 8, "messages"') if "max_" not in command else command
        printed = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, check=True).stdout
        if '"stream": true' in command:
            events = [line.removeprefix("data: ") for line in printed.splitlines() if line]
            assert events[-1] == "[DONE]"
            assert json.loads(events[-2])["usage"]["completion_tokens"] == 40
        else:
            assert "error" not in json.loads(printed)
    assert len(BLOCKS) == 6


def test_it_names_the_headers_and_the_codes_of_errors() -> None:
    assert re.findall(r"`((?:X-|x-|session-id)[\w-]*)`", TEXT.partition("## Which session")[2])[: len(HEADERS)] == [
        *HEADERS
    ]
    codes = {each.code for each in _TABLE} - {"left", "too_large"}
    assert [code for code in codes if f"`{code}`" not in TEXT] == []
