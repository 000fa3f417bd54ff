"""The Python side of shim.c: build it, give it to a process, plan faults while that runs, read its log."""

import copy
import ctypes
import enum
import errno
import fcntl
import hashlib
import mmap
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_name("shim.c")


class Op(enum.IntFlag):
    """What a wrapped call does, by `enum op`."""

    CREATE = 1
    WRITE = 2
    TRUNCATE = 4
    ALLOCATE = 8
    SYNC = 16
    MKDIR = 32
    RMDIR = 64
    UNLINK = 128
    RENAME = 256
    LINK = 512
    OPEN = 1024
    READ = 2048
    # In the log only: what a client said.
    MARK = 4096


CHANGES = Op(1023)


class Action(enum.IntEnum):
    """What happens instead, by `enum action`; TORN writes half and fails, TORN_KILL writes half and dies."""

    OFF = 0
    FAIL = 1
    SHORT = 2
    TORN = 3
    TORN_KILL = 4
    KILL = 5
    KILL_AFTER = 6
    SLOW = 7
    FLIP = 8


class Rule(ctypes.Structure):
    """From the `nth` matching call on, or at it alone."""

    _fields_ = (
        ("ops", ctypes.c_uint32),
        ("action", ctypes.c_uint32),
        ("value", ctypes.c_int32),
        ("repeat", ctypes.c_uint32),
        ("nth", ctypes.c_uint64),
        ("seen", ctypes.c_uint64),
        ("fired", ctypes.c_uint64),
        ("path", ctypes.c_char * 88),
    )


class _Plan(ctypes.Structure):
    _fields_ = (("budget", ctypes.c_int64), ("used", ctypes.c_int64), ("rules", Rule * 4))


class Record(NamedTuple):
    """A change as it took place; `offset` is a TRUNCATE's size, and 1 for the SYNC of a folder, 2 for that of
    the whole disk."""

    op: Op
    inode: int
    offset: int
    path: str
    other: str
    data: bytes


_RECORD = struct.Struct("<IIQqIIQ")
_MAGIC = 0x4B56424B


def build(folder: Path) -> Path | None:
    """Compile the library, once for each version of the source; return None without a C compiler."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        return None
    library = folder / f"kvbank-shim-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = Path(place) / "shim.so"
            flags = ["-shared", "-fPIC", "-O1", "-fvisibility=hidden"]
            subprocess.run([compiler, *flags, "-o", str(made), str(SOURCE), "-ldl"], check=True)
            made.rename(library)
    return library


class Shim:
    """The fault layer under the processes that get `environment`, for everything below `root`."""

    def __init__(self, library: Path, root: Path, notes: Path, *, record: bool = False) -> None:
        """Lay the fault layer over `root`. notes: a folder outside of `root`, for the plan and the log."""
        root.mkdir(parents=True, exist_ok=True)
        self.root = root.resolve()
        plan = notes / "plan"
        plan.write_bytes(bytes(_Plan(budget=-1)))
        with open(plan, "r+b") as file:
            self._plan = _Plan.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(_Plan)))
        self.environment = {
            "LD_PRELOAD": str(library),
            "KVSHIM_ROOT": str(self.root),
            "KVSHIM_PLAN": str(plan),
        }
        self.log = notes / "log"
        if record:
            self.log.touch()
            self.environment["KVSHIM_LOG"] = str(self.log)

    def below(self, name: str) -> "Shim":
        """Return the same fault layer, for a folder of its own below `root`, with no faults planned and no limit."""
        part = copy.copy(self)
        part.root = self.root / name
        part.root.mkdir()
        part.clear()
        part.limit(None)
        return part

    def rule(
        self,
        action: Action,
        ops: Op = CHANGES,
        path: str = "",
        *,
        nth: int = 1,
        value: int = errno.EIO,
        repeat: bool = False,
        slot: int = 0,
    ) -> Rule:
        """Plan a fault, which counts from now on. The answer has what was `seen` and how often it `fired`."""
        rule = self._plan.rules[slot]
        rule.action = Action.OFF
        rule.ops, rule.path, rule.nth, rule.value, rule.repeat = ops, path.encode(), nth, value, repeat
        rule.seen = rule.fired = 0
        rule.action = action
        return rule

    def clear(self) -> None:
        """Plan no faults any more."""
        for rule in self._plan.rules:
            rule.action = Action.OFF

    def limit(self, size: int | None) -> None:
        """Let the folder hold `size` bytes of files, of which it has what is there now; None: as many as the disk."""
        self._plan.used = sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())
        self._plan.budget = -1 if size is None else size


def mark(log: Path, text: bytes) -> None:
    """Say something in the log, in order with the changes."""
    with open(log, "ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(_RECORD.pack(_MAGIC, Op.MARK, 0, 0, 0, 0, len(text)) + text)


def records(log: Path, begin: int = 0) -> Iterator[Record]:
    """Read the records in order, from the one at byte `begin`; a record that a kill cut short ends the log."""
    with open(log, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(begin)
        while head := file.read(_RECORD.size):
            magic, op, inode, offset, path_length, other_length, data_length = _RECORD.unpack(head)
            assert magic == _MAGIC
            if file.tell() + path_length + other_length + data_length > size:
                return
            path, other = file.read(path_length).decode(), file.read(other_length).decode()
            yield Record(Op(op), inode, offset, path, other, file.read(data_length))
