"""What a disk may hold after a power cut, worked out from the log of a shim.

Rules: bytes of a file are safe once the file, or the whole disk, was synced after they were written; a name is safe
once its folder, or the whole disk, was synced after it changed. Of the rest anything may be there, as file systems have
it: none, all, the changes up to some moment (a journal), or any mix of it, where a write may be torn at sectors or have
left zeros. A rename is one step.
"""

import enum
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from tests.faults.shim import Op, Record

SECTORS = (512, 4096)


class Left(enum.Enum):
    """Of what was not synced."""

    NOTHING = enum.auto()
    ALL = enum.auto()
    JOURNAL = enum.auto()
    MIX = enum.auto()


class _File:
    def __init__(self) -> None:
        self.safe = bytearray()
        self.pending: list[Record] = []

    def sync(self) -> None:
        for change in self.pending:
            _change(self.safe, change, change.data)
        self.pending = []

    def content(self, left: Left, choose: random.Random) -> bytearray:
        """Metadata may be in a journal, data never is: JOURNAL is as MIX here."""
        found = bytearray(self.safe)
        fate = choose.choice(("none", "all", "some")) if left in (Left.JOURNAL, Left.MIX) else ""
        for change in self.pending:
            if left is Left.ALL or fate == "all":
                _change(found, change, change.data)
            elif fate == "some" and (part := _part(change, choose)) is not None:
                _change(found, change, part)
        return found


class _Name(NamedTuple):
    """A change of one name; None removes it. `needs`: the other half of a rename, which must be there too."""

    at: int
    name: str
    node: "_File | _Folder | None"
    needs: "tuple[_Folder, int] | None"


class _Folder:
    def __init__(self) -> None:
        self.live: dict[str, _File | _Folder] = {}
        self.safe: dict[str, _File | _Folder] = {}
        self.pending: list[_Name] = []

    def sync(self) -> None:
        changes, self.pending = self.pending, []
        for change in changes:
            if change.needs is not None and change.needs[0].waits_for(change.needs[1]):
                self.pending.append(change)
            else:
                _enter(self.safe, change)

    def waits_for(self, at: int) -> bool:
        return any(change.at == at for change in self.pending)

    def names(self, kept: Callable[["_Folder", int], bool]) -> dict[str, "_File | _Folder"]:
        found = dict(self.safe)
        for change in self.pending:
            if kept(self, change.at) and (change.needs is None or kept(*change.needs)):
                _enter(found, change)
        return found


class Disk:
    """The folder `root` of the log, from its first record to any later one."""

    def __init__(self, root: Path) -> None:
        self._root_path = str(root)
        self._root = _Folder()
        self._files: dict[int, _File] = {}
        self._now = 0
        self._last_sync = 0

    def apply(self, record: Record) -> None:
        """Apply the next record to the disk."""
        self._now += 1
        match record.op:
            case Op.CREATE:
                self._files[record.inode] = _File()
                self._name(record.path, self._files[record.inode])
            case Op.WRITE | Op.TRUNCATE:
                self._files[record.inode].pending.append(record)
            case Op.SYNC:
                self._last_sync = self._now
                if record.offset == 2:
                    self._sync_all(self._root)
                    return
                (self._folder(record.path) if record.offset else self._files[record.inode]).sync()
            case Op.MKDIR:
                self._name(record.path, _Folder())
            case Op.UNLINK | Op.RMDIR:
                self._name(record.path, None)
            case Op.LINK:
                self._name(record.path, self._files[record.inode])
            case Op.RENAME:
                parent, _, name = record.path.rpartition("/")
                node = self._folder(parent).live[name]
                self._name(record.other, node)
                new_folder = self._folder(record.other.rpartition("/")[0])
                self._name(record.path, None, needs=(new_folder, self._now))

    def write_out(self, target: Path, left: Left, choose: random.Random) -> None:
        """Make `target`, a new folder, what the disk holds if the power goes now."""
        moment = choose.randint(self._last_sync, self._now)
        prefixes: dict[int, int] = {}

        def kept(folder: _Folder, at: int) -> bool:
            if not folder.waits_for(at) or left is Left.ALL:
                return True
            if left is Left.MIX:
                changes = [change.at for change in folder.pending]
                return at <= prefixes.setdefault(id(folder), choose.choice([0, *changes]))
            return left is Left.JOURNAL and at <= moment

        def make(folder: _Folder, path: Path) -> None:
            path.mkdir(0o700)
            for name, node in folder.names(kept).items():
                if isinstance(node, _Folder):
                    make(node, path / name)
                elif not name.endswith("-shm"):  # SQLite's, of no meaning after a restart
                    (path / name).write_bytes(node.content(left, choose))

        make(self._root, target)

    def _sync_all(self, folder: _Folder) -> None:
        for file in self._files.values():
            file.sync()
        self._sync_names(folder)
        self._sync_names(folder)  # a rename waits for its other half, which may come later

    def _sync_names(self, folder: _Folder) -> None:
        folder.sync()
        for node in folder.live.values():
            if isinstance(node, _Folder):
                self._sync_names(node)

    def _folder(self, path: str) -> _Folder:
        node: _File | _Folder = self._root
        for name in path.removeprefix(self._root_path).strip("/").split("/"):
            if name:
                assert isinstance(node, _Folder)
                node = node.live[name]
        assert isinstance(node, _Folder)
        return node

    def _name(self, path: str, node: _File | _Folder | None, needs: tuple[_Folder, int] | None = None) -> None:
        parent, _, name = path.rpartition("/")
        folder = self._folder(parent)
        change = _Name(self._now, name, node, needs)
        _enter(folder.live, change)
        folder.pending.append(change)


def replay(root: Path, records: Iterable[Record], until: int | None = None) -> Disk:
    """Return the disk after the first `until` records, or all."""
    disk = Disk(root)
    for number, record in enumerate(records):
        if number == until:
            break
        disk.apply(record)
    return disk


def _enter(names: dict[str, _File | _Folder], change: _Name) -> None:
    if change.node is None:
        names.pop(change.name, None)
    else:
        names[change.name] = change.node


def _change(content: bytearray, change: Record, data: bytes) -> None:
    if change.op is Op.TRUNCATE:
        del content[change.offset :]
        content.extend(bytes(change.offset - len(content)))
        return
    content.extend(bytes(max(0, change.offset - len(content))))
    content[change.offset : change.offset + len(data)] = data


def _part(change: Record, choose: random.Random) -> bytes | None:
    """Choose what is there of one change: all, nothing, its first sectors, or zeros."""
    fate = choose.choice(("all", "none", "torn", "zeros"))
    if fate == "none":
        return None
    if fate == "torn":
        sector = choose.choice(SECTORS)
        borders = range(sector - change.offset % sector, len(change.data), sector)
        return change.data[: choose.choice([0, *borders])]
    return change.data if fate == "all" else bytes(len(change.data))
