"""The settings: each has a flag, a variable and a row in docs/operations.md."""

import inspect
import re
from pathlib import Path

from memory_service.cli import serve
from memory_service.settings import Settings

TEXT = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def test_every_setting_is_documented_as_it_is() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `--([\w-]+)` \| `(\w+)` \| (\S*) \| .+ \|$", TEXT, re.MULTILINE)
    expected = []
    for name, field in Settings.model_fields.items():
        default = "required" if field.is_required() else f"`{field.default}`" if field.default != "" else "empty"
        expected.append((name, name.replace("_", "-"), f"KVBANK_{name.upper()}", default))
    assert rows == expected


def test_every_setting_has_a_flag() -> None:
    assert inspect.signature(serve).parameters.keys() - {"ready_file"} == Settings.model_fields.keys()
