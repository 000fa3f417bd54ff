"""One process owns a data folder, whatever is done to the files in it."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from memory_service.api.embedded import LocalServer
from memory_service.domain.errors import StartError
from memory_service.observe.metrics import Metrics
from memory_service.search import largest_id
from memory_service.settings import load
from memory_service.storage.local.files.folder import DataFolder, unserved
from memory_service.storage.opening import open_engine
from tests.support.engines import opened

CLEANED = {
    "removed": Path.unlink,
    "emptied": lambda path: path.write_text(""),
    "renamed": lambda path: path.rename(path.with_name("old.lock")),
    "made anew": lambda path: (path.unlink(), path.write_text("process 1\n")),
}


@pytest.mark.parametrize("name", CLEANED)
def test_who_cleans_up_the_lock_file_lets_no_second_server_in(serving, data, name):
    caller = serving()
    caller.create()
    chunk_id = caller.add()
    CLEANED[name](data / "kvbank.lock")
    for _ in range(2):
        with pytest.raises(StartError, match=r"is in use by .*; one server owns a data folder$"):
            LocalServer(data)
    with unserved(data) as free:
        assert not free
    assert list(caller.fetch(chunk_id)) == [chunk_id]
    serving.stop()
    with unserved(data) as free:
        assert free
    assert list(serving().fetch(chunk_id)) == [chunk_id]


def test_a_note_that_is_no_text_is_no_traceback(serving, data):
    serving()
    (data / "kvbank.lock").write_bytes(b"\xff\xfe process")
    with pytest.raises(StartError, match="is in use by"):
        LocalServer(data)


def test_a_folder_that_is_put_in_the_place_of_another_is_another(tmp_path):
    data = tmp_path / "data"
    first = DataFolder(data)
    data.rename(tmp_path / "moved")
    second = DataFolder(data)
    for path in (data, tmp_path / "moved"):
        with pytest.raises(StartError, match="is in use"):
            DataFolder(path)
    first.release()
    second.release()


FORKS = """
import os, sys
from pathlib import Path
from memory_service.storage.local.files.folder import DataFolder
folder = DataFolder(Path(sys.argv[1]))
if os.fork() == 0:
    print("forked", flush=True)
sys.stdin.read()
os._exit(0)
"""


def test_a_forked_child_does_not_keep_the_folder(tmp_path):
    """Children outlive a server that is killed, and would have to be found and asked to let go."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", FORKS, tmp_path], **pipes, text=True) as owner:
        assert owner.stdout.readline() == "forked\n"
        with pytest.raises(StartError, match=f"is in use by process {owner.pid};"):
            DataFolder(tmp_path)
        owner.kill()
        owner.wait()
        DataFolder(tmp_path).release()


def test_an_engine_that_was_not_begun_is_closed_with_all_its_threads(data):
    """Close an engine as a start does that fails after it was made: no thread of the engine is left."""
    before = threading.active_count()
    engine = open_engine(load({"data": data}), Metrics(), largest_id)
    assert threading.active_count() > before
    engine.close()
    assert threading.active_count() == before
    with opened(data) as again:
        assert again.store.known_banks() == []
