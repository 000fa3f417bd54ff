"""Reading banks, over any engine: an answer joins what the search finds, the rows of these chunks, and their objects.
This file owns the order of that (checked, searched, loaded, opened, counted), and the counting of retrievals: one for
each chunk and query, when the header that names the chunk goes out, whatever becomes of the bytes behind it.

A caller who gets an answer closes its files.
"""

import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memory_service.domain import cancellation, validate
from memory_service.domain.answer_size import HeaderSize
from memory_service.domain.errors import ServiceError, chunk_not_found, invalid
from memory_service.domain.limits import Limits, Pauses
from memory_service.domain.model import Bank, Chunk
from memory_service.domain.scoring import Best
from memory_service.observe.metrics import Metrics
from memory_service.operations.damage import Damage
from memory_service.operations.found import Answer, Found, Hit, Query, Wanted, close
from memory_service.operations.loading import Loading
from memory_service.operations.recent import RecentRequests
from memory_service.search import AtOnce, Matches, SearchIndexes, Selection, Unindexed
from memory_service.storage.base import Current, Engine, Ids, Retrievals, View

MOST_QUERIES = 1024
# Different chunks of one answer, whose metadata must fit in one message.
MOST_CHUNKS = 10_000


class Retrieval:
    """A retrieval that has been searched for. It is loaded later, because that may have to wait for a turn."""

    def __init__(
        self,
        recall: "Recall",
        query: Query,
        banks: Sequence[Bank],
        vectors: NDArray[np.float32],
        hits: list[list[Hit]],
        seen: Iterable[Chunk] = (),
    ) -> None:
        """Begin with the hits that were found for the vectors [n, d] of the query. seen: chunks whose rows were read
        with that."""
        self.query = query
        self._recall = recall
        self._banks, self._vectors = banks, vectors
        self._gone: set[int] = set()
        self.hits = hits
        self._seen = {chunk.chunk_id: chunk for chunk in seen}

    def take_seen(self) -> Mapping[int, Chunk]:
        """Return the chunks, by id, whose rows were read with the search. They are returned once: they are not kept
        while the answer waits for room."""
        seen, self._seen = self._seen, {}
        return seen

    def search_without(self, gone: Iterable[int]) -> None:
        """Search again, without these chunks and those of earlier calls. Errors: TOO_LARGE."""
        self._gone.update(gone)
        self._recall.catch_up(self._banks)
        current = [Current(bank) for bank in self._banks]
        self.hits, seen = self._recall.search(self.query, current, self._vectors, self._gone)
        self._seen = {chunk.chunk_id: chunk for chunk in seen}

    def chunk_ids(self) -> set[int]:
        """Return the ids of the chunks of all hits."""
        return {hit.chunk_id for row in self.hits for hit in row}


class _Searched(NamedTuple):
    """What a search has found: the hits of each vector, and chunks of them whose rows were read in the same view."""

    hits: list[list[Hit]]
    seen: list[Chunk]


class Recall:
    """Answers retrievals and fetches. Threads share it."""

    def __init__(
        self,
        engine: Engine,
        indexes: SearchIndexes,
        damage: Damage,
        metrics: Metrics,
        max_answer_bytes: int,
        limits: Limits,
        pauses: Pauses,
    ) -> None:
        """Read what an engine holds, whose commits are followed from here on. max_answer_bytes: the bytes of K-V of one
        answer."""
        self._store, self._objects = engine.store, engine.objects
        self._indexes = indexes
        self._matches = Matches(limits.index)
        self._store.follow(self._matches)
        self._by_store = AtOnce()
        self._damage = damage
        self._metrics = metrics
        self._counted = RecentRequests(limits.requests_remembered)
        self._loading = Loading(engine, damage, metrics, max_answer_bytes, limits, pauses)
        self._stages = metrics.stages
        self._pauses = pauses

    # Retrievals

    def retrieval(self, query: Query) -> Retrieval:
        """Check a query and search, which begins a retrieval.

        Errors: BANK_NOT_FOUND, BANKS_DIFFER, READER_MISMATCH, EMBEDDER_MISMATCH, INVALID_FIELD, NOT_FINITE, TOO_LARGE.
        """
        validate.names("banks", query.banks)
        if len(query.banks) == 1 and (foreseen := self._foreseen(query)) is not None:
            return foreseen
        current = self._store.current(query.tenant, query.banks)
        banks = [each.bank for each in current]
        vectors = _checked(query, banks)
        self._pauses.reach("query checked")
        return Retrieval(self, query, banks, vectors, *self.search(query, current, vectors, ()))

    def _foreseen(self, query: Query) -> Retrieval | None:
        """Search a bank as it is known, before it is known whether that is current; None where it is not, and where the
        search would have to wait. Errors: TOO_LARGE, CHECKSUM_MISMATCH."""

        def look(bank: Bank, view: View) -> Retrieval | None:
            if (index := self._indexes.at_hand(bank)) is None:
                return None
            try:
                vectors = _checked(query, [bank])
            except ServiceError:  # it may be another bank by now, which does not refuse the query
                return None
            self._pauses.reach("query checked")
            asked = None if query.filter is None else self._matches.asked(bank, query.filter)
            selection = Selection(None if asked is None else self._matches.ids(asked, view))
            self._pauses.reach("index searched")
            best = index.search(vectors, query.top_k, partial(view.vectors, bank), selection)
            return Retrieval(self, query, [bank], vectors, *_looked([bank], [best], query, view))

        begun = time.perf_counter()
        with self._damage.without_flawed():
            found = self._store.foreseen(query.tenant, query.banks[0], look)
        if found is not None:
            self._stages["search"].observe(time.perf_counter() - begun)
            _check_total(found.hits)
        return found

    def catch_up(self, banks: Sequence[Bank]) -> None:
        """Return when a search finds all that was acknowledged of these banks."""
        self._store.catch_up(banks)

    def search(
        self, query: Query, current: Sequence[Current], vectors: NDArray[np.float32], gone: Collection[int]
    ) -> "_Searched":
        """Find the best chunks for each vector over all banks, without those that are `gone`. Errors: TOO_LARGE."""
        found = self._searched(query, current, vectors, gone, wait=len(vectors) > Unindexed.MOST_QUERIES)
        if found is None:
            found = self._searched(query, current, vectors, gone, wait=True)
        assert found is not None
        _check_total(found.hits)
        return found

    def _searched(
        self,
        query: Query,
        current: Sequence[Current],
        vectors: NDArray[np.float32],
        gone: Collection[int],
        *,
        wait: bool,
    ) -> "_Searched | None":
        """Find the best for each vector. wait: whether indexes are waited for that are not in memory; None is returned
        where that must be."""
        banks = [each.bank for each in current]
        with self._damage.without_flawed():
            indexes = [self._indexes.get(bank) if wait else self._indexes.soon(bank) for bank in banks]
        asked = None if query.filter is None else [self._matches.asked(bank, query.filter) for bank in banks]
        look = partial(self._store.read, query.tenant, apart=True)
        begun = time.perf_counter()
        with self._damage.without_flawed(), look() as view:
            best: list[list[Best]] = []
            for place, ((bank, expired), index) in enumerate(zip(current, indexes, strict=True)):
                cancellation.check()
                allowed = None if asked is None else self._matches.ids(asked[place], view)
                selection = Selection(allowed, _excluded(view.expired(bank) if expired is None else expired, gone))
                self._pauses.reach("index searched")
                if index is not None:
                    best.append(index.search(vectors, query.top_k, partial(view.vectors, bank), selection))
                elif (by_store := self._unindexed(bank, view, vectors, query.top_k, selection)) is not None:
                    best.append(by_store)
                else:
                    return None
            searched = time.perf_counter()
            found = _looked(banks, best, query, view)
        self._stages["search"].observe(searched - begun)
        if found.seen:
            self._stages["load"].observe(time.perf_counter() - searched)
        return found

    def _unindexed(
        self, bank: Bank, view: View, vectors: NDArray[np.float32], top_k: int, selection: Selection
    ) -> list[Best] | None:
        """Let the store search a bank; None where the index must be waited for."""
        with self._by_store.one_of(bank) as admitted:
            if not admitted:
                return None
            self._pauses.reach("store searched")
            return Unindexed(bank, view).search(vectors, top_k, selection)

    def answer(self, retrieval: Retrieval, most_header: int, *, opened: bool = True) -> Answer:
        """Load and open what a retrieval has found; call `count` when the answer goes out.

        most_header: the bytes that the header of the answer may have. opened: False for a caller that opens the files
        itself.

        Errors: TOO_LARGE (HeaderTooLarge among them, and then the next call may allow more), CHECKSUM_MISMATCH (the
        damaged chunk is quarantined; the next retrieval answers without it).
        """
        while True:
            chunks = self._load_hits(retrieval, most_header)
            # Removed from the store and not yet from the index, or expired just now.
            gone = retrieval.chunk_ids() - chunks.keys()
            if not gone:
                wanted = self._wanted(retrieval.query, chunks)
                found = self._loading.open_all(wanted) if opened else list[Found | None](wanted)
                if None not in found:
                    return Answer(retrieval.hits, [item for item in found if item is not None])
                close(found)
                # Evicted between search and opening.
                gone = {each.chunk.chunk_id for each, item in zip(wanted, found, strict=True) if item is None}
            # The next best take their places.
            retrieval.search_without(gone)

    def _load_hits(self, retrieval: Retrieval, most_header: int) -> dict[int, tuple[Bank, Chunk]]:
        """Load the chunks of the hits, by id and with their banks. Errors: HeaderTooLarge."""
        wanted: dict[str, tuple[Bank, dict[int, int]]] = {}
        for row in retrieval.hits:
            for hit in row:
                wanted.setdefault(hit.bank.name, (hit.bank, {}))[1][hit.chunk_id] = 1
        banks, layers, hits = list(wanted.values()), retrieval.query.layers, sum(map(len, retrieval.hits))
        if seen := retrieval.take_seen():
            found = self._loading.of_seen(banks, layers, HeaderSize(most_header, hits), seen)
            if found is not None:
                return found
        return self._loading.load(retrieval.query.tenant, banks, layers, HeaderSize(most_header, hits))

    def _wanted(self, query: Query, chunks: Mapping[int, tuple[Bank, Chunk]]) -> list[Found]:
        """Say of each chunk whether its bytes are to be sent. Errors: TOO_LARGE."""
        held = query.held if query.store_id == self._store.store_id else {}
        wanted = []
        for chunk_id, (bank, chunk) in sorted(chunks.items()):
            payload = chunk.payload
            sent = not query.omit_payload and payload is not None and payload.checksum != held.get(chunk_id)
            wanted.append(Found(chunk, bank, sent))
        self._loading.check_size(wanted)
        return wanted

    def count(self, query: Query, answer: Answer) -> None:
        """Count every hit of an answer, unless its request was counted before."""
        self._metrics.queried([hit.score for hit in row] for row in answer.hits)
        if query.skip_count or not self._counted.first(query.tenant, query.request_id):
            return
        now = self._store.clock.now_us()
        counts = Counter(hit.chunk_id for row in answer.hits for hit in row)
        renew = {item.chunk.chunk_id: item.chunk.expiry is None or item.chunk.expiry.renew for item in answer.found}
        self._store.count({i: Retrievals(count, now, now, renew.get(i, True)) for i, count in counts.items()})
        if self._metrics.recorder.on:
            self._record(answer)

    def _record(self, answer: Answer) -> None:
        """Record which chunks of each bank were found for each query."""
        found: dict[str, list[list[int]]] = {}
        for row in answer.hits:
            own: dict[str, list[int]] = {}
            for hit in row:
                own.setdefault(hit.bank.title, []).append(hit.chunk_id)
            for bank, chunk_ids in own.items():
                found.setdefault(bank, []).append(chunk_ids)
        for bank, queries in found.items():
            self._metrics.recorder.retrieved(bank, queries)

    # Chunks by id

    def fetch(self, wanted: Wanted, most_header: int, *, opened: bool = True) -> list[Found]:
        """Load and open chunks by id, in the order asked for.

        most_header, opened: see `answer`. Errors: BANK_NOT_FOUND, READER_MISMATCH, INVALID_FIELD, CHUNK_NOT_FOUND, and
        those of `answer`.
        """
        bank = self._store.bank(wanted.tenant, wanted.bank)
        validate.reader(bank, wanted.reader_digest, required=bool(bank.kv.layers))
        validate.layers(bank, wanted.layers)
        ids = wanted.chunk_ids
        validate.ids(ids)
        chunks = self._loading.load(bank.tenant, [(bank, Counter(ids))], wanted.layers, HeaderSize(most_header))
        for chunk_id in ids:
            if chunk_id not in chunks:
                raise chunk_not_found(bank.name, chunk_id)
        loaded = [Found(chunks[i][1], bank, chunks[i][1].payload is not None) for i in ids]
        self._loading.check_size(loaded)
        found = self._loading.open_all(loaded) if opened else list[Found | None](loaded)
        for chunk_id, item in zip(ids, found, strict=True):
            if item is None:
                close(found)
                raise chunk_not_found(bank.name, chunk_id)
        return [item for item in found if item is not None]

    def path(self, found: Found) -> str:
        """Return the path of a chunk's object for a caller of this machine, below the folder that is shared with it; ""
        where its bytes are not to be sent."""
        return (self._objects.path(found.bank.uid, found.chunk.chunk_id) or "") if found.sent else ""


def _checked(query: Query, banks: Sequence[Bank]) -> NDArray[np.float32]:
    """Check a query of some banks, and return its vectors [n, d]. Errors: those of `Recall.retrieval`."""
    for bank in banks[1:]:
        if (bank.kv, bank.embedding) != (banks[0].kv, banks[0].embedding):
            text = f"banks {banks[0].name} and {bank.name} have different specs"
            raise ServiceError("BANKS_DIFFER", text, first=banks[0].name, second=bank.name)
    validate.reader(banks[0], query.reader_digest, required=bool(banks[0].kv.layers) and not query.omit_payload)
    validate.embedder(banks[0], query.embedder_digest)
    validate.layers(banks[0], query.layers)
    if query.min_score is not None and np.isnan(query.min_score):
        raise invalid("min_score", "must be a number")
    if query.min_share is not None and not 0 <= query.min_share <= 1:
        raise invalid("min_share", "must be from 0 to 1")
    if len(query.request_id) not in (0, 16):
        raise invalid("request_id", "must have 16 bytes")
    validate.dimension(banks[0], query.dimension)
    vectors = validate.vectors(query.vectors, banks[0].embedding.dimension, "queries")
    if len(vectors) > MOST_QUERIES:
        raise invalid("queries", f"must be at most {MOST_QUERIES}")
    validate.hits(len(vectors), query.top_k)
    return vectors


def _looked(banks: Sequence[Bank], best: Sequence[list[Best]], query: Query, view: View) -> _Searched:
    """Return the hits over all banks, of each of which there is the best for each vector, with the rows that the view
    of the search shows: one that begins later may not have them any more, and all would be searched again."""
    hits = [_merged(banks, row, query) for row in zip(*best, strict=True)]
    found: dict[int, set[int]] = {bank.bank_id: set() for bank in banks}
    for hit in chain.from_iterable(hits):
        found[hit.bank.bank_id].add(hit.chunk_id)
    return _Searched(hits, [chunk for bank in banks for chunk in view.seen(bank, sorted(found[bank.bank_id]))])


def _check_total(hits: Sequence[Sequence[Hit]]) -> None:
    """Refuse hits of too many different chunks. Errors: TOO_LARGE."""
    total = len({hit.chunk_id for row in hits for hit in row})
    if total > MOST_CHUNKS:
        text = f"{total} different chunks were found; ask for at most {MOST_CHUNKS} at once"
        raise ServiceError("TOO_LARGE", text, limit=MOST_CHUNKS, size=total)


def _excluded(expired: Ids, gone: Collection[int]) -> Ids:
    """Return the ids [n] of the chunks that are not to be found: expired ones, and those that are gone."""
    return np.union1d(expired, np.array(list(gone), np.int64)) if gone else expired


def _merged(banks: Sequence[Bank], best: Sequence[Best], query: Query) -> list[Hit]:
    """Return the best hits over all banks, by descending score, and by id where scores are equal."""
    hits = [
        Hit(chunk_id, score, bank)
        for bank, some in zip(banks, best, strict=True)
        for chunk_id, score in zip(some.ids.tolist(), some.scores.tolist(), strict=True)
        if query.min_score is None or score >= query.min_score
    ]
    if len(banks) > 1:
        hits.sort(key=lambda hit: (-hit.score, hit.chunk_id))
        del hits[query.top_k :]
    if query.min_share is not None and hits:
        top = hits[0].score
        least = min(top, query.min_share * top)  # the best one stays, also where its score is negative
        return [hit for hit in hits if hit.score >= least]
    return hits
