"""The table of settings in docs/worker.md: `python -m tests.worker.settings_table` writes it from the dataclasses."""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from model_worker.model_settings import ModelSettings
from model_worker.remember.settings import MemorySettings

DOCS = Path(__file__).parents[2] / "docs" / "worker.md"
MARKS = ("<!-- settings: begin -->\n", "<!-- settings: end -->")


def descriptions(kind: type) -> dict[str, str]:
    """Return the string under each field of a dataclass, by the field's name, on one line."""
    [tree] = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for declared, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(declared, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(declared.target, ast.Name)
            found[declared.target.id] = " ".join(str(text.value.value).split())
    return found


def table() -> str:
    """Return the settings, their defaults and descriptions as markdown: those of the model alone, then the memory's."""
    own = {field.name for field in fields(MemorySettings)}
    described = descriptions(ModelSettings) | descriptions(MemorySettings)
    return "\n".join(["| setting | default | what it is |", "|---|---|---|", *_rows(own, described)]) + "\n"


def _rows(own: set[str], described: dict[str, str]) -> Iterator[str]:
    for field in sorted(fields(ModelSettings), key=lambda field: field.name in own):
        default = f'"{field.default}"' if isinstance(field.default, str) else field.default
        yield f"| `{field.name}` | `{default}` | {described[field.name]} |"


if __name__ == "__main__":
    before, rest = DOCS.read_text().split(MARKS[0])
    DOCS.write_text(before + MARKS[0] + table() + MARKS[1] + rest.split(MARKS[1])[1])
