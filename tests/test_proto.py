"""The committed stubs are what the wire contract generates."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUBS = ROOT / "clients" / "python" / "kvbank" / "v1"


def test_regenerating_the_stubs_changes_nothing(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "proto" / "generate.py", tmp_path], check=True)
    fresh = {path.name: path.read_text() for path in (tmp_path / "kvbank" / "v1").iterdir()}
    committed = {path.name: path.read_text() for path in STUBS.glob("*_pb2*.py*")}
    assert fresh == committed
