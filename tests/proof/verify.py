"""Hold a store to what its clients were promised."""

import itertools
import json
from collections.abc import Set
from dataclasses import dataclass, field

import kvbank
from tests.proof.content import DIGESTS, EMBEDDING, chunk_of, differences, new_key, vector_of
from tests.proof.journal import Promises

FETCHED_AT_ONCE = 200


@dataclass
class Verdict:
    """The verdict over a bank. lost: what was acknowledged, and is neither there nor gone for a reason. wrong: what a
    store must not say."""

    acknowledged: int = 0
    verified: int = 0
    evicted: int = 0
    deleted: int = 0
    lost: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not self.lost and not self.wrong


def verify(client: kvbank.Client, promises: Promises, *, ascending: bool = True) -> Verdict:
    """Check one bank, while no other client writes to it; this writes one chunk, whose id must be a new one. ascending:
    whether it must be higher than all others, as the ids of one service are."""
    verdict = Verdict(len(promises.acknowledged))
    if promises.removed and any(bank.name == promises.bank for bank in client.list_banks()):
        verdict.wrong.append("the bank is deleted and there")
    if not promises.exists:
        return verdict
    try:
        usage = client.get_bank(promises.bank).usage
    except kvbank.BankNotFound:
        verdict.lost = sorted(promises.acknowledged)
        verdict.wrong.append("the bank is gone")
        return verdict
    listed = {chunk.chunk_id: chunk for chunk in client.list_chunks(promises.bank)}
    log = (eviction.chunk_id for eviction in client.list_evictions(promises.bank))
    promises.logged.update(itertools.takewhile(lambda chunk_id: chunk_id not in promises.logged, log))
    promises.evicted |= promises.logged
    present = set(listed)
    verdict.evicted, verdict.deleted = len(promises.evicted), len(promises.deleted)
    verdict.lost = sorted(set(promises.acknowledged) - present - promises.evicted - promises.deleting)
    for kind in ("evicted", "deleted"):
        verdict.wrong += [f"chunk {i} is {kind} and there" for i in sorted(present & getattr(promises, kind))]
    _check_bytes(client, promises, sorted(present), verdict)
    _check_usage(usage, list(listed.values()), verdict)
    _check_search(client, promises.bank, present - set(verdict.lost), verdict)
    known = present | promises.acknowledged.keys() | promises.evicted
    _check_new_id(client, promises, known, verdict, ascending)
    return verdict


def _check_bytes(client: kvbank.Client, promises: Promises, chunk_ids: list[int], verdict: Verdict) -> None:
    while batch := chunk_ids[:FETCHED_AT_ONCE]:
        try:
            chunks = client.fetch(promises.bank, batch, reader_digest=DIGESTS["reader_digest"])
        except kvbank.DataLoss as error:
            damaged = int(error.metadata["chunk_id"])
            chunk_ids.remove(damaged)
            if damaged in promises.acknowledged:
                verdict.lost.append(damaged)
            else:
                verdict.wrong.append(f"chunk {damaged} has a row and no good bytes")
            continue
        for chunk in chunks:
            known = promises.acknowledged.get(chunk.chunk_id, chunk.idempotency_key)
            if known != chunk.idempotency_key or (wrong := differences(chunk)):
                verdict.wrong.append(f"chunk {chunk.chunk_id}: {wrong if known == chunk.idempotency_key else 'key'}")
        verdict.verified += len(batch)
        chunk_ids = chunk_ids[FETCHED_AT_ONCE:]


def _check_usage(usage: kvbank.BankUsage, chunks: list[kvbank.Chunk], verdict: Verdict) -> None:
    gone = usage.chunks_evicted + usage.chunks_deleted + usage.chunks_quarantined + usage.chunks_expired
    for name, counted, is_ in (
        ("chunks", usage.chunks, len(chunks)),
        ("written", usage.chunks_written - gone, len(chunks)),
        ("tokens", usage.tokens, sum(chunk.stored_length for chunk in chunks)),
        ("bytes", usage.bytes, sum(map(_stored_bytes, chunks))),
    ):
        if counted != is_:
            verdict.wrong.append(f"usage says {counted} {name}, there are {is_}")


def _stored_bytes(chunk: kvbank.Chunk) -> int:
    """Return what a chunk takes of its bank's bytes, as docs/eviction.md says."""
    vectors = 4 * EMBEDDING.dimension + 4 * len(chunk.token_ids)
    words = len(chunk.text.encode()) + len(json.dumps(dict(chunk.metadata)))
    return sum(tensor.nbytes for tensor in chunk.layout) + vectors + words + 256 + 160 * len(chunk.layout)


def _check_search(client: kvbank.Client, bank: str, present: set[int], verdict: Verdict) -> None:
    found = client.retrieve(bank, vector_of(bytes(16)), top_k=1000, payload=False, count=False, **DIGESTS)
    hits = [hit.chunk_id for hit in found.queries[0]]
    if not set(hits) <= present or len(hits) != min(len(present), 1000):
        verdict.wrong.append(f"a search finds {len(hits)} chunks, {len(set(hits) - present)} of them not there")


def _check_new_id(
    client: kvbank.Client, promises: Promises, known: Set[int], verdict: Verdict, ascending: bool
) -> None:
    chunk = chunk_of(new_key(tokens=1))
    written = client.write(promises.bank, chunk, **DIGESTS)
    if written.chunk_id in known or (ascending and written.chunk_id <= max(known, default=0)):
        verdict.wrong.append(f"chunk id {written.chunk_id} was given again, {max(known)} was known")
    promises.acknowledge(written.chunk_id, chunk.idempotency_key)
    promises.evicted.update(written.evicted)
