"""Objects without a row and rows without an object, in a real database and a real bucket."""

import time

import pytest

from memory_service.storage.s3.layout import key
from memory_service.storage.s3.orphans import Orphans, Swept
from tests.support import postgres

HOUR = 3_600_000_000
UID, OTHER = "0123456789abcdef", "f" * 16
_BANK = """
    INSERT INTO banks (bank_id, uid, tenant, name, spec, policy, meta, quota, expiry, index_kind, size, created)
    VALUES (nextval('bank_ids'), %s, '', %s, '', '', '', '', '', '', 0, 0)
"""
_ASIDE = "INSERT INTO quarantine (chunk_id, bank_id, uid, why, time, record) VALUES (%s, 0, %s, '', 0, '')"
_CHUNK = """
    INSERT INTO chunks (bank_id, chunk_id, key, digest, start, original_length, stored_length, payload_bytes, size,
    created, pinned, ttl, renew, meta, tags, token_ids, text, payload, embedding)
    SELECT bank_id, %s, '', '', 0, 1, 1, 1, 1, 0, false, 0, false, '', '{}', '', '', %s, '[1]' FROM banks WHERE uid = %s
"""


class Records:
    """The rows of a real database, and how a test changes them."""

    def __init__(self, database):
        from memory_service.storage.postgres.database import raw
        from memory_service.storage.postgres.object_rows import ObjectRows

        self._database, self._raw, self.losses = database, raw, []
        self.rows = ObjectRows(database, lambda uid, chunk_id: self.losses.append((uid, chunk_id)))

    def run(self, statement, *values):
        self._database.change(lambda connection: self._raw(connection).execute(statement, values))

    def add(self, uid, ids, payload="{}"):
        for chunk_id in ids:
            self.run(_CHUNK, chunk_id, payload, uid)

    def marks(self):
        with self._database.read() as connection:
            return sorted(name for (name,) in self._raw(connection).execute("SELECT object FROM marks"))


@pytest.fixture
def records():
    if why := postgres.missing():
        pytest.skip(f"no PostgreSQL here: {why}")
    from memory_service.storage.postgres.database import Database

    with postgres.database() as url:
        database = Database(url)
        try:
            made = Records(database)
            made.run(_BANK, UID, "b")
            yield made
        finally:
            database.close()


@pytest.fixture
def at(bucket, records):
    """Sweep at an hour from now on."""

    def sweep(hour, **arguments):
        return Orphans(bucket, records.rows, lambda: round(time.time() * 1e6) + hour * HOUR).sweep(**arguments)

    return sweep


def put(bucket, uid, ids):
    for chunk_id in ids:
        bucket.put_new(key(uid, chunk_id), [b"x"])


def held(bucket):
    return [item.key for page in bucket.pages("chunks") for item in page]


def test_an_object_goes_when_it_was_without_a_row_for_two_graces(bucket, records, at):
    put(bucket, UID, range(1, 5))
    put(bucket, OTHER, [9])
    bucket.put_new("chunks/of somebody/else", [b"x"])
    bucket.put_new("kvbank.store", [b"x"])
    records.add(UID, [2])
    put(bucket, UID, [5])
    records.run(_ASIDE, 5, UID)
    assert at(23) == Swept()
    assert at(25) == Swept(marked=4)
    assert records.marks() == [key(UID, 1), key(UID, 3), key(UID, 4), key(OTHER, 9)]
    assert at(48) == Swept()
    # A row that comes late saves its object for good.
    records.add(UID, [3])
    assert at(50) == Swept(deleted=3)
    assert held(bucket) == [key(UID, 2), key(UID, 3), key(UID, 5), "chunks/of somebody/else"]
    assert bucket.size("kvbank.store") == 1
    assert records.marks() == []
    assert at(100) == Swept()
    assert records.losses == []


@pytest.mark.slow
def test_a_mark_whose_object_has_gone_goes_too(bucket, records, at):
    put(bucket, UID, [1])
    assert at(25).marked == 1
    bucket.delete([key(UID, 1)])
    at(30)
    assert records.marks() == [key(UID, 1)]
    at(25 + 5 * 24 + 1)
    assert records.marks() == []


def test_a_row_whose_object_is_missing_is_lost(bucket, records, at, monkeypatch):
    monkeypatch.setattr("memory_service.storage.s3.bucket._PAGE", 3)
    records.run(_BANK, OTHER, "other")
    records.add(UID, range(1, 12))
    records.add(UID, [12], payload=None)
    records.add(OTHER, [21, 22])
    put(bucket, UID, [2, 3, 4, 6, 8, 9])
    assert at(0) == Swept(lost=7)
    assert records.losses == [(UID, 1), (UID, 5), (UID, 7), (UID, 10), (UID, 11), (OTHER, 21), (OTHER, 22)]
    assert len(held(bucket)) == 6


@pytest.mark.slow
def test_a_chunk_that_comes_or_goes_meanwhile_is_not_lost(bucket, records, at):
    put(bucket, UID, [2])
    records.add(UID, [1, 2, 3])

    class Moving:
        """The records while others write: chunk 1 gets its object, and chunk 3 goes, when they have been listed."""

        def __getattr__(self, name):
            return getattr(rows, name)

        def chunks(self, uid, after, upto):
            found = rows.chunks(uid, after, upto)
            if 1 in found:
                put(bucket, UID, [1])
            if 3 in found:
                records.run("DELETE FROM chunks WHERE chunk_id = 3")
            return found

    rows, records.rows = records.rows, Moving()
    assert at(0) == Swept()
    assert records.losses == []


@pytest.mark.slow
def test_a_sweep_ends_where_it_is_told_to(bucket, records, at, monkeypatch):
    monkeypatch.setattr("memory_service.storage.s3.bucket._PAGE", 2)
    put(bucket, UID, range(1, 7))
    left = [True, True]
    assert at(25, go_on=lambda: bool(left and left.pop())) == Swept(marked=4)
    assert at(25) == Swept(marked=2)
