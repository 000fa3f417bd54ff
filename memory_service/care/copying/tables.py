"""What a copy of a store carries: its tables, and the columns of their rows. Rows are the same tuples whichever engine
they are read from, so that those of two stores can be compared.

Numbers are int, bool where they are one, texts str, bytes bytes; JSON is text, because checksums go by its bytes.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

from memory_service.domain.model import Bank
from memory_service.storage.banks import bank_json
from memory_service.storage.banks.bank_json import USAGE
from memory_service.storage.sessions.session_row import BRANCH_COLUMNS
from memory_service.storage.sessions.session_row import COLUMNS as SESSION_COLUMNS
from memory_service.storage.sessions.turn_row import COLUMNS as TURN_COLUMNS

# The values of a row in the order of the columns of its table.
Row = tuple[Any, ...]
# The first values of a row, by which the rows of a table are in order and of which no two are equal.
Key = tuple[Any, ...]


class Table(NamedTuple):
    """A kind of rows. The first `places` columns are the key. page: rows that are read at once."""

    name: str
    columns: tuple[str, ...]
    places: int = 1
    page: int = 512

    def key(self, row: Row) -> Key:
        """Return the key of a row."""
        return row[: self.places]

    def named(self, row: Row) -> dict[str, Any]:
        """Return the values of a row by column."""
        return dict(zip(self.columns, row, strict=True))


TENANTS = Table("tenants", ("name", "quota", "created"))
API_KEYS = Table(
    "api_keys",
    ("key_id", "tenant", "role", "banks", "secret_sha256", "created", "expires", "revoked", "last_used"),
)
_BANK = ("bank_id", "uid", "tenant", "name", "spec", "capacity", "policy", "meta", "quota", "expiry", "index_kind")
BANKS = Table("banks", (*_BANK, "created", *USAGE))
# The live chunks of banks that are not deleted, with their keys.
CHUNKS = Table(
    "chunks",
    (
        *("bank_id", "chunk_id", "key", "digest", "start", "original_length", "stored_length", "payload_bytes", "size"),
        *("created", "pinned", "ttl", "renew", "expires", "meta", "token_ids", "text", "payload", "embedding"),
        *("retrieval_count", "last_retrieved"),
    ),
    places=2,
    page=128,
)
# The keys of chunks that are gone: `digest` is that of the request.
SPENT_KEYS = Table("spent_keys", ("bank_id", "key", "chunk_id", "digest", "gone"), places=2)
EVICTIONS = Table(
    "evictions",
    (
        *("sequence", "bank_id", "chunk_id", "reason", "retrieval_count", "start", "stored_length", "created"),
        *("evicted", "meta"),
    ),
)
# What is left of evictions that go on in the background.
PLANS = Table("eviction_plans", ("bank_id", "plan"), page=16)
BRANCHES = Table("branches", BRANCH_COLUMNS)
TURNS = Table("turns", ("turn_id", *TURN_COLUMNS, "token_ids"), page=32)
SESSIONS = Table("sessions", SESSION_COLUMNS)
# The name under which the bytes of a window lie is each engine's own.
WINDOWS = Table("windows", ("session_id", "tenant", "turn", "stamp", "size", "checksum"), page=16)
FORGETTINGS = Table("forgettings", ("receipt_id", "tenant", "subject", "key_id", "target", "time", "counts", "work"))
GONE_BRANCHES = Table("gone_branches", ("branch", "start", "gone"))
# Chunks that were taken out of service: `time` is in seconds, `row` is JSON of the columns of CHUNKS; see `aside`.
QUARANTINE = Table("quarantine", ("uid", "chunk_id", "why", "time", "row"), places=2, page=128)

# In the order in which they are written: the banks come last, because they count what was written of their chunks.
PLAIN = (TENANTS, API_KEYS, EVICTIONS, BRANCHES, TURNS, SESSIONS, FORGETTINGS, GONE_BRANCHES)
ALL = (
    *(TENANTS, API_KEYS, CHUNKS, SPENT_KEYS, EVICTIONS, PLANS, BRANCHES, TURNS, SESSIONS, WINDOWS, FORGETTINGS),
    *(GONE_BRANCHES, QUARANTINE, BANKS),
)


def bank_of(row: Row) -> Bank:
    """Make the value of a row of BANKS. Errors: ValueError, KeyError, TypeError for one that is damaged."""
    return bank_json.bank_of(SimpleNamespace(**BANKS.named(row)))
