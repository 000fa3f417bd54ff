"""The two ends of a copy: the store that is read, and the one that is made. What is above this file does not know
which engine either of them has.

A place that is being made has a mark, which says of which store it is a copy; while it has one, nothing serves or reads
it but the copy.
"""

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple, Protocol

from memory_service.care.copying.tables import Key, Row, Table
from memory_service.domain.model import Bank


class Object(NamedTuple):
    """What names bytes that belong to a row: the payload of a chunk, or of one that is out of service ("aside"), by the
    uid of its bank and its id; the window of a session, by the session's id and the window's checksum."""

    kind: Literal["payload", "aside", "window"]
    owner: str
    chunk_id: int = 0
    checksum: str = ""


class Numbers(NamedTuple):
    """What a store counts up: the first id of a chunk that was never given, the last ids of banks, turns and logged
    evictions. `now` is its time, in microseconds since 1970."""

    chunk: int
    bank: int
    turn: int
    eviction: int
    now: int


class Mark(NamedTuple):
    """What a place that is being made says: the identity of the store of which it is a copy, and its place in words."""

    store_id: str
    place: str


class Exported(Protocol):
    """A store that is read, as it is at one moment. Rows are read by one thread, objects by any. Errors of all methods:
    OSError, and those of the database."""

    @property
    def title(self) -> str:
        """Return the place in words, without a password."""

    @property
    def store_id(self) -> str:
        """Return the identity of the store."""

    def numbers(self) -> Numbers:
        """Return what the store counts up."""

    def forgettings(self) -> tuple[set[str], bool]:
        """Return the ids of all receipts of what was forgotten by now, and whether something is being forgotten."""

    def count(self, table: Table) -> int:
        """Count the rows of a table."""

    def rows(self, table: Table, after: Key = (), upto: Key = (), most: int | None = None) -> Sequence[Row]:
        """Return rows of a table in the order of their keys, from the first one behind `after` up to and with `upto`
        (both empty for no bound), `most` at most."""

    def alive(self, chunk_ids: Collection[int]) -> set[int]:
        """Return those of the chunks that are there still, where the store may have changed since its moment."""

    def read(self, what: Object) -> bytes:
        """Read the bytes of an object. Errors: FileNotFoundError; DamagedError where this one alone cannot be read;
        CareError where the place of the objects is not there."""


class Imported(Exported, Protocol):
    """A store that is being made. What a method has written is durable when it returns."""

    def check(self, bank: Bank) -> None:
        """Refuse a bank that this kind of store cannot have. Errors: CareError."""

    def put(self, what: Object, data: bytes) -> None:
        """Store an object, before its row."""

    def replace(self, table: Table, had: Sequence[Row], rows: Sequence[Row]) -> None:
        """Put rows in the place of those that `rows` has returned, in one transaction."""

    def delete(self, objects: Sequence[Object]) -> None:
        """Delete objects, after their rows; those that are not there are passed over."""

    def finish(self, numbers: Numbers) -> None:
        """Let the store go on from these numbers, make all of it durable, and take the mark away."""
