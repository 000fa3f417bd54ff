"""Services of a folder have their socket in the temporary folder, and leave nothing there, killed or not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvbank

SERVES = """
import sys, kvbank
client = kvbank.connect(sys.argv[1])
client.list_banks()
print("serves", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_has_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    environment = os.environ | {"TMPDIR": str(place)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", SERVES]
    with (
        subprocess.Popen([*command, str(tmp_path / "a")], env=environment, text=True, **pipes) as killed,
        subprocess.Popen([*command, str(tmp_path / "b")], env=environment, text=True, **pipes) as living,
    ):
        assert killed.stdout is not None
        assert living.stdout is not None
        assert {killed.stdout.readline(), living.stdout.readline()} == {"serves\n"}
        killed.kill()
        killed.wait()
        other = place / "kvbank-abcdefgh"
        other.mkdir()
        (other / "note").write_text("of a person")
        folders = set(place.iterdir())
        assert len(folders) == 3
        for folder in folders:
            os.utime(folder, (0, 0))
        with kvbank.connect(tmp_path / "c") as client:
            client.list_banks()
            assert len(set(place.iterdir()) & folders) == 2
        assert len(set(place.iterdir())) == 2
        assert other in place.iterdir()
        living.communicate()
    assert list(place.iterdir()) == [other]
