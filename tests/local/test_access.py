"""What the service keeps is for its owner alone: no other user of the machine may open it."""

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import kvbank
from kvbank.files import private
from memory_service.api.embedded import LocalServer
from memory_service.care.backup import backup
from memory_service.care.check import check
from memory_service.care.repair import repair
from memory_service.care.restore import restore
from memory_service.domain.errors import StartError
from memory_service.storage.local.files.folder import DataFolder


@pytest.fixture(autouse=True, params=[0o000, 0o022])
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    """Return the modes of a folder and all in it that are not those of private ones."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            continue  # renamed by the server, which has just written it
        fine = {0o700} if stat.S_ISDIR(mode) else {0o700, 0o600} if stat.S_ISSOCK(mode) else {0o600}
        if stat.S_IMODE(mode) not in fine:
            found[str(path.relative_to(folder))] = oct(mode)
    return found


@pytest.fixture
def filled(serving, data, payload_path):
    """Make a served folder with all that a service makes: chunks, a log, snapshots, something in quarantine."""
    caller = serving(index_idle=0.001)
    caller.create()
    ids = [caller.add() for _ in range(3)]
    payload_path(ids[0]).write_bytes(b"")
    with pytest.raises(Exception, match="damaged"):
        caller.fetch(ids[0])
    caller.retrieve()
    assert (data / "quarantine").is_dir()
    return caller


def test_nothing_that_the_service_makes_is_open_to_others(filled, serving, data, tmp_path):
    assert {"metadata.db", "metadata.db-wal", "kvbank.lock", "payloads"} <= set(os.listdir(data))
    assert modes(data) == {}
    backup(data, tmp_path / "backup")
    serving.stop()
    assert modes(data) == modes(tmp_path / "backup") == {}
    restore(tmp_path / "backup", tmp_path / "restored")
    assert modes(tmp_path / "restored") == {}


def test_nobody_else_calls_at_a_unix_socket_in_an_open_folder(tmp_path):
    shared = tmp_path / "run"
    shared.mkdir(mode=0o777)
    address = f"unix:{shared / 'kvbank.sock'}"
    with LocalServer(tmp_path / "data", address, same_host=True, record=str(tmp_path / "data" / "trace")):
        with kvbank.connect(address) as client:
            assert client.server_info().store_id
        assert not (shared / "kvbank.sock").stat().st_mode & 0o077
        assert {"direct.sock", "staging", "trace", "same-host.nonce"} <= set(os.listdir(tmp_path / "data"))
        assert modes(tmp_path / "data") == {}


def test_folders_are_made_beside_others_who_make_them(tmp_path):
    """Threads make the same folders at once, as storage threads do for the first chunks of a bank."""
    with ThreadPoolExecutor(8) as threads:
        for bank in range(200):
            shards = [tmp_path / str(bank) / "payloads" / str(shard) for shard in range(8)]
            list(threads.map(private.make_folder, shards))
            assert all(shard.is_dir() for shard in shards)
    with pytest.raises(FileNotFoundError):
        private.make_folder(Path("/proc/kvbank/none"))


def opened_up(folder: Path) -> None:
    """Open a folder to others, as an earlier version left it."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_folder_of_an_earlier_version_is_closed_at_the_start_and_that_is_said_once(filled, serving, data, caplog):
    serving.stop()
    opened_up(data)
    (data / "of somebody else").write_text("")
    (data / "of somebody else").chmod(0o644)
    said = check(data).problems
    assert [problem.kind for problem in said] == ["open_to_others"]
    assert str(data) in said[0].detail
    for times in (1, 1):
        serving()
        serving.stop()
        assert sum("could be opened by other users" in record.message for record in caplog.records) == times
    assert modes(data) == {"of somebody else": oct(stat.S_IFREG | 0o644)}
    assert check(data).problems == []


def test_no_data_folder_is_begun_among_files_of_others(tmp_path):
    disk, theirs = tmp_path / "disk", tmp_path / "theirs"
    (disk / "lost+found").mkdir(parents=True)
    DataFolder(disk).release()  # the root of an empty disk
    theirs.mkdir()
    (theirs / "letter").touch()
    theirs.chmod(0o755)
    with pytest.raises(StartError, match="has other files and no memory; name a folder of its own"):
        DataFolder(theirs)
    assert os.listdir(theirs) == ["letter"]
    assert stat.S_IMODE(theirs.stat().st_mode) == 0o755


def test_what_everybody_shares_is_never_closed(tmp_path):
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    assert private.close([shared, Path("/")]) == (0, 0)
    assert stat.S_IMODE(shared.stat().st_mode) == 0o1777


def test_repair_closes_a_folder(filled, serving, data):
    serving.stop()
    opened_up(data)
    repaired = repair(data, dry_run=True)
    assert [(deed, problem.kind) for deed, problem in repaired.done] == [("corrected", "open_to_others")]
    assert modes(data)
    assert repair(data).left == []
    assert modes(data) == {}


def test_payloads_behind_a_link_are_closed_too(filled, serving, data, tmp_path):
    serving.stop()
    (data / "payloads").rename(tmp_path / "disk")
    (data / "payloads").symlink_to(tmp_path / "disk")
    opened_up(tmp_path / "disk")
    serving()
    assert modes(tmp_path / "disk") == {}


_TRY = """
import fcntl, os, sys
os.setgid(65534), os.setuid(65534)
for path in sys.argv[1:]:
    try:
        fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        print("opened", path)
    except PermissionError:
        pass
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to become another user")
def test_another_user_opens_and_locks_nothing(filled, data, tmp_path):
    for parent in (tmp_path, *tmp_path.parents):
        if parent.owner() == "root" and len(parent.parts) > 2:
            parent.chmod(parent.stat().st_mode | 0o055)  # /dev/shm keeps that everybody may write to it
    paths = [str(path) for path in (data, *data.rglob("*")) if not path.is_socket()]
    ended = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _TRY, *paths], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
