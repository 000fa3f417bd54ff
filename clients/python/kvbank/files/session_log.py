"""The log of a chat session of versions that kept sessions in a folder: its lines, and what they say.

A log is one file of JSON lines: a first line that says what the session is, then one for each turn. Each line has a
checksum of its content and its place. This file owns the rule of which damage is a crash's and which is not: a line was
synced before it was acknowledged, so only a last line without its end, or with blocks of zeros that never came to the
disk, may be cut off; everything else was acknowledged and is damaged.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvbank._exceptions import DataLoss, InvalidArgument
from kvbank.files import checked_lines

LOG = "log.jsonl"
FORMAT = 2
_EARLIER = (1,)  # forms of the first line in which sinks and system prompt are missing: such sessions have none
_SECTOR = 512  # bytes that a disk writes whole


@dataclass(frozen=True, slots=True)
class Header:
    """What a session is; all of it is fixed when the session begins.

    model: the name that the model was loaded by. reader: the digest of the model, to which its K-V are bound. bank: the
    session's own bank. Unless it was given a name, its name carries a part of `uid`, so that sessions of one name on
    different machines never share a memory. chunk: tokens of a chunk; it is fixed so that a chunk which is written
    again begins where it began before. memory: the service that the session was begun with. created: a time in UTC.
    sinks: how many of the first tokens stay for good. system: the system prompt, which stands before the first turn;
    empty for none. embed: how the embedder of the bank is called; empty where that was not told. adapter: the folder of
    the model's adapter; empty for none, or where that was not told.
    """

    uid: str
    name: str
    model: str
    reader: str
    bank: str
    chunk: int
    memory: str
    created: str
    sinks: int = 0
    system: str = ""
    embed: str = ""
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """A finished turn, or a part of a message longer than the window that has been read (no text, no answer).

    ids: all tokens of the turn as the model saw them; the first `prompt` of them are not the answer. kept: tokens of
    the session that were safe in the bank (or its spool) when the turn was written: a window that is made again starts
    there. time: in UTC, to the second. part: whether this is such a part of a message.
    """

    text: str
    answer: str
    ids: list[int]
    prompt: int
    kept: int
    time: str
    part: bool = False


def first_line(header: Header) -> bytes:
    """Return the first line of a log."""
    return checked_lines.written({"kind": "session", "format": FORMAT, **asdict(header)}, 0)


def turn_line(turn: Turn, number: int) -> bytes:
    """Return the line of a turn. number: how many lines stand before it."""
    return checked_lines.written({"kind": "turn", **asdict(turn)}, number)


def parse(path: Path, data: bytes) -> tuple[Header | None, list[Turn], int]:
    """Return the header, the turns, and the number of bytes that these are of `data`; the rest is one torn line.

    The header is None where there is no line yet. Errors: DataLoss for a log that is damaged, InvalidArgument for one
    of another version.
    """
    header, turns, size = None, [], 0
    for number, line in enumerate(data.splitlines(keepends=True)):
        record = checked_lines.read(line, number)
        if record is None:
            if size + len(line) == len(data) and _torn(line, number, size):
                break
            raise DataLoss(f"{path}: line {number + 1} is damaged; the session cannot go on from a log with a hole")
        if number == 0:
            header = _header(path, record)
        else:
            record.pop("kind")
            turns.append(Turn(**record))
        size += len(line)
    return header, turns, size


def _torn(line: bytes, number: int, at: int) -> bool:
    """Tell whether a last line with a wrong checksum, at byte `at`, may be one that was never acknowledged.

    Such a line has no end, or blocks that never came to the disk and read as zeros (no line that was written has any).
    """
    holes = [(at + hole.start(), at + hole.end()) for hole in re.finditer(rb"\0+", line)]
    end = at + len(line)
    if holes and all((a == at or a % _SECTOR == 0) and (b == end or b % _SECTOR == 0) for a, b in holes):
        return True
    # With another end it would be right: then that is the damage.
    return not line.endswith(b"\n") and checked_lines.read(line[:-1] + b"\n", number) is None


def _header(path: Path, record: dict[str, Any]) -> Header:
    if record.pop("kind") != "session" or record.pop("format") not in (FORMAT, *_EARLIER):
        raise InvalidArgument(f"{path} was written by another version of kvbank")
    return Header(**record)
