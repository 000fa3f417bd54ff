"""Models of sessions, which are conversations that any worker continues. Nothing here does I/O.

Lengths are in tokens, times are aware datetimes in UTC.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from kvbank._answer_trace import TRACE, AnswerTrace
from kvbank._arguments import each, instance, integer, text, texts_by_text, whole_by_text
from kvbank._models import Filter, Stretch

TurnStatus = Literal["completed", "incomplete", "part", "forgotten"]
_UINT32 = (0, 2**32 - 1)


@dataclass(frozen=True, slots=True)
class Item:
    """What was said, called or answered in a turn.

    role: "user", "assistant", "system", "tool" and so on. text: all its text. json: the whole item where it is more
    than a text, as its maker wrote it. id: at most 64 letters, of its maker.
    """

    role: str
    text: str = ""
    json: str = ""
    id: str = ""

    def __post_init__(self) -> None:
        for name in Item.__slots__:
            object.__setattr__(self, name, text(name, getattr(self, name)))


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a session: one that is to be appended, or one that was.

    items: what was said in it. token_ids: as the model saw them; empty in an answer that was not asked for them.
    prompt_tokens: the first so many are not of the answer. kept: tokens of the session that were safe in its bank when
        the turn was appended. usage: counts, by name. metadata: strings of the caller's.
    status: "completed"; "incomplete", whose answer was cut off; "part", a part of a message that is longer than the
        window, without an answer; "forgotten", of which nothing is left but its number and the count of its tokens.
    key: made once here, so that this object may be appended any number of times and is there once. At most 64 letters,
        unique within the tenant.
    number (from 1), start (tokens of the session before it), token_count, create_time, session_id: set by the service.
    """

    items: Sequence[Item] = ()
    token_ids: Sequence[int] = ()
    prompt_tokens: int = field(default=0, kw_only=True)
    kept: int = field(default=0, kw_only=True)
    status: str = field(default="completed", kw_only=True)
    usage: Mapping[str, int] = field(default_factory=dict, kw_only=True)
    metadata: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    key: str = field(default_factory=lambda: uuid.uuid4().hex, kw_only=True)
    number: int = field(default=0, kw_only=True)
    start: int = field(default=0, kw_only=True)
    token_count: int = field(default=0, kw_only=True)
    create_time: datetime | None = field(default=None, kw_only=True)
    session_id: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "items": tuple(each("items", self.items, _item)),
            "token_ids": tuple(each("token_ids", self.token_ids, _token)),
            "status": text("status", self.status),
            "usage": whole_by_text("usage", self.usage),
            "metadata": texts_by_text("metadata", self.metadata),
            "key": text("key", self.key),
            "session_id": text("session_id", self.session_id),
        }
        for name in ("prompt_tokens", "kept", "number", "start", "token_count"):
            checked[name] = integer(name, getattr(self, name))
        if self.create_time is not None:
            instance("create_time", self.create_time, datetime)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def text(self, role: str) -> str:
        """Return what all items of a role say, such as "assistant", each in lines of its own."""
        return "\n".join(item.text for item in self.items if item.role == role)

    @property
    def trace(self) -> AnswerTrace | None:
        """Return why its answer came, which its worker has kept in the metadata "trace"; None where none was kept."""
        return AnswerTrace.of_json(self.metadata[TRACE]) if TRACE in self.metadata else None


def _item(name: str, value: object) -> Item:
    return instance(name, value, Item)


def _token(name: str, value: object) -> int:
    return integer(name, value, _UINT32)


@dataclass(frozen=True, slots=True)
class TurnPoint:
    """A turn of a session, by its number."""

    session_id: str
    turn: int


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of one worker to append to a session. holder: as the worker has called itself. epoch: higher with every
    lease of the session. expire_time: when it ends unless it is renewed."""

    holder: str
    epoch: int
    expire_time: datetime


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation that any worker continues: an append-only line of turns, with a bank for its chunks.

    session_id: 32 hexadecimal digits. name: "" for a session that is only known by its id.
    bank: has its chunks, and those of its forks. reads: banks that it may read besides. reader_digest: of the model.
    settings: what a worker needs to go on, such as the model's name. metadata: strings of the caller's.
    head: the number of its last turn, 0 before the first. tokens: of all its turns.
    forked_from: None where it is not a fork. update_time: of its last turn, fork or rewind. expire_time: None where it
        is kept for ever. lease: None where no worker has it.
    stretches: which chunks of the bank are its own; see `filter`.
    """

    session_id: str
    name: str
    bank: str
    reads: tuple[str, ...]
    reader_digest: str
    settings: Mapping[str, str]
    metadata: Mapping[str, str]
    head: int
    tokens: int
    forked_from: TurnPoint | None
    create_time: datetime
    update_time: datetime
    expire_time: datetime | None
    lease: Lease | None
    stretches: tuple[Stretch, ...]

    @property
    def filter(self) -> Filter:
        """Return the filter of the chunks that are its own, for a search in its bank."""
        return Filter(stretches=self.stretches)


@dataclass(frozen=True, slots=True)
class Window:
    """The local window of a session after a turn, as a worker made it. stamp: what a worker must agree with to use it.
    data: verified bytes."""

    turn: int
    stamp: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ForgottenChunk:
    """A chunk that was forgotten. checksum: `Chunk.checksum`; 0 for one that had no payload."""

    bank: str
    chunk_id: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was forgotten, for good: when it was answered, no file of the store had a byte of it, but for what `remains`
    says.

    key_id: of the key by which it was asked for, "" for the owner of the store. target: what was asked for, in words.
    chunks: the first 10,000 of `chunk_count`.
    turns, tokens, bytes: how much went. places: where something went, such as "rows", with how much.
    turns_kept: turns that stay because forks have them. chunks_to_make_again: chunks that had attended to what was
        forgotten, and went with it; a worker makes them again from the turns.
    remains: what no service can clear, and who can, in words; "" where all is gone.
    """

    receipt_id: str
    time: datetime
    key_id: str
    target: str
    chunks: tuple[ForgottenChunk, ...]
    turns: int
    tokens: int
    bytes: int
    places: Mapping[str, int]
    turns_kept: int
    chunks_to_make_again: int
    remains: str = ""

    @property
    def chunk_count(self) -> int:
        """Return how many chunks went; `chunks` names only the first of very many."""
        return self.places.get("rows", 0) - self.turns
