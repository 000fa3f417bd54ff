"""The bytes of an answer on their way out: they are read and verified in a storage thread while the bytes before them
are sent. This file owns the bound on what an answer holds in memory, whatever its size and however slowly its caller
reads.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextvars import copy_context
from functools import partial
from itertools import islice

from kvbank.wire import frames as _frames
from memory_service.api.calls import running
from memory_service.api.calls.budget import Budget
from memory_service.domain.errors import ServiceError, damaged_chunk
from memory_service.domain.fair_threads import FairThreads
from memory_service.domain.limits import Pauses
from memory_service.observe.metrics import Metrics
from memory_service.operations.damage import Damage
from memory_service.operations.found import Opened
from memory_service.storage.base import DamagedError

# Frames that one visit to a storage thread makes ready; as many are being sent meanwhile.
AHEAD = 2


class Sender:
    """Makes data frames of the files of answers."""

    def __init__(self, damage: Damage, pool: FairThreads, budget: Budget, metrics: Metrics, pauses: Pauses) -> None:
        """Read in threads of `pool`. damage: where a damaged file is reported. budget: the bytes that all answers hold
        together."""
        self._damage = damage
        self._pauses = pauses
        self._pool = pool
        self._budget = budget
        self._sent = metrics.sent_bytes.labels("stream")
        self._reading = metrics.stages["read"]

    async def frames(self, found: Sequence[Opened]) -> AsyncGenerator[bytes]:
        """Yield the bytes of files in frames of about 1 MiB, as they go over the wire. The caller closes this
        generator, and then the files.

        Errors: CHECKSUM_MISMATCH; STORAGE_ERROR, upon which the client asks again, for a file that was not held open
        and is gone.
        """
        total = sum(item.file.length for item in found)
        if not total:
            return
        call = running.current()
        size = min(total, 2 * AHEAD * _frames.FRAME_BYTES)
        share = await self._budget.take(size, call.end_stalled, owner=call.owner)
        frames = self._read(found, total)
        # The context goes along, so that what a storage thread logs carries the request.
        run = copy_context().run

        def take(count: int) -> asyncio.Future[list[bytes]]:
            job = self._pool.submit(call.owner.tenant, partial(run, self._take, frames, count))
            return asyncio.wrap_future(job)

        ahead = take(1)  # alone, because nothing is being sent meanwhile
        try:
            # The wait is shielded, so that the reading ends with its thread and not with the call.
            while batch := await asyncio.shield(ahead):
                ahead = take(AHEAD)
                for frame in batch:
                    yield frame
                    share.progress(len(frame))
            self._sent.inc(total)
        finally:
            # A thread may still be reading, and no file is closed before it has ended.
            try:
                await asyncio.wait([ahead])
            finally:
                share.give()
            ahead.cancelled() or ahead.exception()

    def _take(self, frames: Iterator[bytes], count: int) -> list[bytes]:
        with self._reading.time():
            return list(islice(frames, count))

    def _read(self, found: Sequence[Opened], left: int) -> Iterator[bytes]:
        """Yield frames of the K-V of files, which have `left` bytes together; the last one may be shorter."""
        items = iter(found)
        item = next(items)
        while left:
            frame, filled = _frames.Frame(min(left, _frames.FRAME_BYTES)), 0
            while filled < len(frame.room):
                if count := self._fill(item, frame.room[filled:]):
                    filled += count
                else:
                    item = next(items)
            left -= filled
            yield frame.encoded()

    def _fill(self, item: Opened, room: memoryview) -> int:
        """Read bytes of a file into `room`, and return how many; 0 at its end. Errors: those of `frames`."""
        self._pauses.reach("bytes read")
        try:
            return item.file.fill(room)
        except DamagedError as error:
            # The chunk may have been quarantined already, for another caller.
            refusal = self._damage.refusal_for(item.bank, item.chunk_id)
            raise refusal or damaged_chunk(item.chunk_id) from error
        except FileNotFoundError as error:
            text = f"chunk {item.chunk_id} went while the answer was being sent; ask again"
            gone = ServiceError("STORAGE_ERROR", text, errno="ENOENT")
            raise self._damage.refusal_for(item.bank, item.chunk_id) or gone from error
