"""The rules of the repository hold themselves: imports, docstrings, the pictures of the house, the wire contract."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import sentences

ROOT = Path(__file__).resolve().parent.parent
BUF = Path(sys.executable).with_name("buf")
SOURCES = (
    "clients/python/kvbank",
    "memory_service",
    "model_worker",
    "benchmarks",
    "migrations",
    "docs",
    "examples",
    "tests",
)


def run(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_imports_keep_the_contracts() -> None:
    """Run in a process of its own: import-linter configures logging, and so silences the loggers of the tests."""
    run(Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo", ".importlinter")


@pytest.mark.parametrize("source", SOURCES)
def test_docstrings_are_sentences(source: str) -> None:
    paths = [path for path in sorted((ROOT / source).rglob("*.py")) if "v1" not in path.parts]
    found = [f"{path}:{line}: {what}: {first}" for path in paths for line, what, first in sentences.problems(path)]
    assert found == []


def test_the_pictures_show_what_the_code_imports() -> None:
    run(sys.executable, "docs/draw_house.py", "--check")


@pytest.mark.skipif(not BUF.exists(), reason="buf is not installed: its wheel is for common platforms only")
@pytest.mark.parametrize("command", [["lint"], ["breaking", "--against", "proto/landed.binpb"]], ids=" ".join)
def test_the_wire_contract_is_clean_and_breaks_no_landed_client(command: list[str]) -> None:
    run(BUF, *command)
