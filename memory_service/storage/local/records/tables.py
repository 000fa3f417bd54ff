"""The tables of metadata.db as they are in the last revision; see `schema` for those before.

They are tables and not classes of SQLAlchemy's ORM, whose import and mappings would take a sixth of a start.
"""

from sqlalchemy import Column, Index, MetaData, Named, Table, TypedColumns, UniqueConstraint, text

from memory_service.domain.tenants import DEFAULT_TENANT

# Indexes and keys are named alike in every version.
METADATA = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class _Store(TypedColumns):
    """The table of one row that has the identity of the folder and the first chunk id that is not reserved."""

    id: Named[int] = Column(primary_key=True)
    store_id: Named[str]
    next_chunk_id: Named[int]


STORE = Table("store", METADATA, _Store)


class _Clock(TypedColumns):
    """The table of one row that has the mark of the clock: the time of the service at some moment (`now`), the
    machine's clock that cannot be set at that moment (`running`), both in microseconds, and a name of the start of the
    machine (`boot`)."""

    id: Named[int] = Column(primary_key=True)
    now: Named[int]
    running: Named[int]
    boot: Named[str]


CLOCK = Table("clock", METADATA, _Clock)


class _Bank(TypedColumns):
    """The table of banks: specs are JSON, and every commit keeps the usage in step with the chunks. Names are unique
    within a tenant."""

    bank_id: Named[int] = Column(primary_key=True)
    uid: Named[str] = Column(unique=True)
    name: Named[str]
    spec: Named[str]
    capacity: Named[str | None]
    policy: Named[str]
    meta: Named[str]
    created: Named[int]
    chunks: Named[int]
    tokens: Named[int]
    bytes: Named[int]
    chunks_written: Named[int]
    chunks_evicted: Named[int]
    chunks_deleted: Named[int]
    chunks_quarantined: Named[int]
    chunks_expired: Named[int] = Column(server_default=text("0"))
    quota: Named[str] = Column(server_default=text("'{}'"))
    expiry: Named[str] = Column(server_default=text("'{}'"))
    index_kind: Named[str] = Column(server_default=text("'auto'"))
    tenant: Named[str] = Column(server_default=text(f"'{DEFAULT_TENANT}'"))


BANKS = Table("banks", METADATA, _Bank, UniqueConstraint("tenant", "name"), sqlite_autoincrement=True)


class _Tenant(TypedColumns):
    """The table of tenants, with their quotas as JSON; what a tenant uses is the sum of its banks."""

    name: Named[str] = Column(primary_key=True)
    quota: Named[str]
    created: Named[int]


TENANTS = Table("tenants", METADATA, _Tenant)


class _ApiKey(TypedColumns):
    """The table of API keys, of which it has no secret but the SHA-256; `banks` is a JSON list of globs. Times are in
    microseconds."""

    key_id: Named[str] = Column(primary_key=True)
    tenant: Named[str]
    role: Named[str]
    banks: Named[str]
    secret_sha256: Named[bytes]
    created: Named[int]
    expires: Named[int | None]
    revoked: Named[int | None]
    last_used: Named[int | None]


API_KEYS = Table(
    "api_keys", METADATA, _ApiKey, Index(None, "tenant", "created", "key_id"), Index(None, "created", "key_id")
)


class _GoneBank(TypedColumns):
    """The table of deleted banks whose chunks and files are still being removed; a bank's row here goes last."""

    bank_id: Named[int] = Column(primary_key=True, autoincrement=False)
    uid: Named[str]


GONE_BANKS = Table("gone_banks", METADATA, _GoneBank)


class _Chunk(TypedColumns):
    """The table of live chunks, with the columns that searches and evictions scan.

    Times are in microseconds; `expires` is null for a chunk that never expires. `digest` has the digest of the request
    and checksums of the row (see `row_checksum`), `size` the bytes that the chunk takes on the disk (see `chunk_size`).
    """

    chunk_id: Named[int] = Column(primary_key=True, autoincrement=False)
    bank_id: Named[int]
    key: Named[bytes]
    digest: Named[bytes]
    start: Named[int]
    original_length: Named[int]
    stored_length: Named[int]
    payload_bytes: Named[int]
    meta: Named[str]
    created: Named[int]
    retrieval_count: Named[int]
    last_retrieved: Named[int | None]
    pinned: Named[bool]
    ttl: Named[int]
    renew: Named[bool]
    expires: Named[int | None]
    size: Named[int] = Column(server_default=text("0"))


CHUNKS = Table(
    "chunks",
    METADATA,
    _Chunk,
    Index(None, "bank_id", "chunk_id"),
    Index(None, "expires", sqlite_where=text("expires IS NOT NULL")),
)


class _Content(TypedColumns):
    """The table of the wide columns of chunks, apart so that scans of `chunks` stay cheap. The embedding is float32 LE,
    the descriptor of the payload JSON."""

    chunk_id: Named[int] = Column(primary_key=True, autoincrement=False)
    token_ids: Named[bytes]
    text: Named[str]
    payload: Named[str | None]
    # Last, so that the other columns are read without it.
    embedding: Named[bytes]


CONTENTS = Table("contents", METADATA, _Content)


class _Unsynced(TypedColumns):
    """The table of small payload files that may not be on the disk yet: all bytes of each file and their xxh3-64, until
    the file is synced. A row goes with its chunk."""

    chunk_id: Named[int] = Column(primary_key=True, autoincrement=False)
    checksum: Named[bytes]
    file: Named[bytes]


UNSYNCED = Table("unsynced", METADATA, _Unsynced)


class _Key(TypedColumns):
    """The table of idempotency keys, with the chunk that was written under each, whether it lives or is gone.

    This is the only index of keys. Keys are random, so that neighbours lie on different pages: eviction leaves this
    table alone, and so writes to few pages.
    """

    bank_id: Named[int] = Column(primary_key=True, autoincrement=False)
    key: Named[bytes] = Column(primary_key=True)
    chunk_id: Named[int]


KEYS = Table("keys", METADATA, _Key, sqlite_with_rowid=False)


class _SpentKey(TypedColumns):
    """The table of chunks that are gone, kept for 24 h with their keys so that a repeated write is recognised."""

    bank_id: Named[int]
    key: Named[bytes]
    digest: Named[bytes]
    chunk_id: Named[int] = Column(primary_key=True, autoincrement=False)
    gone: Named[int] = Column(index=True)


SPENT_KEYS = Table("spent_keys", METADATA, _SpentKey)


class _Eviction(TypedColumns):
    """The log of evictions, which keeps a bounded number for each bank."""

    sequence: Named[int] = Column(primary_key=True)
    bank_id: Named[int]
    chunk_id: Named[int]
    reason: Named[str]
    retrieval_count: Named[int]
    start: Named[int]
    stored_length: Named[int]
    created: Named[int]
    evicted: Named[int]
    meta: Named[str]


EVICTIONS = Table("evictions", METADATA, _Eviction, Index(None, "bank_id", "sequence"), sqlite_autoincrement=True)


class _EvictionPlan(TypedColumns):
    """The table of evictions that go on in the background: what is left of each plan, so that a restart goes on with
    it."""

    bank_id: Named[int] = Column(primary_key=True, autoincrement=False)
    plan: Named[bytes]


EVICTION_PLANS = Table("eviction_plans", METADATA, _EvictionPlan)


class _Session(TypedColumns):
    """The table of sessions; lists and maps are JSON, and `name` is null where there is none. `checksum` is that of the
    row but for the times of expiry, which a leap of the clock moves."""

    session_id: Named[str] = Column(primary_key=True)
    tenant: Named[str]
    name: Named[str | None]
    bank: Named[str]
    reads: Named[str]
    reader_digest: Named[str]
    settings: Named[str]
    meta: Named[str]
    ttl: Named[int]
    branch: Named[str]
    head: Named[int]
    tokens: Named[int]
    forked_session: Named[str | None]
    forked_turn: Named[int | None]
    created: Named[int]
    updated: Named[int]
    expires: Named[int | None]
    epoch: Named[int]
    holder: Named[str | None]
    lease_expires: Named[int | None]
    lease_ttl: Named[int | None]
    checksum: Named[bytes]


SESSIONS = Table(
    "sessions",
    METADATA,
    _Session,
    UniqueConstraint("tenant", "name"),
    Index(None, "tenant", "updated"),
    Index(None, "tenant", "bank"),
    Index(None, "expires", sqlite_where=text("expires IS NOT NULL")),
)


class _Branch(TypedColumns):
    """The table of branches of sessions. A branch goes on behind the turn `cut_turn` of its parent (null for one that
    begins at the first turn), up to which there are `cut_tokens`. `session_id` is the session that has appended to it,
    or, where that is gone, one that has some of its turns. `bytes` is the sum of the sizes of its turns."""

    branch: Named[str] = Column(primary_key=True)
    session_id: Named[str] = Column(index=True)
    tenant: Named[str] = Column(index=True)
    parent: Named[str | None] = Column(index=True)
    cut_turn: Named[int]
    cut_tokens: Named[int]
    checksum: Named[bytes]
    # Below `checksum`, whose type has this name.
    bytes: Named[int]


BRANCHES = Table("branches", METADATA, _Branch)


class _Turn(TypedColumns):
    """The table of turns. `content` is the JSON of items, usage and metadata, `token_ids` uint32 LE, `digest` that of
    what the caller said, `size` what the turn counts of its tenant's bytes, `checksum` that of the row and that of the
    token ids."""

    turn_id: Named[int] = Column(primary_key=True)
    tenant: Named[str]
    key: Named[str]
    branch: Named[str]
    number: Named[int]
    start: Named[int]
    status: Named[str]
    token_count: Named[int]
    prompt_tokens: Named[int]
    kept: Named[int]
    created: Named[int]
    size: Named[int]
    digest: Named[bytes]
    checksum: Named[bytes]
    content: Named[bytes]
    # Last, so that the other columns are read without it.
    token_ids: Named[bytes]


TURNS = Table(
    "turns",
    METADATA,
    _Turn,
    UniqueConstraint("branch", "number"),
    UniqueConstraint("tenant", "key"),
    Index(None, "branch", "start", sqlite_where=text("status = 'forgotten'")),
)


class _Window(TypedColumns):
    """The table of local windows, of which each session has at most one; `file` is the name of the file with its bytes,
    and `checksum` the hexadecimal digits of their xxh3-64."""

    session_id: Named[str] = Column(primary_key=True)
    tenant: Named[str]
    turn: Named[int]
    stamp: Named[str]
    size: Named[int]
    checksum: Named[str]
    file: Named[str]


WINDOWS = Table("windows", METADATA, _Window)


class _Forgetting(TypedColumns):
    """The table of what was forgotten, without any of it: the receipt, and in `work`, as JSON of ids and numbers, what
    is still to be done; null where all is done. `subject` names what was asked for, so that asking again is answered
    with the same receipt; `counts` is JSON."""

    receipt_id: Named[str] = Column(primary_key=True)
    tenant: Named[str]
    subject: Named[str]
    key_id: Named[str]
    target: Named[str]
    time: Named[int]
    counts: Named[str]
    work: Named[str | None]


FORGETTINGS = Table("forgettings", METADATA, _Forgetting, Index(None, "tenant", "subject"))


class _ForgettingIds(TypedColumns):
    """The table of the chunks that are being forgotten by their ids, a JSON list, until all are gone. They may be many,
    and so do not stand in the row of `forgettings`, which each step writes anew."""

    receipt_id: Named[str] = Column(primary_key=True)
    tenant: Named[str]
    ids: Named[str]


FORGETTING_IDS = Table("forgetting_ids", METADATA, _ForgettingIds)


class _GoneBranch(TypedColumns):
    """The table of branches of sessions that were forgotten: a chunk of one that begins at `start` or behind it is not
    written any more. `gone` is the time of that."""

    branch: Named[str] = Column(primary_key=True)
    start: Named[int]
    gone: Named[int] = Column(index=True)


GONE_BRANCHES = Table("gone_branches", METADATA, _GoneBranch)
