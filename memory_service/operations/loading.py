"""The loading of chunks that were found: their rows, as far as the header of an answer has room for them, and their
objects, which are opened. This file owns that a damaged chunk is taken out of service, and that a chunk which went
meanwhile is left out.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from memory_service.domain.answer_size import HeaderSize, HeaderTooLarge
from memory_service.domain.errors import ServiceError
from memory_service.domain.limits import Limits, Pauses
from memory_service.domain.model import Bank, Chunk
from memory_service.observe.metrics import Metrics
from memory_service.operations.damage import Damage
from memory_service.operations.found import Found, close
from memory_service.storage.base import DamagedError, Engine
from memory_service.storage.verify import OpenFiles, VerifiedPayload


class Loading:
    """Loads and opens chunks of an engine. Threads share it."""

    def __init__(
        self,
        engine: Engine,
        damage: Damage,
        metrics: Metrics,
        max_answer_bytes: int,
        limits: Limits,
        pauses: Pauses,
    ) -> None:
        """Load what an engine holds. max_answer_bytes: the bytes of K-V of one answer."""
        self._store, self._objects = engine.store, engine.objects
        self._damage = damage
        self._stages = metrics.stages
        self._max_answer_bytes = max_answer_bytes
        self._open_files = OpenFiles(limits.open_files)
        self._pauses = pauses

    def load(
        self, tenant: str, wanted: Sequence[tuple[Bank, Mapping[int, int]]], layers: Sequence[int], size: HeaderSize
    ) -> dict[int, tuple[Bank, Chunk]]:
        """Load chunks of a tenant by id with their bank, their descriptors cut to `layers`.

        wanted: for each bank, the ids and how many times the header names each. Errors: HeaderTooLarge, as soon as the
        chunks are too large together; it says how large all of them are. What was read until then is no load, and is
        not observed as one.
        """
        begun = time.perf_counter()
        found: dict[int, tuple[Bank, Chunk]] = {}
        with self._damage.without_flawed(), self._store.read(tenant, apart=True) as view:
            try:
                for bank, times in wanted:
                    for chunk in view.chunks(bank, times):
                        cut = _only(chunk, layers)
                        found[chunk.chunk_id] = (bank, cut)
                        size.add(cut, times[chunk.chunk_id])
            except HeaderTooLarge:
                found.clear()
                all_times = {chunk_id: count for _, times in wanted for chunk_id, count in times.items()}
                raise size.too_large(*view.message_bytes(all_times)) from None
        self._stages["load"].observe(time.perf_counter() - begun)
        return found

    @staticmethod
    def of_seen(
        wanted: Sequence[tuple[Bank, Mapping[int, int]]],
        layers: Sequence[int],
        size: HeaderSize,
        seen: Mapping[int, Chunk],
    ) -> dict[int, tuple[Bank, Chunk]] | None:
        """Return chunks as `load` does, of which a search has seen the rows, by id; None where it has not seen all of
        them, or they are too large together."""
        found: dict[int, tuple[Bank, Chunk]] = {}
        with suppress(HeaderTooLarge):
            for bank, times in wanted:
                for chunk_id, count in times.items():
                    if (chunk := seen.get(chunk_id)) is None:
                        return None
                    found[chunk_id] = (bank, _only(chunk, layers))
                    size.add(found[chunk_id][1], count)
            return found
        return None

    def check_size(self, found: Sequence[Found]) -> None:
        """Refuse an answer with too many bytes of K-V. Errors: TOO_LARGE."""
        size = sum(item.length for item in found)
        if size > self._max_answer_bytes:
            text = f"the answer would have {size} bytes of K-V; ask for fewer chunks or layers"
            raise ServiceError("TOO_LARGE", text, limit=self._max_answer_bytes, size=size)

    def open_all(self, found: Sequence[Found]) -> list[Found | None]:
        """Open the files of chunks; None stands for a chunk that is gone by now. Errors: CHECKSUM_MISMATCH."""
        self._pauses.reach("objects opened")
        opened: list[Found | None] = []
        self._objects.expect(
            (item.bank.uid, item.chunk.chunk_id, payload)
            for item in found
            if item.sent and (payload := item.chunk.payload) is not None
        )
        try:
            with self._stages["open"].time():
                opened.extend(map(self._opened, found))
            self._pauses.reach("answer opened")
        except BaseException:
            close(opened)
            raise
        return opened

    def _opened(self, found: Found) -> Found | None:
        bank, chunk = found.bank, found.chunk
        if not found.sent or chunk.payload is None:
            return found
        open_source = partial(self._objects.open, bank.uid, chunk.chunk_id, chunk.payload)
        try:
            return found._replace(file=VerifiedPayload(open_source, chunk.payload, self._open_files))
        except (FileNotFoundError, DamagedError) as error:
            if (refusal := self._damage.refusal_for(bank, chunk.chunk_id)) is None:
                return None
            raise refusal from error


def _only(chunk: Chunk, layers: Sequence[int]) -> Chunk:
    """Return the chunk with its descriptor cut to some layers; the payload's checksum is still that of the whole.

    The descriptor of soft tokens is not cut, because they belong to no layer.
    """
    if not layers or chunk.payload is None or chunk.payload.kind == "soft_tokens":
        return chunk
    wanted = {str(layer) for layer in layers}
    tensors = tuple(tensor for tensor in chunk.payload.tensors if tensor.name.rpartition(".")[2] in wanted)
    return replace(chunk, payload=replace(chunk.payload, tensors=tensors), kept=None)
