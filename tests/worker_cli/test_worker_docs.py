"""The Python blocks of the worker's pages do what they show, one after the other."""

import re
from pathlib import Path

import pytest

from tests.support.diagonal import rotated

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", rotated(["worker.md", "chat.md", "compression.md", "icae.md"], 0, every=2))
def test_blocks_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page} block {number}", "exec"), {})
    printed = capsys.readouterr().out
    expected = {
        "worker.md": "chunks written",
        "chat.md": "\n",
        "compression.md": "became 512 and go on",
        "icae.md": "stored slots",
    }
    assert expected[page] in printed
