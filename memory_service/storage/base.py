"""The seam between what the service does and where it keeps things. This file owns the protocols that an engine
implements (`Store`, `AccessRecords`, `SessionRecords`, `Objects`, and `Engine`, which joins them); nothing above it
knows SQL, a database or a disk.

A store holds banks, chunks, vectors and idempotency keys, and beside them tenants, their API keys and sessions; every
method that changes something is one atomic step. Objects hold the K-V of chunks, one immutable object each. The order
of a write is not an engine's: it stands in `memory_service.operations.writing` (object durable, then row, then
acknowledged). Neither is the search: an index is derived from the store, which tells it what is committed
(`Store.follow`, `Store.catch_up`) and lets it read what was committed before (`Store.snapshot`). So a second engine
brings no search of its own.

Errors that callers see are `ServiceError`s with the reason that each method names. Errors of the storage itself are
OSError and those of the engine's driver; the transport tells callers STORAGE_ERROR or DISK_FULL for them. An engine
says which, by registering its driver's errors with `domain.errors.refusal_for`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from memory_service.domain.access import ApiKey, KeyPlace
from memory_service.domain.clock import Clock
from memory_service.domain.forgetting import Receipt
from memory_service.domain.model import Bank, Chunk, Eviction, Filter, Metadata, Payload
from memory_service.domain.payload import Buffer
from memory_service.domain.sessions import Session, Turn, Window
from memory_service.domain.tenants import Tenant, TenantQuota, TenantUsage

# Ids of chunks [n], ascending.
Ids = NDArray[np.int64]
# Embeddings [n, d].
Vectors = NDArray[np.float32]
# What an object says of its chunk beside the tensors, made from their checksums; see `domain.payload`.
Copying = Callable[[Sequence[int]], Mapping[str, str]]
T = TypeVar("T")
# Returns the largest id of a chunk in what is derived from a store of this identity and kept in this folder, or 0.
DerivedId = Callable[[Path, str], int]


class DamagedError(Exception):
    """The error for an object whose bytes are not those that were written."""


class NotThereError(Exception):
    """The error for a place of objects that is not the one that was made for a bank: its disk is not mounted, or the
    bank is deleted."""


class FlawedError(Exception):
    """The error for rows of a bank that cannot be used. `flaws` says in a sentence, by chunk id, what is wrong."""

    def __init__(self, bank: Bank, flaws: Mapping[int, str]) -> None:
        super().__init__(f"{len(flaws)} rows of bank {bank.title} are damaged")
        self.bank = bank
        self.flaws = flaws


class New(NamedTuple):
    """A chunk that is to be added to a bank. digest: that of the request."""

    bank: Bank
    chunk: Chunk
    digest: bytes


@dataclass(frozen=True, slots=True)
class Written:
    """The answer to a write. `replayed` tells that its key was written before, under `chunk_id`; `gone`, that this
    chunk is removed or has expired since; `evicted` are the chunks that went for the write."""

    key: bytes
    chunk_id: int
    replayed: bool = False
    gone: bool = False
    evicted: tuple[int, ...] = ()


class Seen(NamedTuple):
    """What a caller has seen of a bank: its name and uid, how many chunks it held, and how many were ever written to
    it."""

    name: str
    uid: str
    chunks: int
    chunks_written: int


class Current(NamedTuple):
    """A bank as it is now. expired: the ids [n], ascending, of its chunks that have expired and are not removed yet;
    None where a view is to be asked for them."""

    bank: Bank
    expired: Ids | None = None


class Retrievals(NamedTuple):
    """How many retrievals a chunk has had, and when the first and the last of them was, in microseconds since 1970.
    renew: False for a chunk whose life no retrieval makes longer."""

    times: int
    first: int
    last: int
    renew: bool = True

    def joined(self, other: "Retrievals | None") -> "Retrievals":
        """Return these retrievals and some others of the same chunk together."""
        if other is None:
            return self
        first, last = min(self.first, other.first), max(self.last, other.last)
        return Retrievals(self.times + other.times, first, last, self.renew or other.renew)


class Totals(NamedTuple):
    """What all banks hold together. `stalled` are the banks with an eviction that could not be written and is tried
    again."""

    banks: int
    chunks: int
    tokens: int
    bytes: int
    stalled: int


class SessionTotals(NamedTuple):
    """What all sessions hold together: how many there are, how many of them a worker has, and the bytes of their
    turns."""

    sessions: int
    leased: int
    bytes: int


class Sizes(NamedTuple):
    """The bytes that the records take on the disk, and those of them that are free and could be given back."""

    taken: int
    free: int


class View(Protocol):
    """What a store holds at one moment: its reads all see the same rows. One thread at a time uses a view.

    A chunk that has expired at that moment is not there, whether or not it has been removed, except where a method says
    otherwise; a retrieval that was counted and is not written yet has renewed it where it would. Iterators are used up
    before the view ends. Errors: Cancelled, when the caller of the thread has gone.
    """

    def exists(self, bank: Bank) -> bool:
        """Tell whether a bank is there, and not deleted."""

    def bank(self, bank_id: int) -> Bank | None:
        """Read a bank by its id, with its usage; None where it is not there."""

    def banks(self, tenant: str, after: str = "") -> Iterator[Bank]:
        """Read the banks of a tenant with their usage, by name, from the first one after the name `after`."""

    def banks_of_all(self, tenant: str = "", name: str = "") -> Iterator[Bank]:
        """Read the banks of all tenants with their usage, by tenant and name, from the first one after these."""

    def chunk(self, bank: Bank, chunk_id: int, *, embedding: bool = False) -> Chunk | None:
        """Read a chunk of a bank; None where it is not there. Errors: FlawedError."""

    def chunks(self, bank: Bank, chunk_ids: Iterable[int]) -> Iterator[Chunk]:
        """Read those of the chunks that are there, in no order and without embeddings. Errors: FlawedError."""

    def page(self, bank: Bank, after: int, where: Filter, *, embedding: bool) -> Iterator[Chunk]:
        """Read the chunks that a filter lets pass, ascending by id, from the first one after `after`. Errors:
        FlawedError."""

    def message_bytes(self, times: Mapping[int, int]) -> tuple[int, int]:
        """Return the least and the most bytes that chunks take in messages, each id so many times, without reading
        their texts."""

    def ids(self, bank: Bank) -> Ids:
        """Return the ids of all chunks of a bank, expired ones included."""

    def vectors(self, bank: Bank, ids: Ids) -> tuple[Ids, Vectors]:
        """Return those of the ids that are there (expired ones included), ascending, and their embeddings [m, d].
        Errors: FlawedError."""

    def seen(self, bank: Bank, chunk_ids: Sequence[int]) -> list[Chunk]:
        """Return those of the chunks, without embeddings, that cost no message of their own: their rows are short, and
        this view has them at hand, or reads them together with something else. Those that have expired are left out.
        Errors: FlawedError."""

    def nearest(
        self, bank: Bank, query: Vectors, most: int, allowed: Ids | None, excluded: Ids
    ) -> tuple[Ids, Vectors] | None:
        """Return the chunks, at most `most`, whose embeddings have the largest inner products with a vector [d], as far
        as float32 tells, with these embeddings [m, d]; expired ones are included. allowed, excluded: the ids that may
        be returned, None for all, and that may not. None is returned where float32 does not tell, and by every view of
        a store that does not search. Errors: FlawedError."""

    def expired(self, bank: Bank) -> Ids:
        """Return the ids of chunks that have expired and are not removed yet."""

    def matching(self, bank: Bank, where: Filter, among: Sequence[int] | None = None) -> Ids:
        """Return the ids of chunks, ascending, that a filter lets pass, expired ones included. among: the ids that are
        asked about; None for all of the bank. Errors: FlawedError."""

    def evictions(self, bank: Bank, before: int) -> Iterator[tuple[int, Eviction]]:
        """Read (sequence, eviction) from the log of a bank, newest first, from the first one before `before`."""


class Follower(Protocol):
    """What is derived from a store, such as an index, and follows its commits.

    Of one bank the store tells it from one thread at a time, in the order of the commits and before a write is
    acknowledged, so a method must be short. What it raises is logged and undoes nothing.
    """

    def added(self, bank: Bank, ids: Sequence[int], vectors: Vectors) -> None:
        """Learn that chunks were added, with their embeddings [n, d]."""

    def removed(self, bank: Bank, ids: Sequence[int]) -> None:
        """Learn that chunks are gone; some of them may have been gone before, or never there."""

    def altered(self, bank: Bank, ids: Sequence[int]) -> None:
        """Learn that chunks have other metadata, or are pinned, or no longer."""

    def changed(self, bank: Bank) -> None:
        """Learn that a bank is new, or what it says of itself has changed."""

    def dropped(self, bank: Bank) -> None:
        """Learn that a bank is deleted."""

    def purge(self, bank: Bank | None) -> int:
        """Forget for good what was learned of chunks of a bank that are gone, or, for None, of banks that are deleted:
        when this returns, no file of the follower has any of it. Returns how many files were made anew. This blocks,
        and is called by another thread than the one that tells of commits."""


class Store(Protocol):
    """Banks, chunks and their vectors. Threads share a store, and its methods block.

    A method that changes something returns, or resolves its Future, when the change is durable (as far as the settings
    ask for that), is seen by every later read, and its followers know of it. A method that refuses has changed nothing.
    """

    @property
    def store_id(self) -> str:
        """Return the identity of what is stored; it is another one after data were lost or put back."""

    @property
    def searches(self) -> bool:
        """Tell whether views of the store can search by themselves (`View.nearest`), where that is sooner done than an
        index is loaded."""

    @property
    def clock(self) -> Clock:
        """Return the clock by which chunks are stamped and expire."""

    # Banks

    def create_bank(self, new: Bank) -> tuple[Bank, bool]:
        """Make a bank, whose `uid` and `created` are set here; return it and whether it is new. A bank of this tenant
        and name whose specs agree is returned as it is. The caller has checked the bank; the engine bounds all banks
        together by the settings `max_banks` and `max_bank_bytes`. Errors: BANK_EXISTS, TENANT_NOT_FOUND,
        QUOTA_EXCEEDED, TOO_LARGE, DISK_FULL, STORAGE_ERROR."""

    def bank(self, tenant: str, name: str) -> Bank:
        """Return a bank of a tenant, with the usage of some earlier time. Another tenant's bank is not told from one
        that is not there, neither by words nor by time. Errors: BANK_NOT_FOUND."""

    def bank_soon(self, tenant: str, name: str) -> "Bank | Future[Bank]":
        """Return a bank as `bank` does, or a future of it where something that may not answer has to be asked. Never
        blocks. Errors, also by the future: those of `bank`."""

    def known_banks(self) -> list[Bank]:
        """Return every bank of every tenant, with the usage of some earlier time."""

    def update_bank(self, tenant: str, name: str, changes: Mapping[str, object]) -> Bank:
        """Replace fields of a bank (capacity, policy, metadata, quota, expiry, index), and return it as it is then.
        The bank that results is checked here (`domain.validate.bank`), in the same step. Chunks beyond a lowered
        capacity go soon. Errors: INVALID_FIELD, BANK_NOT_FOUND, TOO_LARGE, DISK_FULL (not for capacity and policy,
        which make room)."""

    def delete_bank(self, tenant: str, name: str) -> None:
        """Delete a bank with all its chunks. It is gone at once; what it takes on the disk goes in the background.
        Errors: BANK_NOT_FOUND."""

    def replace_bank(self, tenant: str, seen: Seen, by: str, by_uid: str, metadata: Metadata) -> Bank:
        """Delete a bank and give its name to the bank `by`, in one step, and return the latter as it is then, with the
        metadata that are given and with capacity, policy, quota, expiry and index of the bank that is deleted. A bank
        of `by_uid` that has the name already is returned as it is. Errors: BANK_CHANGED, where the bank to be deleted
        is not as it was seen, or the other one is not `by_uid`; BANK_NOT_FOUND, INVALID_FIELD, TOO_LARGE."""

    # Writing

    def new_id(self) -> "int | Future[Any]":
        """Return an id for a chunk; ids ascend, and none is given twice, whatever is lost. Where ids must be reserved
        durably first, a future is returned: when it is done, ask again. Never blocks."""

    def room_for(self, bank: Bank, chunk: Chunk) -> "Future[None] | None":
        """Return what a write should wait for before its bytes are taken, such as a bank that is brought down to a
        capacity that was lowered; None where there is nothing. Never blocks. Errors, by the future: those of the
        storage, NOT_SERVING."""

    def replay_of(self, bank: Bank, key: bytes, digest: bytes | None) -> Written | None:
        """Look whether a key was written already, so that nothing is stored for a repeated write; None where it was
        not, as far as is committed. `add` looks again. digest: that of the whole request; None for a write of a chunk
        that is `if_absent`. Errors: KEY_REUSED, where the key was written with another request."""

    def add(self, new: "Sequence[New]") -> "list[Future[Written]]":
        """Add chunks to banks of one tenant, and return a future for each. The object of a chunk is durable already:
        its row, its key, the evictions that it needs, the quota and the usage of the bank are one step. Where the time
        has leapt since `chunk.created`, the chunk is stamped anew. Does not block.

        A chunk that is `if_absent` is added where no chunk of its key is there: one that is gone does not count, and
        one that is there is answered as a replay, whatever its content.

        Evictions are planned by `domain.eviction.plan`. A write takes whole steps of its plan (`Limits.step_rows`)
        until the chunk fits; the rest follows in the background, also after a restart, and until then the chunks in it
        are found as before. A pin saves a chunk from a plan; another capacity or policy ends the plan.

        A chunk whose metadata name a branch of a session (`domain.sessions.BRANCH`) is refused where it has tokens of
        that branch which were forgotten.

        Errors, by the futures: KEY_REUSED, BANK_NOT_FOUND, BANK_FULL, TOO_LARGE, QUOTA_EXCEEDED, TURN_FORGOTTEN; after
        any other error it is not known whether the chunk is there.
        """

    def set_metadata(self, bank: Bank, chunk_id: int, metadata: Metadata) -> bool:
        """Replace the metadata of a chunk, and return whether it exists. Errors: DISK_FULL, QUOTA_EXCEEDED,
        BANK_FULL."""

    def pin(self, bank: Bank, chunk_ids: Sequence[int], pinned: bool) -> int:
        """Protect chunks from eviction, or no longer, and return how many of them exist and have not expired."""

    def remove(self, bank: Bank, chunk_ids: Sequence[int]) -> "Future[list[int]]":
        """Delete chunks, and return those that existed, expired ones included. Their keys stay known for a day; their
        objects go in the background."""

    def set_aside(self, bank: Bank, why: Mapping[int, str]) -> list[int]:
        """Take damaged chunks out of service, and return those that existed: their rows and objects are kept aside,
        durably, before the rows go. why: a sentence for each chunk id. Errors: STORAGE_ERROR where the object of one
        could be made again, upon which none is set aside, and the caller asks again."""

    def count(self, counted: Mapping[int, Retrievals]) -> None:
        """Count retrievals by chunk id, of any banks. They are seen by reads at once, as far as expiry goes by them,
        and are durable within a second. Does not block."""

    # Reading

    def read(self, tenant: str = "", *, apart: bool = False) -> AbstractContextManager[View]:
        """Look at the store as it is now, with everything that was acknowledged. Views are short: the engine has only
        so many. tenant: whose banks alone are looked at, "" for those of all; an engine may hide the others. apart: for
        a caller to whom each read may show the rows of its own moment, which may be faster; the storage has answered
        the caller just now, so that nothing is tried again. Errors: Cancelled."""

    def show_counts(self) -> None:
        """Write the retrievals that were counted, so that views that begin later show them; where they cannot be
        written, views show those that are."""

    def explain_eviction(self, bank: Bank, need: int) -> tuple[list[Eviction], str]:
        """Return what a write of `need`, in the unit of the bank's capacity, would evict, in order, and a sentence
        about it; while a plan is under way, what is left of that. bank: as it is now, with its usage. Fewer are
        returned where they would fill a message."""

    def totals(self) -> Totals:
        """Add up what all banks hold."""

    # What is derived from the store

    def follow(self, follower: Follower) -> None:
        """Tell a follower of every commit from here on. It is called before the engine begins."""

    def current(self, tenant: str, names: Sequence[str]) -> list[Current]:
        """Return banks of a tenant as they are now, when the followers know all that was acknowledged of them: what
        `bank` and `catch_up` do one after the other. Errors: BANK_NOT_FOUND."""

    def foreseen(self, tenant: str, name: str, look: Callable[[Bank, View], T | None]) -> T | None:
        """Return what a look at a bank returns that is made before it is known whether the followers know all that was
        acknowledged of the bank; None where they do not, where a chunk of it has expired, and where the look returns
        None: then ask for what is `current`. This may be faster than to do that first, and need not be tried by an
        engine of one process. look: gets the bank, with the usage of some earlier time, and a view as of
        `read(apart=True)`; it may be called again. Errors: Cancelled; those of the look."""

    def catch_up(self, banks: Sequence[Bank]) -> None:
        """Return when the followers know all that was acknowledged of these banks, also by other processes on the same
        store. An engine of one process has nothing to do here: it tells them with the commit."""

    def snapshot(self, bank: Bank, begun: Callable[[], None]) -> AbstractContextManager[View]:
        """Open a view that other threads' commits do not wait for, however long it is read. `begun` is called at its
        moment: what followers are told before of the bank is in the view, what they are told after is not."""

    def in_order(self, bank: Bank, action: Callable[[], T]) -> "Future[T]":
        """Call an action between two commits to a bank, when followers know all earlier ones and no later one."""


class AccessRecords(Protocol):
    """Who may use a store: its tenants and their API keys. Threads share it, and its methods block. What a method
    changes is durable, and seen by every later read, when it returns; a method that refuses has changed nothing.

    The tenant "default" is always there.
    """

    def tenants(self) -> list[Tenant]:
        """Return all tenants, by name."""

    def tenant(self, name: str) -> Tenant:
        """Return the tenant of a name. Errors: TENANT_NOT_FOUND."""

    def tenant_usage(self, name: str) -> TenantUsage:
        """Add up what the banks of a tenant hold now; a name that is no tenant's holds nothing."""

    def add_tenant(self, name: str, quota: TenantQuota) -> Tenant:
        """Make a tenant, whose name and quota the caller has checked. Errors: TENANT_EXISTS, DISK_FULL."""

    def set_tenant_quota(self, name: str, quota: TenantQuota) -> Tenant:
        """Replace the quota of a tenant, which may be below what it holds: then its writes are refused until it holds
        less. Errors: TENANT_NOT_FOUND."""

    def drop_tenant(self, name: str, *, force: bool = False) -> int:
        """Delete a tenant with its keys, in one step, and return how many banks went with it. force: whether to delete
        its banks and sessions too. Where no other tenant has a key, the newest of the tenant stays, as a revoked one of
        the tenant "default", for all banks. Errors: TENANT_NOT_FOUND; TENANT_NOT_EMPTY where it has banks or sessions,
        or is the tenant "default"."""

    def add_key(self, key: ApiKey, *, most: int | None = None) -> bool:
        """Keep a key, and return whether its id was free. most: how many keys the tenant may have then that are neither
        revoked nor expired; None is any number. Errors: TENANT_NOT_FOUND, QUOTA_EXCEEDED, DISK_FULL."""

    def key(self, key_id: str) -> ApiKey | None:
        """Return the key of an id; None where there is none."""

    def keys_of(
        self, tenant: str | None = None, *, after: KeyPlace | None = None, most: int | None = None
    ) -> list[ApiKey]:
        """Return the keys of a tenant, or all keys, oldest first; those that are revoked or have expired too, for as
        long as `Limits.ended_key_s` says. after: the place of the key behind which to begin; it may be gone. most: how
        many at most."""

    def has_keys(self) -> bool:
        """Tell whether there is any key, good or not. Where there was one, there always is."""

    def revoke_key(self, key_id: str, at: int) -> ApiKey | None:
        """Revoke a key from a time on, in microseconds since 1970, and return it; None where there is none. A key that
        is revoked from an earlier time on stays as it is."""

    def used_key(self, key_id: str, at: int) -> None:
        """Note when a key was used last, in microseconds since 1970."""


class SessionView(Protocol):
    """What a store holds of sessions at one moment. A session that has expired at that moment is not there. One thread
    at a time uses a view, and iterators are used up before it ends. Errors of all methods: CHECKSUM_MISMATCH where a
    record is not as it was written; Cancelled, when the caller of the thread has gone."""

    def session(self, tenant: str, session_id: str) -> Session:
        """Read a session of a tenant, with its stretches. Another tenant's session is not told from one that is not
        there. Errors: SESSION_NOT_FOUND."""

    def named(self, tenant: str, name: str) -> Session:
        """Read a session of a tenant by its name, with its stretches. Errors: SESSION_NOT_FOUND."""

    def sessions(
        self,
        tenant: str,
        before: tuple[int, str] | None,
        metadata: Mapping[str, str],
        may_use: Callable[[str], bool] | None = None,
    ) -> Iterator[Session]:
        """Read the sessions of a tenant that have all these metadata, newest change first, damaged ones left out.
        before: time of change and id of the session behind which to begin. may_use: tells of a bank whether sessions
        that have their chunks there count; None for all."""

    def ended_at(self, tenant: str, key: str) -> Session:
        """Read the session of a turn, with the stretches by which one comes to the turn, which need not be those of the
        session any more. Errors: TURN_NOT_FOUND, SESSION_NOT_FOUND."""

    def turns(self, session: Session, after: int, *, token_ids: bool) -> Iterator[Turn]:
        """Read the turns of a session, as this view has it, from the first one behind the number `after`."""

    def turn(self, tenant: str, key: str, *, token_ids: bool) -> Turn:
        """Read a turn of a tenant by its key, also one from which its session was rewound. Errors:
        TURN_NOT_FOUND."""


class SessionRecords(Protocol):
    """The sessions of a store: their turns, and who may go on with each. Threads share it, and its methods block.

    What a method changes is durable, and seen by every later read, when it returns; a method that refuses has changed
    nothing. The rules of leases and numbers are those of `domain.sessions`, by the clock of the store; the caller has
    checked what it hands in (`domain.session_checks`). All methods refuse with SESSION_NOT_FOUND what is not there or
    has expired, and with CHECKSUM_MISMATCH a record that is not as it was written.
    """

    def read(self, tenant: str = "") -> AbstractContextManager[SessionView]:
        """Look at the sessions of a tenant as they are now, "" for those of all. Errors: Cancelled."""

    def create(self, new: Session) -> Session:
        """Make a session without turns, whose times and branch are set here. Errors: SESSION_EXISTS where its name is
        taken, TENANT_NOT_FOUND, QUOTA_EXCEEDED, DISK_FULL."""

    def update(self, tenant: str, session_id: str, changes: Mapping[str, object]) -> Session:
        """Replace fields of a session (name, metadata, settings, reads, ttl). Errors: SESSION_EXISTS, INVALID_FIELD,
        DISK_FULL."""

    def fork(self, tenant: str, new: Session, session_id: str, turn: int | None) -> Session:
        """Make a session with the turns of another up to one of them (None: its last); nothing is copied. new: its
        tenant, id, name and metadata; the rest is that of the other. Errors: TURN_NOT_FOUND, SESSION_EXISTS,
        INVALID_FIELD (too many stretches), QUOTA_EXCEEDED, DISK_FULL."""

    def fork_at(self, tenant: str, new: Session, key: str) -> Session:
        """Do as `fork`, behind the turn that has a key, also one from which its session was rewound. Errors: as those
        of `fork`."""

    def rewind(self, tenant: str, session_id: str, epoch: int, turn: int) -> Session:
        """Let a session go on behind an earlier turn, 0 for none. Its window goes, if it is of a later one. Errors:
        LEASE_LOST, TURN_NOT_FOUND, INVALID_FIELD (too many stretches)."""

    def acquire(self, tenant: str, session_id: str, holder: str, ttl: int) -> Session:
        """Give a session to a holder for `ttl` microseconds. Errors: LEASE_HELD."""

    def renew(self, tenant: str, session_id: str, epoch: int, ttl: int | None) -> Session:
        """Let a lease begin anew; ttl: None for the one that it has. Errors: LEASE_LOST."""

    def release(self, tenant: str, session_id: str, epoch: int) -> None:
        """End the lease of a session. Errors: LEASE_LOST where another one was given since."""

    def append(
        self, tenant: str, session_id: str, epoch: int, follows: int, turns: Sequence[Turn]
    ) -> tuple[list[Turn], Session]:
        """Add turns behind the last one, all or none, and renew the lease; return them as they are then. Turns that
        were appended before, with the same keys, content and place, are returned as they are. Errors: LEASE_LOST,
        TURN_CONFLICT where `follows` is not the last turn, KEY_REUSED, QUOTA_EXCEEDED, DISK_FULL."""

    def totals(self) -> SessionTotals:
        """Add up what all sessions hold."""


class Forgetting(Protocol):
    """The forgetting of what a store has, for good. Threads share it, and its methods block until no file of the store
    has a byte of what was forgotten.

    What is to be forgotten is written down first; what a stop interrupts is finished by the next start. Asking again
    does no harm: where nothing is left to forget, the receipt of before is returned. key_id: of the key by which it is
    asked for. Errors of all methods: NOT_SERVING, where the engine is brought to rest before all is gone, or somebody
    else reads what was forgotten; STORAGE_ERROR, where what is to go cannot be reached.
    """

    def turns(self, tenant: str, session_id: str, first: int, last: int, key_id: str) -> Receipt:
        """Forget turns of a session, both bounds included, in all its forks too, with the parts of their messages
        (status "part"); what is left are number, start and count of tokens. Chunks of their tokens go, and those of
        context "window" that were made behind them; every session that has the turns loses its window, and the worker
        that has the session its lease. Errors: SESSION_NOT_FOUND, TURN_NOT_FOUND, CHECKSUM_MISMATCH."""

    def turn(self, tenant: str, key: str, key_id: str) -> Receipt:
        """Do as `turns` for the turn that has a key, also one from which its session was rewound. Errors:
        TURN_NOT_FOUND."""

    def session(self, tenant: str, session_id: str, key_id: str) -> Receipt:
        """Forget a session with its window, its chunks and its turns, but for what forks have. A bank that was made for
        it and its forks goes with the last of them. Errors: SESSION_NOT_FOUND, CHECKSUM_MISMATCH."""

    def chunks(self, bank: Bank, where: Filter, key_id: str) -> Receipt:
        """Forget the chunks of a bank that a filter lets pass. Errors: BANK_NOT_FOUND, FlawedError."""

    def tenant(self, name: str, key_id: str) -> Receipt:
        """Forget a tenant with its keys, sessions and banks. Errors: TENANT_NOT_FOUND; TENANT_NOT_EMPTY for the tenant
        "default"."""


class NewWindow(Protocol):
    """A window whose bytes come in. Its user calls `close` at the end, whatever happened."""

    def add(self, data: Buffer) -> None:
        """Append bytes to the window. Errors: INVALID_FIELD where they are more than was said, OSError."""

    def keep(self) -> None:
        """Let this be the window of its session, unless that has one of a later turn. Errors: as those of
        `Windows.begin`; INVALID_FIELD, CHECKSUM_IN_TRANSIT where the bytes are not those that were said."""

    def close(self) -> None:
        """Let go of a window, which is there only if it was kept."""


class Windows(Protocol):
    """The local windows of sessions, each of which has at most one: a cache, so that they need not be durable, and may
    be gone at any time. A window goes with its session. Threads share it, and its methods block."""

    def begin(self, tenant: str, window: Window, epoch: int) -> NewWindow:
        """Begin to keep a window, by the lease of this epoch. Errors: SESSION_NOT_FOUND, LEASE_LOST; TURN_CONFLICT for
        a turn that the session does not have; QUOTA_EXCEEDED, DISK_FULL, OSError."""

    def open(self, tenant: str, session_id: str) -> "tuple[Window, Source] | None":
        """Open the window of a session, every byte of which is as it was kept; None where there is none. Errors:
        SESSION_NOT_FOUND, OSError."""


class Source(Protocol):
    """An object that is open for reading. It can be read to the end also after the object was deleted."""

    def read_at(self, room: memoryview, offset: int) -> int:
        """Fill `room` with the bytes from `offset` on, and return how many there were. Errors: OSError."""

    def close(self) -> None:
        """Let the object go; a second call does nothing."""


class Staged(NamedTuple):
    """A payload that a client of this machine has put beside the objects itself, in `Objects.staging`; only the engine
    looks into it. `name` is the name that the client has given it, `offset` the bytes of room before the tensors."""

    name: str
    offset: int


class Adopted(Protocol):
    """A staged payload that is the service's now, under a name that its maker does not know."""

    # The tensors, in descriptor order.
    data: memoryview

    def store(self, copy: Copying) -> Payload:
        """Make the object of it; return the descriptor as `Objects.put` does. The object is durable, and can be read,
        when the block of `Objects.adopt` has ended."""


class Objects(Protocol):
    """The K-V of chunks: one immutable object each, by bank uid and chunk id. Threads share objects; methods block.
    Errors: OSError where the storage fails."""

    @property
    def staging(self) -> Path | None:
        """Return the folder in which clients of this machine may put payloads themselves; None where they may not. The
        folder that contains it is the one that is shared with them, below which `path` names objects."""

    def waits(self, length: int) -> bool:
        """Tell whether `put` waits for the storage where the tensors have so many bytes, so that it is better called by
        several threads at once."""

    def put(self, bank_uid: str, chunk_id: int, payload: Payload, data: Buffer, copy: Copying) -> Payload:
        """Store `data` (all tensors, in descriptor order); return the descriptor with offsets in the object and
        checksums that are seeded with its owner. The object is durable then, or becomes durable with the row of its
        chunk. Errors: NotThereError."""

    def adopt(self, bank_uid: str, chunk_id: int, payload: Payload, staged: Staged) -> AbstractContextManager[Adopted]:
        """Take over a staged payload. Where the block stores nothing, or raises, the payload is removed. Errors:
        STAGED_FILE, NotThereError."""

    def expect(self, wanted: Iterable[tuple[str, int, Payload]]) -> None:
        """Learn which objects are about to be opened (bank uid, chunk id, descriptor), so that those that are far away
        are fetched together. Nothing fails here."""

    def open(self, bank_uid: str, chunk_id: int, payload: Payload) -> Source:
        """Open an object whose length and header are those of the descriptor. payload: the descriptor, which may be cut
        to the tensors that are going to be read. Errors: DamagedError, FileNotFoundError."""

    def discard(self, staged: Staged) -> None:
        """Remove a staged payload that is not taken over."""

    def delete(self, bank_uid: str, chunk_ids: Iterable[int]) -> None:
        """Delete objects of a bank; those that are not there are passed over."""

    def there(self, bank_uid: str) -> bool:
        """Tell whether the place of a bank's objects is the one that was made for them: otherwise a disk is missing,
        and no object of the bank is damaged."""

    def path(self, bank_uid: str, chunk_id: int) -> str | None:
        """Return the path of an object below the folder that is shared with clients of this machine; None where objects
        have none."""


class Reservation(Protocol):
    """Room that is kept for bytes that are about to be written. It ends with `give`, or with the block."""

    def give(self) -> None:
        """End the reservation of these bytes; a second call does nothing."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Space(Protocol):
    """Room for new data, as far as the engine is bounded. Threads share it."""

    def for_records(self, size: int = 0) -> Reservation:
        """Reserve bytes for rows. Errors: DISK_FULL, OSError."""

    def for_payload(self, size: int) -> Reservation:
        """Reserve bytes for an object. Errors: DISK_FULL, OSError."""

    def free(self) -> int | None:
        """Return the bytes that are left to the records; None where the engine cannot tell."""


class Engine(Protocol):
    """A store and the objects that belong to it, with what they do by themselves: expiry, evictions, clean-up.

    `memory_service.storage.opening.open_engine` makes one. Followers are told to the store first, then `begin` is
    called, at the end `rest` and `close`.

    An engine heeds the limits that it is made with, leaves out the work that the pauses name (`domain.limits.Work`),
    and counts in the metrics, and tells their recorder, what it has written, evicted and removed. Its clock goes on
    over a restart: it keeps the mark of the clock, resumes from it, and follows the wall clock as `domain.clock` says.
    """

    @property
    def store(self) -> Store:
        """Return the store of this engine."""

    @property
    def access(self) -> AccessRecords:
        """Return the tenants and keys of the store."""

    @property
    def sessions(self) -> SessionRecords:
        """Return the sessions of the store."""

    @property
    def forgetting(self) -> Forgetting:
        """Return what forgets for good."""

    @property
    def windows(self) -> Windows:
        """Return the local windows of the sessions in the store."""

    @property
    def objects(self) -> Objects:
        """Return the objects of the chunks in the store."""

    @property
    def space(self) -> Space:
        """Return the room that is left for new data."""

    @property
    def cache(self) -> Path:
        """Return the folder in which what is derived from the store may keep files of its own; they may be removed at
        any time."""

    def begin(self) -> None:
        """Begin what the engine does by itself, and go on with what a stop has interrupted. Errors: those of the
        storage."""

    def later(self, task: Callable[[], object]) -> None:
        """Run a task in the background, once, before the engine is closed; what it raises is logged."""

    def probe(self) -> None:
        """Ask the storage for something. Errors: those of a storage that does not answer."""

    def sizes(self) -> Sizes:
        """Measure the records on the disk."""

    def give_back(self) -> None:
        """Give the free bytes of the records back to the disk. This blocks, also while another caller does the same.
        Errors: Cancelled."""

    def rest(self) -> None:
        """End what the engine does by itself, and finish what it was given. Writes that wait are refused with
        NOT_SERVING."""

    def close(self) -> None:
        """Commit what is pending, and let go of everything. An engine that was not begun, or does not rest yet, is
        brought to rest first."""
