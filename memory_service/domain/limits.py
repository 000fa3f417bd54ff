"""Figures and points that a test sets otherwise than the service does. This file owns that they are handed in from the
top (`open_engine`, `Server`), so that no test has to patch a module that goes by them.

A user sets none of these: what users set is in `memory_service.settings`.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Literal

# Work in the background that can be left undone: the removal of what has expired, the steps of evictions beyond the
# write that needs them, the removal of the rows of deleted banks, the writing of retrievals that were counted.
Work = Literal["expiry", "evictions", "clearing", "counts"]
# Points that are passed; an action that raises stands for a failure there.
Point = Literal[
    "answer",  # a storage thread begins to make an answer
    "query checked",  # a query is in order, and nothing was searched
    "index searched",  # an index is about to be searched
    "store searched",  # the store is about to search a bank whose index is not in memory
    "objects opened",  # the chunks of an answer are loaded, and their objects are about to be opened
    "answer opened",  # all objects of an answer are open
    "window opened",  # the window of a session is open, to be written or to be read
    "bytes read",  # some bytes of an object are about to be read
    "space reserved",  # a write has its room on the disk, or was refused it
    "object stored",  # the object of a chunk is about to be stored
    "submitted",  # an operation waits for the writer
    "counts written",  # the expiry has had the counts written, and is about to look at what has expired
    "plan",  # an eviction is about to be planned beside the writer
    "eviction",  # an eviction is about to go on in the background, in the writer's thread
    "eviction rests",  # an eviction is about to rest, because something was read during its step
    "eviction step",  # a step of it is about to remove rows
    "eviction planned",  # a step of it has saved what is left of its plan
    "ledger",  # a ledger is about to be read
    "clearing step",  # a step of the clearing of a deleted bank in a database has removed rows
    "files dropped",  # the files of a deleted bank are about to be removed
    "index loaded",  # an index has been read, and does not know yet what was committed meanwhile
    "index told",  # an index is about to learn of a commit
    "forgetting begun",  # it is written down what is to be forgotten, and nothing has gone
    "rows forgotten",  # rows of what is forgotten are gone, and its files are about to go
    "files forgotten",  # rows and files are gone, and what nothing uses of the database is about to be cleared
    "all forgotten",  # all is gone, and the receipt does not say so yet
]


@dataclass(frozen=True, slots=True)
class IndexLimits:
    """Figures that an index goes by, in rows (vectors) unless they say otherwise."""

    # The rows to which the last segment grows; where vectors are long it has fewer.
    tail_rows: int = 8192
    # Where a filter lets pass at most one of so many rows, these are read and scored without a search.
    read_one_of: int = 1000
    # The rows of a sealed segment that is made when an index is loaded, and of one that counts as small.
    segment_rows: int = 65_536
    small_rows: int = 8192
    # So many small segments are merged into one.
    most_small: int = 8
    # Fewer rows are not worth the training of lists.
    fewest_in_lists: int = 1024
    # What filters let pass is kept in memory for so many of them, and for so many ids (of 8 bytes) and letters of
    # filters together; for one in whose bank so many chunks have changed since it was asked about, no more.
    filters: int = 256
    matches: int = 1 << 23
    changes: int = 10_000
    # An index that takes more seconds to be loaded is not waited for where the store can search by itself.
    patience_s: float = 0.1


@dataclass(frozen=True, slots=True)
class ObjectLimits:
    """Figures by which objects in a bucket are written and read. Times are in seconds."""

    # That one request may take; each MiB that it sends or fetches has up to a second more.
    request_s: float = 10.0
    # For which a request that failed in passing is made again, and the pauses in between, which double.
    patience_s: float = 30.0
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0
    # Requests of all readers together that are under way at once, and the most bytes of one.
    requests: int = 16
    part_bytes: int = 8 * 1024 * 1024
    # So many bytes that nobody asked for are read where that saves a request.
    gap_bytes: int = 512 * 1024
    # For which an object is left alone that no row names: until it is marked, and from then until it is deleted.
    orphan_s: float = 86_400.0
    # Between two comparisons of all objects with the records.
    sweep_s: float = 6 * 3600.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Figures that the service goes by. Times are in seconds."""

    # Rows that one step of an eviction, of a removal, or of the clearing of a deleted bank takes, so that no write
    # waits long for the writer.
    step_rows: int = 250
    # Chunks of a bank from which on its evictions are planned beside the writer, which a plan would stop: for a
    # million, some tens of milliseconds.
    planned_beside: int = 50_000
    # Evictions that the log of a bank keeps.
    eviction_log: int = 10_000
    # Between two tries to go on with an eviction that could not be written; the pause doubles up to the longest one.
    first_pause_s: float = 1.0
    longest_pause_s: float = 60.0
    # Between two looks at what has expired, at the wall clock, and at evictions that could not be written.
    expiry_s: float = 1.0
    # For which one of the services on a store is given what only one does, and between two looks at deleted banks of
    # which something is left.
    lease_s: float = 10.0
    cleared_s: float = 10.0
    # Between two looks at the free pages of the database, and the free pages that are always left to it.
    vacuum_s: float = 10.0
    kept_pages: int = 4096
    # Between two looks at the storage, whose health is told.
    probe_s: float = 5.0
    # That figures of the storage may take before a scrape goes on without them.
    figures_s: float = 5.0
    # After which the keys of tokens are old, and for which they are not fetched again, whatever tokens say.
    token_keys_old_s: float = 300.0
    token_keys_seldom_s: float = 10.0
    # That the provider of those keys may take to answer.
    token_keys_patience_s: float = 5.0
    # Between two looks at the files of the certificate, of which each new connection has its own.
    certificate_s: float = 10.0
    # That a connection to /metrics, /healthz or /readyz may take, from its first byte to its last.
    http_patience_s: float = 10.0
    # That the handshake of a connection over gRPC may take, and that one may be open without a call.
    handshake_s: float = 10.0
    connection_idle_s: float = 1800.0
    # That the request of a call may take to come, and after which it is late: of one connection few are.
    request_s: float = 60.0
    request_late_s: float = 1.0
    # That a key is believed which was verified, and between two looks at the keys of calls under way: a revocation
    # takes effect within the longer of both.
    key_believed_s: float = 60.0
    key_looked_at_s: float = 30.0
    # Between two looks at whether the key, token or certificate of a call under way has ended.
    call_ends_s: float = 1.0
    # Keys of a tenant that are neither revoked nor expired.
    tenant_keys: int = 1000
    # For which a key that was revoked or has expired stays in the list, and how many of those a tenant keeps; and
    # between two removals of the others.
    ended_key_s: float = 30 * 86_400.0
    ended_keys: int = 10_000
    keys_tidied_s: float = 60.0
    # That a call waits at most whose tenant has made as many as its quota allows a second.
    held_back_s: float = 5.0
    # Before a key that is not valid is answered.
    wrong_key_s: float = 0.25
    # That a caller may be behind the least rate of bytes while others wait for room in memory, or while it sends a
    # window.
    stalled_s: float = 20.0
    # Payload files that all answers together hold open; those beyond it are opened when their turn comes.
    open_files: int = 512
    # Between two syncs of small payload files, whose bytes are in the records until then.
    sync_s: float = 1.0
    # Bytes of such files that are not synced yet; one beyond them is synced before its write is acknowledged.
    unsynced_bytes: int = 64 * 1024 * 1024
    # Bytes of tensors that the header of a chunk may bring along, so that many small chunks share a frame.
    inline_bytes: int = 16 * 1024
    # Request ids that are remembered of a tenant (34 MiB). Beyond 660 retrievals a second the oldest go sooner.
    requests_remembered: int = 200_000
    index: IndexLimits = IndexLimits()
    objects: ObjectLimits = ObjectLimits()


INDEX, OBJECTS, STANDARD = IndexLimits(), ObjectLimits(), Limits()


@dataclass(frozen=True, slots=True)
class Pauses:
    """Points that the service passes, by name. By default none of them does anything.

    left_out: work in the background that is not done, so that a test sees the time before it; a set that changes is
    looked at anew each time. at: what is called when the service passes a point, in the thread that passes it.
    """

    left_out: Set[Work] = frozenset()
    at: Mapping[Point, Callable[[], object]] = field(default_factory=dict)

    def leaves_out(self, work: Work) -> bool:
        """Tell whether the work of this name is not to be done."""
        return work in self.left_out

    def reach(self, point: Point) -> None:
        """Pass the point of this name; where a test waits at it, this returns when the test goes on."""
        if (action := self.at.get(point)) is not None:
            action()


NO_PAUSES = Pauses()
