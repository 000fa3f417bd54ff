"""Files that are written aside and renamed: whole or as they were, private, and durable in the right order."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbank.files import durable, locks


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the syncs and renames, in their order, by the names of files and folders."""
    found: list[str] = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        found.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        found.append(f"rename {old.name} {new.name}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    return found


@pytest.mark.parametrize(
    ("sync", "expected"),
    [
        ("nothing", ["rename a.tmp a.json"]),
        ("bytes", ["sync a.tmp", "rename a.tmp a.json"]),
        ("name", ["sync a.tmp", "rename a.tmp a.json", "sync folder"]),
    ],
)
def test_bytes_are_durable_before_their_name(
    tmp_path: Path, steps: list[str], sync: durable.Sync, expected: list[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    durable.replace(folder / "a.json", [b"one", memoryview(b" two")], sync=sync)
    assert steps == expected
    assert (folder / "a.json").read_bytes() == b"one two"
    assert os.listdir(folder) == ["a.json"]


def test_what_is_replaced_is_as_it_was_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    durable.replace(path, [b"before"])

    def parts() -> Iterator[bytes]:
        yield b"half"
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        durable.replace(path, parts())
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_file_is_its_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        durable.replace(tmp_path / "a.json", [b"x"])
        durable.make_folder(tmp_path / "b" / "c")
        durable.make_folder(tmp_path / "d" / "e", open_parents=True)
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.json", "b", "b/c", "d", "d/e")}
    assert modes == {"a.json": 0o600, "b": 0o700, "b/c": 0o700, "d": 0o777, "d/e": 0o700}


def test_the_name_of_a_new_folder_is_durable_in_the_folder_above(tmp_path: Path, steps: list[str]) -> None:
    durable.make_folder(tmp_path / "a" / "b")
    assert steps == [f"sync {tmp_path.name}", "sync a"]
    steps.clear()
    durable.make_folder(tmp_path / "a" / "b")
    assert steps == []


def test_no_link_in_the_place_of_the_temporary_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"kept")
    (tmp_path / "a.tmp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        durable.replace(tmp_path / "a.json", [b"x"])
    assert (tmp_path / "elsewhere").read_bytes() == b"kept"
    durable.replace(tmp_path / "a.json", [b"x"])  # the link is gone


@pytest.mark.parametrize(("held", "wanted", "free"), [(False, False, False), (True, True, True), (True, False, False)])
def test_a_lock_is_of_the_descriptor(
    tmp_path: Path, held: bool, wanted: bool, free: bool, request: pytest.FixtureRequest
) -> None:
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    request.addfinalizer(lambda: os.close(second))
    assert locks.take(first, shared=held)
    assert locks.take(second, shared=wanted) is free
    os.close(first)
    assert locks.take(second, shared=wanted)
