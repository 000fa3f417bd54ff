"""Tenants of one service, each beside the same tenant on a service of its own: random calls of all kinds, with the same
names of banks, the same idempotency keys and the same ids of requests, are answered alike to all that they say."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvbank
from kvbank.v1 import bank_pb2, chunk_pb2
from kvbank.v1 import service_pb2 as pb
from memory_service.api.embedded import LocalServer
from memory_service.domain.limits import Pauses
from tests.proof.twins import Refusal, Twin, is_settled
from tests.support import keyed
from tests.support.caller import BF16, DIMENSION, EMBEDDER, HEAD_DIM, HEADS, LAYERS, READER, frames_of, lasting
from tests.support.chunks import described, tensors_of
from tests.support.clocks import SECOND, Hands

TENANTS = ("red", "blue", "green", "default")
# The first holds K-V, the others vectors.
NAMES = ("kv", "plain", "other")
# The chunks that there are, each with a key of its own.
NUMBERS = 24
SPEC = kvbank.KVSpec(READER, LAYERS, HEADS, HEAD_DIM, "bf16")
POLICIES = [
    {"kind": bank_pb2.POLICY_KIND_FREQUENCY},
    {"kind": bank_pb2.POLICY_KIND_RECENCY_HALF},
    {"kind": bank_pb2.POLICY_KIND_REJECT},
    {"kind": bank_pb2.POLICY_KIND_LRU, "target": 70},
]


class Play:
    """Random calls of tenants, which go on from one another."""

    def __init__(self, seed: int, twins: dict[str, Twin], operators: dict[str, list[kvbank.Client]], hands: Hands):
        """Play with the twins of some tenants. operators: of the shared service and of the tenant's own, by tenant.
        hands: of the clocks of all services."""
        self._random = random.Random(seed)
        self._twins, self._operators, self._hands = twins, operators, hands
        self.met: Counter[str] = Counter()
        self._steps: dict[Callable[[Twin], None], int] = {
            self.create: 5,
            self.look: 6,
            self.update: 3,
            self.delete_bank: 1,
            self.write: 30,
            self.retrieve: 8,
            self.fetch: 6,
            self.list_chunks: 4,
            self.change_chunks: 6,
            self.evictions: 5,
            self.quota: 1,
            self.time: 2,
        }

    def step(self) -> None:
        twin = self._twins[self._random.choice(TENANTS)]
        (step,) = self._random.choices(list(self._steps), list(self._steps.values()))
        step(twin)

    def begin(self) -> None:
        for twin in self._twins.values():
            for name in NAMES:
                self._create(twin, name, DIMENSION)

    def create(self, twin: Twin) -> None:
        self._create(twin, self._name(), self._one(4, 4, 4, 4, 5))

    def _create(self, twin: Twin, name: str, dimension: int) -> None:
        kv = bank_pb2.KvSpec(reader_digest=READER, layers=LAYERS, kv_heads=HEADS, head_dim=HEAD_DIM, dtype=BF16)
        bank = bank_pb2.Bank(
            name=name,
            kv=kv if name == "kv" else None,
            embedding=bank_pb2.EmbeddingSpec(embedder_digest=EMBEDDER, dimension=dimension),
            **self._bounds(),
        )
        self._ask(twin, "CreateBank", pb.CreateBankRequest(bank=bank))

    def look(self, twin: Twin) -> None:
        self._ask(twin, "GetBank", pb.GetBankRequest(name=self._name()))
        self._ask(twin, "ListBanks", pb.ListBanksRequest(page_size=self._one(0, 1, 2)))
        self._ask(
            twin, "GetStats", pb.GetStatsRequest(banks=self._one((), (), (self._name(),)), page_size=self._one(0, 1))
        )

    def update(self, twin: Twin) -> None:
        name, new = self._name(), self._bounds() | {"metadata": {"of": twin.tenant}}
        paths = self._random.sample(["capacity", "policy", "quota", "metadata"], self._one(1, 1, 2))
        given = {path: new[path] for path in paths if new[path] is not None}
        request = pb.UpdateBankRequest(bank=bank_pb2.Bank(name=name, **given), update_mask={"paths": paths})
        if isinstance(self._ask(twin, "UpdateBank", request), list):
            twin.wait(lambda stub: is_settled(stub, name))

    def delete_bank(self, twin: Twin) -> None:
        self._ask(twin, "DeleteBank", pb.DeleteBankRequest(name=self._name()))

    def write(self, twin: Twin) -> None:
        name = self._name()
        # One in a stream: whether those behind one that is refused are written is a matter of moments.
        self._ask(twin, "WriteChunks", *frames_of(*self._chunk(name), name, step=1000))

    def retrieve(self, twin: Twin) -> None:
        banks = self._one(["kv"], ["plain"], ["plain", "other"])
        request = pb.RetrieveRequest(
            banks=banks,
            reader_digest=READER if banks == ["kv"] else "",
            embedder_digest=EMBEDDER,
            queries=b"".join(self._vector(self._random.randrange(NUMBERS)) for _ in range(self._one(1, 2))),
            top_k=self._one(1, 3, 20),
            skip_count=self._one(False, False, True),
            # Another tenant may ask under the same id.
            request_id=self._random.randrange(200).to_bytes(16, "big"),
        )
        if self._one(False, True):
            request.filter.CopyFrom(pb.Filter(metadata=[{"key": "half", "values": ["odd"]}], start_from=5))
        self._ask(twin, "Retrieve", request)

    def fetch(self, twin: Twin) -> None:
        bank, ids = self._one("kv", self._name()), self._ids(twin, self._one(1, 2))
        self._ask(twin, "FetchChunks", pb.FetchChunksRequest(bank=bank, reader_digest=READER, chunk_ids=ids))

    def list_chunks(self, twin: Twin) -> None:
        name, embedding = self._name(), self._one(False, True)
        self._ask(
            twin, "ListChunks", pb.ListChunksRequest(bank=name, page_size=self._one(0, 2), with_embedding=embedding)
        )
        for chunk_id in self._ids(twin, 1):
            self._ask(twin, "GetChunk", pb.GetChunkRequest(bank=name, chunk_id=chunk_id))

    def change_chunks(self, twin: Twin) -> None:
        name, ids = self._name(), self._ids(twin, self._one(1, 3))
        kind = self._one("pin", "pin", "delete", "update")
        if kind == "pin":
            self._ask(twin, "PinChunks", pb.PinChunksRequest(bank=name, chunk_ids=ids, pinned=self._one(False, True)))
        elif kind == "delete":
            self._ask(twin, "DeleteChunks", pb.DeleteChunksRequest(bank=name, chunk_ids=ids))
        else:
            metadata = {"of": "x" * self._random.randrange(500)}
            self._ask(twin, "UpdateChunk", pb.UpdateChunkRequest(bank=name, chunk_id=ids[0], metadata=metadata))

    def evictions(self, twin: Twin) -> None:
        name = self._name()
        self._ask(twin, "ExplainEviction", pb.ExplainEvictionRequest(bank=name, need=self._one(1, 3)))
        self._ask(twin, "ListEvictions", pb.ListEvictionsRequest(bank=name, page_size=self._one(0, 3)))

    def quota(self, twin: Twin) -> None:
        """Bound the tenant on both services; that of one is none of the others."""
        quota = kvbank.TenantQuota(
            banks=self._one(None, None, 2), chunks=self._one(None, 10, 20), bytes=self._one(None, 12_000, 30_000)
        )
        for operator in self._operators[twin.tenant]:
            operator.access.set_tenant_quota(twin.tenant, quota)

    def time(self, _twin: Twin) -> None:
        self._hands.go_on(self._random.randrange(20 * SECOND))

    # What is asked

    def _ask(self, twin: Twin, method: str, *requests: Any) -> Any:
        answers = twin.ask(method, *requests)
        if isinstance(answers, Refusal):
            self.met[" ".join([answers.metadata["reason"], answers.metadata.get("subject", "").partition(":")[0]])] += 1
        elif method == "WriteChunks":
            for ack in answers:
                self.met.update(written=not ack.replayed, replayed=ack.replayed, gone=ack.gone)
                self.met["evicted"] += len(ack.evicted_chunk_ids)
        elif method == "Retrieve":
            self.met["hits"] += len(answers[0].header.chunks)
        return answers

    def _one(self, *values: Any) -> Any:
        return self._random.choice(values)

    def _name(self) -> str:
        return self._one(*NAMES)

    def _ids(self, twin: Twin, count: int) -> list[int]:
        """Return ids of chunks, mostly of the tenant, and sometimes of another one."""
        whose = twin if self._random.random() < 0.6 else self._twins[self._one(*TENANTS)]
        known = whose.told[-25:] or [1]
        return self._random.sample(known, min(count, len(known)))

    def _bounds(self) -> dict[str, Any]:
        unit = self._one("chunks", "chunks", "tokens")
        capacity, quota = {unit: self._random.randrange(4, 10)}, {unit: self._random.randrange(4, 15)}
        return {
            "capacity": self._one(None, capacity, capacity, capacity),
            "policy": self._one(*POLICIES),
            "quota": self._one(None, None, None, quota),
        }

    def _vector(self, number: int) -> bytes:
        return np.random.default_rng(number).standard_normal(DIMENSION).astype("<f4").tobytes()

    def _chunk(self, bank: str) -> tuple[chunk_pb2.Chunk, bytes]:
        """Make the chunk of some number, which is its key; a few have other words, so that the key is used again."""
        number = self._random.randrange(NUMBERS)
        tokens = 1 + number % 4
        tensors, data = described(tensors_of(SPEC, tokens, np.random.default_rng(number)) if bank == "kv" else {})
        chunk = chunk_pb2.Chunk(
            idempotency_key=number.to_bytes(16, "big"),
            start=number,
            original_length=5,
            stored_length=tokens,
            token_ids=[1, 2, 3, 4, 5],
            text=self._one("a text", "a text", "a text", "other words"),
            metadata={"half": "odd" if number % 2 else "even"},
            embedding=self._vector(number),
            pinned=number % 9 == 0,
            expiry=lasting(60 * SECOND, renew=number % 2 == 0) if number % 5 == 0 else None,
        )
        if tensors:
            producer = chunk_pb2.Producer(method="none", version="1", context="isolated", measured_loss=0.0)
            kind = chunk_pb2.PAYLOAD_KIND_LAYER_KV
            chunk.payload.CopyFrom(chunk_pb2.PayloadDescriptor(kind=kind, tensors=tensors, producer=producer))
        return chunk, data


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Callable[[int], Play]]:
    """Start a service of four tenants and one for each, all by the same clock."""
    hands = Hands()
    with ExitStack() as open_:

        def server(name: str) -> LocalServer:
            # What has expired is left where it is: when it goes is a matter of moments.
            pauses = Pauses(left_out={"expiry"})
            made = LocalServer(tmp_path / name, clock=hands.clock(), pauses=pauses, durability="os")
            return open_.enter_context(made)

        def operator(server: LocalServer) -> kvbank.Client:
            with kvbank.connect(server.address) as owner:
                key = owner.access.create_key("operator").secret
            return open_.enter_context(kvbank.connect(server.address, api_key=key))

        def channel(server: LocalServer, operator: kvbank.Client, tenant: str) -> Any:
            if tenant != "default":
                operator.access.create_tenant(tenant)
            key = operator.access.create_key("admin", tenant=tenant).secret
            return open_.enter_context(keyed.channel(server.address, key))

        def begin(seed: int) -> Play:
            shared = server("shared")
            of_shared = operator(shared)
            twins, operators = {}, {}
            for tenant in TENANTS:
                alone = server(tenant)
                operators[tenant] = [of_shared, operator(alone)]
                channels = [channel(*each, tenant) for each in zip((shared, alone), operators[tenant], strict=True)]
                twins[tenant] = Twin(tenant, *channels)
            return Play(seed, twins, operators, hands)

        yield begin


def run(play: Play, steps: int) -> None:
    """Play, and see to it that enough was met."""
    play.begin()
    for _ in range(steps):
        play.step()
    rare = {
        *("written", "replayed", "gone", "evicted", "hits"),
        *("KEY_REUSED ", "CHUNK_NOT_FOUND ", "BANK_NOT_FOUND ", "BANK_EXISTS ", "BANK_FULL "),
        *("QUOTA_EXCEEDED bank", "QUOTA_EXCEEDED tenant"),
    }
    assert {what for what in rare if play.met[what] < steps / 500} == set(), play.met


@pytest.mark.slow
def test_a_tenant_is_answered_as_on_a_service_of_its_own(play: Callable[[int], Play]) -> None:
    run(play(1), 500)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_tenant_is_answered_as_on_a_service_of_its_own_for_long(play: Callable[[int], Play]) -> None:
    run(play(2), 10_000)
