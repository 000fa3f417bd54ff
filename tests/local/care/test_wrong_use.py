"""`kvbank check`, `repair`, `backup`, `restore`, used wrongly, or where they may not write."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from memory_service.api.embedded import LocalServer
from memory_service.domain.errors import StartError
from tests.local.care.folders import answer, clean, kinds, refusal, run, tree


def test_wrong_input_is_one_line_and_changes_nothing(places, tmp_path):
    before = tree(tmp_path, without=("-shm", "-wal"))
    for words, text in (
        ("check missing", "there is no folder"),
        ("check file", "is not a folder"),
        ("check empty", "is not a data folder of kvbank: it has no metadata.db"),
        ("repair missing", "there is no folder"),
        ("repair empty", "is not a data folder"),
        ("repair backup", "is a backup"),
        ("backup missing strange", "there is no folder"),
        ("backup empty missing", "is not a data folder"),
        ("backup data backup", "exists"),
        ("backup data file", "exists"),
        ("backup data data", "is inside of"),
        ("backup data data/inside", "is inside of"),
        ("backup data missing/dest", "there is no folder"),
        ("backup data strange", "note is not of an interrupted run"),
        ("backup data missing --base data", "is not a backup of kvbank: it has no backup.json"),
        ("backup data missing --base missing", "there is no folder"),
        ("restore missing strange", "there is no folder"),
        ("restore file missing", "is not a folder"),
        ("restore data missing", "is not a backup"),
        ("restore backup data", "exists and is not an empty folder"),
        ("restore backup file", "exists"),
        ("restore backup backup/inside", "is inside of"),
        ("restore backup missing/dest", "there is no folder"),
    ):
        command, *rest = words.split()
        assert text in refusal(command, *(places.get(word, word) for word in rest)), words
        assert tree(tmp_path, without=("-shm", "-wal")) == before, words


@pytest.mark.parametrize("command", ["check", "repair", "backup", "restore"])
def test_usage_errors_end_with_2(command):
    for words in ([], ["a", "b", "c"], ["--no-such"]):
        run(command, *words, code=2)
    assert "Usage: " in run(command, "--help").stdout


def test_a_backup_is_not_served(places, tmp_path):
    before = tree(places["backup"])
    with pytest.raises(StartError, match=r"is a backup; put it in place with: kvbank restore .*backup DATA"):
        LocalServer(places["backup"])
    assert tree(places["backup"]) == before


def test_without_permission(filled, data, tmp_path):
    if os.geteuid() != 0:
        data.chmod(0)
        try:
            assert "Permission denied" in refusal("check", data)
        finally:
            data.chmod(0o700)
        return
    run("check", data)  # imports what another user may not be able to read
    tmp_path.chmod(0)
    os.seteuid(65534)
    try:
        for command in (["check", data], ["repair", data], ["backup", data, "/nowhere/x"], ["restore", data, data]):
            assert "Permission denied" in refusal(*command)
    finally:
        os.seteuid(0)
        tmp_path.chmod(0o700)


@pytest.fixture
def reachable():
    """Make a folder that every user can reach, and in which only root can write."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        yield Path(place)


def sound_but_open(folder):
    """Return the totals of a folder that others may read, and in which nothing else is wrong."""
    found = answer("check", folder, code=1)
    assert kinds(found) == ["open_to_others"]
    return found["totals"]


@contextlib.contextmanager
def without_writing(folder):
    """Make a folder that cannot be written to; root, which can always write, is another user in the block."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)


def test_a_folder_that_cannot_be_written_to_is_checked_and_backed_up(filled, serving, data, reachable, connect):
    run("backup", data, reachable / "backup")  # imports what another user may not be able to read
    clean(reachable / "backup")
    serving()
    with connect(serving.server.address, first_key=1000) as caller:
        caller.add()
        # With a log that is not in the database yet, and the -shm that a kill leaves beside it; then without that.
        subprocess.run(["cp", "-r", data, reachable / "killed"], check=True)
        subprocess.run(["cp", "-r", data, reachable / "copied"], check=True)
    serving.stop()
    (reachable / "copied" / "metadata.db-shm").unlink()
    shutil.copytree(data, reachable / "stopped")
    shutil.copytree(data, reachable / "read")
    clean(reachable / "read")
    assert (reachable / "read" / "metadata.db-wal").exists()
    (reachable / "places").mkdir(0o777)
    (reachable / "places").chmod(0o777)
    for name in ("stopped", "read", "killed"):
        folder, place = reachable / name, reachable / "places" / name
        before = tree(folder)
        with without_writing(folder):
            assert sound_but_open(folder)["chunks"] == 6
            run("backup", folder, place)
            assert clean(place)["chunks"] == 6
        assert tree(folder) == before
    with without_writing(reachable / "copied"):
        for command in (["check", reachable / "copied"], ["backup", reachable / "copied", reachable / "places" / "x"]):
            assert "was not stopped cleanly: metadata.db-wal is not in the database yet" in refusal(*command)
    with without_writing(reachable / "backup"):
        sound_but_open(reachable / "backup")
