"""The page about HTTP: its commands do what it says, and it names what is taken."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from model_worker.http.errors import _TABLE
from model_worker.http.session_name import HEADERS
from tests.worker_http.conftest import MODEL, Running

TEXT = (Path(__file__).parents[2] / "docs" / "http.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_its_commands_are_answered(worker: Running) -> None:
    ids = {"resp_ID": "", "conv_ID": "", "msg_ID": ""}
    for block in BLOCKS:
        command = block.replace("http://127.0.0.1:8000", worker.url).replace("smollm2", MODEL)
        for name, found in ids.items():
            command = command.replace(name, found)
        for field, most in (("messages", "max_tokens"), ("input", "max_output_tokens")):
            command = command.replace(f'"{field}"', f'"{most}": 8, "{field}"') if "max_" not in command else command
        printed = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, check=True).stdout
        if '"stream": true' in command:
            assert_streamed([line for line in printed.splitlines() if line])
            continue
        document = json.loads(printed)
        assert not document.get("error"), command
        for item in (document, *document.get("data", ())):
            named = [name for name in ids if str(item.get("id")).startswith(name.removesuffix("ID"))]
            ids |= dict.fromkeys(named, item.get("id"))
    assert all(ids.values())
    assert len(BLOCKS) == 23


def assert_streamed(lines: list[str]) -> None:
    """Fail where a stream has not ended as the page says."""
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    if events[-1] == "[DONE]":
        assert json.loads(events[-2])["usage"]["completion_tokens"] == 40
    else:
        assert json.loads(events[-1])["type"] == "response.incomplete"


def test_the_code_for_the_client_works(worker: Running) -> None:
    codes = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    for code in codes:
        here = code.replace("http://127.0.0.1:8000", worker.url).replace("smollm2", MODEL)
        exec(here.replace("input=", "max_output_tokens=8, input=").replace("messages=", "max_tokens=8, messages="), {})
    assert len(codes) == 3


def test_it_names_the_headers_and_the_codes_of_errors() -> None:
    assert re.findall(r"`((?:X-|x-|session-id)[\w-]*)`", TEXT.partition("## Which session")[2])[: len(HEADERS)] == [
        *HEADERS
    ]
    codes = {each.code for each in _TABLE} - {"left", "too_large"}
    assert [code for code in codes if f"`{code}`" not in TEXT] == []
