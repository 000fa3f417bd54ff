"""A command imports what it needs, and nothing that only others need: each of these packages takes as long to import as
many a command runs."""

import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import atexit, sys
unwanted = sys.argv.pop().split()
atexit.register(lambda: print(*(name for name in unwanted if name in sys.modules)))
from kvbank.cli import main
main()
"""
# Of all commands: the parts of other commands, what is for help alone, and what hardly anybody needs.
_NEVER = "rich torch sqlalchemy.orm alembic psycopg obstore jwt cryptography grpc_reflection.v1alpha.reflection"


@pytest.mark.parametrize(
    ("words", "said", "unwanted"),
    [
        ("serve --data FILE --listen 127.0.0.1:0", "it is a file", "kvbank._cli.commands model_worker"),
        (
            "check FILE",
            "is not a folder",
            "kvbank._cli.commands model_worker memory_service.api.server faiss grpc",
        ),
        ("ping unix:FILE", "unix:", "memory_service model_worker sqlalchemy faiss"),
    ],
)
def test_a_command_imports_what_it_needs(tmp_path: Path, words: str, said: str, unwanted: str) -> None:
    file = tmp_path / "file"
    file.touch()
    command = [sys.executable, "-c", _SCRIPT, *words.replace("FILE", str(file)).split(), f"{_NEVER} {unwanted}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert said in done.stderr  # it came so far
    assert done.stdout == "\n"
