"""A service and an oracle in memory that are told the same; every step is plain data, so that a trace can be replayed.

Where time decides (a chunk whose ttl is about to end), after a write without an answer, and while a bank is brought
down to a lowered capacity in the background, the oracle allows all that the contract allows, and learns from the store
which of it came true.
"""

import json
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from pprint import pformat
from typing import Any, NamedTuple

import grpc
import numpy as np

import kvbank
from tests.proof.content import DIGESTS, DIMENSION, EMBEDDING, KV, READER, chunk_of, differences
from tests.proof.once import Once
from tests.proof.sites import OnFolder, Site
from tests.support.waiting import wait_until

Step = dict[str, Any]
# More than float32 rounds in a product of unit vectors.
ROUNDING = 1e-5
NEVER = float("inf")
FULL = (kvbank.BankFull, kvbank.QuotaExceeded)


@dataclass
class Known:
    """A chunk that was acknowledged. It expires at a time between `earliest` and `latest`."""

    number: int
    pinned: bool
    metadata: dict[str, str]
    earliest: float = NEVER
    latest: float = NEVER
    retrievals: int = 0

    @property
    def vector(self) -> np.ndarray:
        return vector(self.number)


class How(NamedTuple):
    """How a chunk was written; `ttl`: its own, or its bank's, in seconds; 0 is never."""

    pinned: bool
    ttl: float


@dataclass
class BankModel:
    """What a bank must be. live: chunk id to what the chunk must be. gone: chunk id to the chunk's number. unsure:
    chunks, by number, that came and went, or did not come, while no caller was told."""

    capacity: int | None
    policy: str
    ttl: float
    quota: int = 0
    live: dict[int, Known] = field(default_factory=dict)
    gone: dict[int, int] = field(default_factory=dict)
    # Those of the gone that are not removed yet, perhaps.
    expired: set[int] = field(default_factory=set)
    unsure: dict[int, How] = field(default_factory=dict)
    # How chunks were written: number to (pinned, ttl).
    said: dict[int, tuple[bool, float]] = field(default_factory=dict)
    highest: int = 0
    # A pinned chunk whose time is over takes its room until it is removed, a second later.
    pins_expire: bool = False


def key_of(number: int) -> bytes:
    """Return the key of chunk `number`, whose payload has one to four tokens."""
    return bytes([number % 4]) + number.to_bytes(15, "big")


def vector(number: int) -> np.ndarray:
    """Return one of seven vectors, so that there are ties."""
    made = np.random.default_rng(number % 7).standard_normal(DIMENSION).astype(np.float32)
    return made / np.linalg.norm(made)


def new_chunk(number: int, *, pinned: bool = False, ttl: float = 0) -> kvbank.NewChunk:
    expiry = kvbank.Expiry(timedelta(seconds=ttl)) if ttl else None
    return replace(chunk_of(key_of(number)), embedding=vector(number), pinned=pinned, expiry=expiry)


class World:
    """Call `do` with steps; an AssertionError of it is a defect of the service (or of the oracle)."""

    def __init__(self, site: Site) -> None:
        self.trace: list[Step] = []
        self._site = site
        self.banks: dict[str, BankModel] = {}
        self._connect()

    def do(self, op: str, **arguments: Any) -> None:
        """Take one step, which is a method's name and what it takes."""
        self.trace.append({"op": op} | arguments)
        getattr(self, op)(**arguments)

    def close(self) -> None:
        self._disconnect()
        self._site.close()

    def save(self, path: Path) -> None:
        """Save the steps so far, for `python -m tests.proof.replay`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, self.trace)) + "\n")

    def keep(self, folder: Path, error: Exception) -> Path:
        """Keep all that may explain why a step failed in a folder of its own below `folder`, and return the steps' file
        in it.

        Where time decided, the same steps may not fail again. Ends the service.
        """
        self._site.close()
        folder.mkdir(parents=True, exist_ok=True)
        kept = Path(tempfile.mkdtemp(prefix="failed-", dir=folder))
        self.save(kept / "trace.jsonl")
        said = "".join(traceback.format_exception(error))
        (kept / "error.txt").write_text(f"{said}\n{pformat(self.banks)}\n")
        self._site.keep(kept)
        return kept / "trace.jsonl"

    # Banks

    def create(self, bank: str, capacity: int | None, policy: str, ttl: float) -> None:
        made = self._client.create_bank(
            bank,
            kv=KV,
            embedding=EMBEDDING,
            capacity=kvbank.Capacity(chunks=capacity) if capacity else None,
            policy=kvbank.Policy(policy),
            expiry=kvbank.Expiry(timedelta(seconds=ttl)) if ttl else None,
            exist_ok=True,
        )
        model = self.banks.setdefault(bank, BankModel(capacity, policy, ttl))
        assert (made.capacity.chunks if made.capacity else None) == model.capacity
        assert made.usage.chunks <= len(model.live)

    def delete_bank(self, bank: str) -> None:
        self._client.delete_bank(bank)
        del self.banks[bank]
        with suppress(kvbank.BankNotFound):
            self._client.get_bank(bank)
            raise AssertionError(f"bank {bank} is deleted and there")

    def set_capacity(self, bank: str, capacity: int) -> None:
        self._client.update_bank(bank, capacity=kvbank.Capacity(chunks=capacity))
        self.banks[bank].capacity = capacity

    def set_quota(self, bank: str, quota: int) -> None:
        self._client.update_bank(bank, quota=kvbank.Quota(chunks=quota) if quota else None)
        self.banks[bank].quota = quota

    # Writing

    def write(self, bank: str, numbers: list[int], pinned: bool, ttl: float, client: int) -> None:
        """Several in one stream. They may be refused by a quota or by a full bank, and by nothing else."""
        model, chunks = self.banks[bank], [new_chunk(number, pinned=pinned, ttl=ttl) for number in numbers]
        # What another service has counted is not known for a second, and may decide.
        predicted = self._predicted(bank) if len(numbers) == 1 and client == 0 else None
        how, begin = How(pinned, ttl or model.ttl), time.time()
        model.pins_expire |= pinned and how.ttl > 0
        try:
            results = self._clients[client].write_many(bank, chunks, **DIGESTS)
        except FULL:
            may_be_full = model.quota or model.policy == "reject" or model.pins_expire or pinned
            assert may_be_full or any(known.pinned for known in model.live.values())
            assert any(self._find(bank, number) is None for number in numbers), "a replay was refused"
            self._adopt(bank, numbers, how, begin)
        else:
            self._written(bank, list(zip(numbers, results, strict=True)), how, begin)
            model.said |= dict.fromkeys(numbers, (pinned, ttl))
            if predicted and results[0].evicted:
                # The first of them may have gone in the background.
                evicted = list(results[0].evicted)
                assert evicted == [chunk_id for chunk_id in predicted if chunk_id in evicted]
        if model.quota:
            # Chunks that have expired count until they are removed, which is soon.
            most = max(model.quota, len(model.live))
            wait_until(lambda: self._client.get_bank(bank).usage.chunks <= most)

    def rewrite(self, bank: str, which: int) -> None:
        """Write the same chunk again, whether it is still there or gone."""
        said = self.banks[bank].said
        if said:
            number = sorted(said)[which % len(said)]
            self.write(bank, [number], *said[number], client=0)

    def _predicted(self, bank: str) -> list[int] | None:
        """Return what ExplainEviction says; None where the clock may change it."""
        live = self.banks[bank].live
        if any(known.latest < NEVER for known in live.values()):
            return None
        # One that has expired and is not removed yet may be a victim, or leave its room, as it comes.
        if self._client.get_bank(bank).usage.chunks > len(live):
            return None
        return [victim.chunk_id for victim in self._client.explain_eviction(bank)]

    def _written(self, bank: str, results: Sequence[tuple[int, kvbank.WriteResult]], how: How, begin: float) -> None:
        model, end = self.banks[bank], time.time()
        for number, result in results:
            known = self._find(bank, number)
            assert result.replayed == (known is not None), f"{number} of {bank}"
            if known is None:
                self._is_new(model, result.chunk_id)
                self._add(model, result.chunk_id, number, how, (begin, end))
            else:
                assert result.chunk_id == known
                self._replayed(bank, known, result.gone, (begin, end))
        # Chunks of one stream are committed side by side, so that one may evict a later one.
        for evicted in (chunk_id for _, result in results for chunk_id in result.evicted):
            self._went(bank, evicted)
        if not all(result.replayed for _, result in results):
            self._fits(bank)

    def _is_new(self, model: BankModel, chunk_id: int) -> None:
        """Check that an id was never given before; those of one service ascend."""
        assert not self._site.ascending or chunk_id > model.highest
        assert chunk_id not in model.live.keys() | model.gone.keys(), f"{chunk_id} is given twice"
        model.highest = max(model.highest, chunk_id)

    def _replayed(self, bank: str, chunk_id: int, gone: bool, between: tuple[float, float]) -> None:
        model, (begin, end) = self.banks[bank], between
        if chunk_id in model.gone:
            assert gone, f"chunk {chunk_id} is gone, and a replay says that it is there"
        elif gone:
            # Since the last look: by its time, or in the background, after the capacity was lowered.
            assert model.live[chunk_id].earliest <= end or self._evicted(bank, chunk_id), f"{chunk_id} is lost"
        else:
            assert model.live[chunk_id].latest > begin, f"chunk {chunk_id} has expired, and a replay says it is there"

    def _went(self, bank: str, chunk_id: int) -> None:
        """Evicted, says a write."""
        model = self.banks[bank]
        if chunk_id in model.expired:
            model.expired.remove(chunk_id)  # and was not removed yet
        elif chunk_id in model.live:
            known = model.live.pop(chunk_id)
            assert not known.pinned, f"chunk {chunk_id} is pinned and was evicted"
            model.gone[chunk_id] = known.number
        else:
            assert chunk_id not in model.gone, f"chunk {chunk_id} is gone, and was evicted"
            # Written without an answer, it had expired when the chunks were listed, and was not removed yet.
            expiring = [number for number, how in model.unsure.items() if how.ttl and not how.pinned]
            (start,) = (row.start for row in self._client.list_evictions(bank) if row.chunk_id == chunk_id)
            (number,) = (number for number in expiring if chunk_of(key_of(number)).start == start)
            del model.unsure[number]
            model.gone[chunk_id] = number

    def _fits(self, bank: str) -> None:
        """Check the capacity after a chunk was taken, whatever it was before."""
        usage, capacity = self._client.get_bank(bank).usage, self.banks[bank].capacity
        assert capacity is None or usage.chunks <= capacity, f"{usage.chunks} chunks in a bank of {capacity}"

    def _add(self, model: BankModel, chunk_id: int, number: int, how: How, between: tuple[float, float]) -> None:
        begin, end = between[0] - self._site.slack, between[1] + self._site.slack
        earliest, latest = (begin + how.ttl, end + how.ttl) if how.ttl else (NEVER, NEVER)
        metadata = dict(chunk_of(key_of(number)).metadata)
        model.live[chunk_id] = Known(number, how.pinned, metadata, earliest, latest)

    def _adopt(self, bank: str, numbers: list[int], how: How, begin: float) -> None:
        """Learn after a write without an answer which of its chunks are there; these are there for good."""
        model, keys = self.banks[bank], {key_of(number): number for number in numbers}
        model.unsure |= {number: how for number in numbers if self._find(bank, number) is None}
        for chunk in self._client.list_chunks(bank):
            number = keys.get(chunk.idempotency_key)
            if number is not None and chunk.chunk_id not in model.live:
                assert self._find(bank, number) is None
                self._add(model, chunk.chunk_id, number, how, (begin, time.time()))
                del model.unsure[number]
                model.highest = max(model.highest, chunk.chunk_id)
        self._settle(bank)

    def unused(self, bank: str, numbers: Iterable[int]) -> list[int]:
        """Return the keys whose chunks were never written to the bank."""
        unsure = self.banks[bank].unsure
        return [number for number in numbers if number not in unsure and self._find(bank, number) is None]

    def _find(self, bank: str, number: int) -> int | None:
        model = self.banks[bank]
        there = {known.number: chunk_id for chunk_id, known in model.live.items()}
        return there.get(number) or {gone: chunk_id for chunk_id, gone in model.gone.items()}.get(number)

    def write_together(self, bank: str, first: list[int], second: list[int]) -> None:
        """Two clients at once."""
        results: dict[int, Any] = {}

        def run(client: int, numbers: list[int]) -> None:
            try:
                chunks = map(new_chunk, numbers)
                results[client] = self._clients[client].write_many(bank, chunks, **DIGESTS)
            except FULL as error:
                results[client] = error

        begin, parts = time.time(), (first, second)
        threads = [threading.Thread(target=run, args=item) for item in enumerate(parts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 2
        self._adopt(bank, first + second, How(False, self.banks[bank].ttl), begin)
        if not all(isinstance(result, Exception) for result in results.values()):
            self._fits(bank)

    # Reading

    def retrieve(self, bank: str, query: int, top_k: int, count: bool, half: str, client: int) -> None:
        """Retrieve from a bank, and compare with the model. half: a value of metadata to filter by; empty for no
        filter."""
        model, begin = self.banks[bank], time.time()
        gone = set(model.gone)
        filter_ = kvbank.Filter(metadata={"half": half}) if half else None
        asked = {"top_k": top_k, "count": count, "filter": filter_}
        answer = self._clients[client].retrieve(bank, vector(query), **asked, **DIGESTS)
        hits, end = answer.queries[0], time.time()
        assert gone.isdisjoint(hit.chunk_id for hit in hits), "a chunk was served that is gone"
        for known in (model.live[hit.chunk_id] for hit in hits if hit.chunk_id in model.live):
            known.retrievals += count
        self._settle(bank, client)
        for hit in hits:
            known = model.live.get(hit.chunk_id)
            # What expired since, or had not yet, was settled above.
            assert known is not None or hit.chunk_id in model.gone, f"hit {hit.chunk_id}"
            if known is not None:
                assert known.latest > begin, f"chunk {hit.chunk_id} has expired and was served"
                assert abs(float(known.vector @ vector(query)) - hit.score) < ROUNDING
                assert not half or known.metadata.get("half") == half
        assert len(hits) <= top_k
        order = [(-hit.score, hit.chunk_id) for hit in hits]
        assert order == sorted(order), "hits are out of order"
        self._nothing_better(model, answer, vector(query), top_k, half, end)
        for chunk in answer.chunks.values():
            self._same(bank, chunk)

    @staticmethod
    def _nothing_better(
        model: BankModel, answer: kvbank.Retrieval, query: np.ndarray, top_k: int, half: str, end: float
    ) -> None:
        hits = answer.queries[0]
        lowest = hits[-1].score if len(hits) == top_k else -NEVER
        for chunk_id, known in model.live.items():
            if chunk_id in answer.chunks or known.earliest <= end or (half and known.metadata.get("half") != half):
                continue
            score = float(known.vector @ query)
            assert score < lowest + ROUNDING, f"chunk {chunk_id} was not found"
            same = [hit.chunk_id for hit in hits if np.array_equal(_vector_of(model, hit.chunk_id), known.vector)]
            assert all(other < chunk_id for other in same), f"chunk {chunk_id} has the lower id of a tie"

    def fetch(self, bank: str, which: int, client: int) -> None:
        model = self.banks[bank]
        if (chunk_id := self._nth(bank, which)) is None:
            return
        begin = time.time()
        try:
            (chunk,) = self._clients[client].fetch(bank, [chunk_id], reader_digest=READER)
        except kvbank.ChunkNotFound:
            assert model.live[chunk_id].earliest <= time.time() or self._evicted(bank, chunk_id)
            self._settle(bank)
        else:
            assert model.live[chunk_id].latest > begin
            self._same(bank, chunk)

    def _evicted(self, bank: str, chunk_id: int) -> bool:
        return any(eviction.chunk_id == chunk_id for eviction in self._client.list_evictions(bank))

    def _same(self, bank: str, chunk: kvbank.Chunk) -> None:
        known = self.banks[bank].live.get(chunk.chunk_id)
        if known is None:
            return
        assert chunk.idempotency_key == key_of(known.number)
        assert set(differences(chunk)) <= {"metadata"}, differences(chunk)
        assert dict(chunk.metadata) == known.metadata

    # Changing

    def update(self, bank: str, which: int, half: str) -> None:
        if (chunk_id := self._nth(bank, which)) is None:
            return
        known = self.banks[bank].live[chunk_id]
        try:
            self._client.update_chunk(bank, chunk_id, {"half": half})
        except kvbank.ChunkNotFound:
            assert known.earliest <= time.time() or self._evicted(bank, chunk_id)
            self._settle(bank)
        else:
            known.metadata = {"half": half}

    def pin(self, bank: str, which: int, pinned: bool) -> None:
        if (chunk_id := self._nth(bank, which)) is None:
            return
        known = self.banks[bank].live[chunk_id]
        if self._client.pin_chunks(bank, [chunk_id], pinned) == 1:
            known.pinned = pinned
            self.banks[bank].pins_expire |= pinned and known.latest < NEVER
        else:
            assert known.earliest <= time.time() or self._evicted(bank, chunk_id)
            self._settle(bank)

    def delete(self, bank: str, which: list[int]) -> None:
        ids = {chunk_id for number in which if (chunk_id := self._nth(bank, number)) is not None}
        if not ids:
            return
        model, begin = self.banks[bank], time.time()
        deleted = self._client.delete_chunks(bank, sorted(ids))
        certain = [chunk_id for chunk_id in ids if model.live[chunk_id].earliest == NEVER]
        assert deleted <= len(ids)
        assert deleted >= len(certain) or any(self._evicted(bank, chunk_id) for chunk_id in certain), begin
        for chunk_id in ids:
            model.gone[chunk_id] = model.live.pop(chunk_id).number

    def _nth(self, bank: str, which: int) -> int | None:
        ids = sorted(self.banks[bank].live)
        return ids[which % len(ids)] if ids else None

    # The service

    def restart(self) -> None:
        self._disconnect()
        self._site.restart()
        self._connect()
        self.check()

    def kill(self) -> None:
        self._disconnect()
        self._site.kill()
        self._connect()
        self.check()

    def kill_in_write(self, bank: str, numbers: list[int], after: int) -> None:
        """Kill the service when `after` of the chunks are acknowledged; the others are there or not."""
        begin, address = time.time(), self._site.services[0].address
        self._disconnect()
        with Once(address) as client, suppress(grpc.RpcError):
            client.write(bank, *map(new_chunk, numbers), each=_at(after, self._site.services[0].kill))
        self._site.services[0].kill()
        self._site.start(0)
        self._connect()
        self._adopt(bank, numbers, How(False, self.banks[bank].ttl), begin)

    def _connect(self) -> None:
        services = self._site.services
        self._clients = [kvbank.connect(services[number % len(services)].address) for number in range(2)]
        self._client = self._clients[0]

    def _disconnect(self) -> None:
        for client in self._clients:
            client.close()

    def damage(self, bank: str, which: int) -> None:
        """Damage a stored payload. This is no step of the machine, but the test of the replay needs a defect."""
        assert isinstance(self._site, OnFolder)
        path = next(self._site.data.glob(f"payloads/*/*/{self._nth(bank, which)}.safetensors"))
        path.write_bytes(path.read_bytes()[:-1])

    # What must hold

    def check(self) -> None:
        """Everything that a bank says of itself, with all bytes."""
        assert {bank.name for bank in self._client.list_banks()} == set(self.banks)
        for bank in self.banks:
            usage = self._client.get_bank(bank).usage
            gone = usage.chunks_evicted + usage.chunks_deleted + usage.chunks_expired
            assert usage.chunks == usage.chunks_written - gone
            assert usage.chunks_quarantined == 0
            self._settle(bank)
            ids = self._read_all(bank)
            assert len(ids) <= usage.chunks

    def _read_all(self, bank: str) -> list[int]:
        """Compare the bytes of all chunks that do not expire, whose ids these are."""
        model = self.banks[bank]
        while ids := [chunk_id for chunk_id, known in model.live.items() if known.earliest == NEVER]:
            try:
                chunks = self._client.fetch(bank, ids, reader_digest=READER)
            except kvbank.ChunkNotFound:
                # After the capacity was lowered chunks go in the background: fewer are left to ask for.
                self._settle(bank)
                assert not model.live.keys() >= set(ids), "a chunk is listed and not found"
            else:
                for chunk in chunks:
                    self._same(bank, chunk)
                break
        return ids

    def _settle(self, bank: str, client: int = 0) -> None:
        """Compare with what is listed; what is not there must have expired, or stand in the log of evictions. client:
        whose service is asked, which writes the retrievals that it has counted."""
        model, begin = self.banks[bank], time.time()
        listed = {chunk.chunk_id: chunk for chunk in self._clients[client].list_chunks(bank)}
        end = time.time()
        for chunk_id, chunk in listed.items():
            assert chunk_id in model.live, f"chunk {chunk_id} is listed, and was never acknowledged or is gone"
            known = model.live[chunk_id]
            assert known.latest > begin, f"chunk {chunk_id} has expired and is listed"
            # Each retrieval was settled at once, and what a list has shown is not lost by a kill.
            assert chunk.retrieval_count == known.retrievals, f"chunk {chunk_id} counts wrong"
            assert (chunk.pinned, dict(chunk.metadata)) == (known.pinned, known.metadata)
        for chunk_id in model.live.keys() - listed.keys():
            known = model.live.pop(chunk_id)
            assert known.earliest <= end or (self._evicted(bank, chunk_id) and not known.pinned), f"{chunk_id} is lost"
            model.gone[chunk_id] = known.number
            if known.earliest <= end:
                model.expired.add(chunk_id)


def _vector_of(model: BankModel, chunk_id: int) -> np.ndarray:
    number = model.live[chunk_id].number if chunk_id in model.live else model.gone[chunk_id]
    return vector(number)


def _at(count: int, call: Callable[[], None]) -> Callable[[int], None]:
    return lambda number: call() if number == count else None
