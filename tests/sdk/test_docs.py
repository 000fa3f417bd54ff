"""The documentation runs, and misses nothing."""

import re
from pathlib import Path

import pytest

import kvbank

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "sdk.md").read_text()


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(block, "docs/sdk.md", "exec"), namespace)


def test_every_method_and_error_is_documented() -> None:
    names = [name for name in vars(kvbank.Client) if not name.startswith("_")]
    names += [
        name
        for name in kvbank.__all__
        if isinstance(getattr(kvbank, name), type(Exception)) and issubclass(getattr(kvbank, name), Exception)
    ]
    assert [name for name in names if not re.search(rf"\b{name}\b", TEXT)] == []
