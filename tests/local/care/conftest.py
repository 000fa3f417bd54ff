"""Folders of a real server, served and not."""

import shutil

import pytest

from kvbank.v1 import service_pb2 as pb
from tests.local.care.folders import run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Say where the folder of `filled` is kept, so that only the first test waits for a server."""
    return {"folder": tmp_path_factory.mktemp("filled") / "data"}


@pytest.fixture
def filled(made, serving, data):
    """Make a folder that was served, with two banks, five chunks and a sixth that is deleted; give the payloads' bytes
    by chunk."""
    if "stored" not in made:
        caller = serving()
        caller.create()
        caller.create("plain", layers=())
        for vector in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0.5, 0.5, 0, 0)):
            caller.add(vector)
        caller.add(bank="plain", layers=())
        gone = caller.add()
        caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[gone]))
        stored = caller.retrieve(top_k=10)[1]
        serving.stop()
        shutil.copytree(data, made["folder"])
        made["stored"] = stored
    else:
        shutil.copytree(made["folder"], data)
    return dict(made["stored"])


@pytest.fixture
def places(filled, data, tmp_path):
    """Names in the cases below -> paths."""
    run("backup", data, tmp_path / "backup")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "strange.partial").mkdir()
    (tmp_path / "strange.partial" / "note").write_text("mine")
    names = ("data", "backup", "file", "empty", "missing", "strange", "data/inside", "backup/inside", "missing/dest")
    return {name: tmp_path / name for name in names}
