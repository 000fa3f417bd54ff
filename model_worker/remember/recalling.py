"""The way of a query to a bank, and of the chunks that it finds back to the worker.

This file owns the rule that a payload which the worker holds is not sent again: a query names what is held, and the
service leaves those bytes out.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

import kvbank
from model_worker.attachment.attachment import Attachment
from model_worker.remember import stored
from model_worker.remember.payload_cache import PayloadCache
from model_worker.window.provenance import Provenance
from model_worker.window.recalled import RecalledChunk

Passage = tuple[int, tuple[int, ...]]  # see `RecalledChunk.passage`


@dataclass(frozen=True, slots=True)
class Ranking:
    """The chunks that one query found, the best first. top: the best score, also of a chunk that was left out."""

    chunks: list[RecalledChunk] = field(default_factory=list)
    top: float = -np.inf


class Recaller:
    """Asks banks for the chunks of an attached model, and keeps their payloads.

    top_k: chunks for each query. order: `score` (the best match last, next to what is read) or `time` (oldest first).
    min_score: the least score of a chunk. min_share: the least share of the best chunk's score. count: whether a recall
    counts for eviction.
    """

    def __init__(
        self,
        client: kvbank.Client,
        attachment: Attachment,
        payloads: PayloadCache,
        *,
        top_k: int,
        order: str,
        min_score: float | None,
        min_share: float | None,
        count: bool,
    ):
        self._client, self._attachment, self._payloads = client, attachment, payloads
        self._top_k, self._order, self._count = top_k, order, count
        self._min_score, self._min_share = min_score, min_share
        self._store_id = ""

    def retrieve(
        self,
        bank: str,
        vectors: NDArray[np.float32],
        embedder_digest: str,
        timeout: float,
        without: Sequence[Collection[Passage]],
        chunks: kvbank.Filter | None = None,
        payload: bool = True,
    ) -> list[Ranking]:
        """Return what a bank has for each of the vectors `[n, dimension]`.

        timeout: seconds. without: passages for each vector that are left out; the next best take their places. chunks:
        selects those that may be found; None is all. payload: False to ask only because the bank counts what it finds,
        of which nothing is sent then, and to return empty rankings. Raises ServiceError.
        """
        answer = self._client.retrieve(
            bank,
            vectors,
            top_k=self._top_k + max(map(len, without)),
            filter=chunks,
            min_score=self._min_score,
            min_share=self._min_share,
            count=self._count,
            held=kvbank.Held(self._store_id, self._payloads.held(self._store_id)) if payload else None,
            payload=payload,
            reader_digest=self._attachment.reader.digest,
            embedder_digest=embedder_digest,
            tensors="torch",
            timeout=timeout,
        )
        if not payload:
            return [Ranking() for _ in answer.queries]
        self._store_id = answer.store_id
        held_first = sorted(answer.chunks.values(), key=lambda chunk: chunk.tensors is not None)
        known = {chunk.chunk_id: self._recalled(chunk) for chunk in held_first}  # new payloads may push held ones out
        found = []
        for hits, left_out in zip(answer.queries, without, strict=True):
            others = [hit for hit in hits if known[hit.chunk_id].passage not in left_out]
            chosen = [
                replace(known[hit.chunk_id], provenance=_provenance(answer.chunks[hit.chunk_id], hit.score))
                for hit in others[: self._top_k]
            ]
            found.append(Ranking(chosen, hits[0].score) if hits else Ranking())
        return found

    def chosen(self, rankings: Sequence[Ranking]) -> list[RecalledChunk]:
        """Return the best chunks of all banks that were asked one query, in the order of attention.

        The banks are one ranking, by score: so many come from a bank as are among the `top_k` best of all.
        """
        best = sorted((chunk for each in rankings for chunk in each.chunks), key=_score, reverse=True)[: self._top_k]
        if self._min_share is not None and len(rankings) > 1:
            top = max(each.top for each in rankings)
            least = min(top, self._min_share * top)  # as the service has it for the hits of one bank
            best = [chunk for chunk in best if _score(chunk) >= least]
        return best[::-1] if self._order == "score" else sorted(best, key=lambda chunk: chunk.chunk_id)

    def left_before(
        self, bank: str, start: int, most: int, chunk: int, timeout: float, chunks: kvbank.Filter | None = None
    ) -> list[RecalledChunk]:
        """Return the last chunks that begin before an offset of their source, oldest first.

        start: the offset, in a bank of one source, or of one among the `chunks` (whose own bounds are left out). most:
        how many chunks. chunk: the most tokens of one. timeout: seconds. Raises ServiceError.
        """
        begin = max(0, start - most * chunk)
        if begin >= start:
            return []
        near = replace(chunks or kvbank.Filter(), start_from=begin, start_before=start)
        listed = sorted(self._client.list_chunks(bank, filter=near, timeout=timeout), key=lambda found: found.start)
        ids = [found.chunk_id for found in listed[-most:]]
        digest = self._attachment.reader.digest
        fetched = self._client.fetch(bank, ids, reader_digest=digest, tensors="torch", timeout=timeout) if ids else []
        return [self._recalled(found) for found in sorted(fetched, key=lambda found: found.start)]

    def _recalled(self, chunk: kvbank.Chunk) -> RecalledChunk:
        if chunk.tensors is None:
            held = self._payloads.get(self._store_id, chunk.chunk_id, chunk.checksum)
            assert held is not None, "the service left out bytes that were not held"
            return held
        layers = stored.layers_of(chunk.tensors, self._attachment)
        recalled = RecalledChunk(chunk.chunk_id, chunk.start, layers, chunk.token_ids)
        self._payloads.put(self._store_id, chunk.checksum, recalled)
        return recalled


def _score(chunk: RecalledChunk) -> float:
    assert chunk.provenance is not None
    return chunk.provenance.score


def _provenance(chunk: kvbank.Chunk, score: float) -> Provenance:
    return Provenance(chunk.bank, chunk.text, chunk.metadata, chunk.create_time, chunk.retrieval_count, score)
