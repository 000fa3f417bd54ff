"""Malformed requests through the real socket: messages with any field changed, bytes changed, cut or made up."""

import random
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf.descriptor import FieldDescriptor

import kvbank
from kvbank.v1 import access_pb2, bank_pb2, direct_pb2, error_pb2
from kvbank.v1 import service_pb2 as pb
from kvbank.wire import local_socket
from kvbank.wire import proof as _proof
from kvbank.wire.stub import make_stub
from memory_service.api.server import SERVICES
from tests.proof import fuzzed_sessions
from tests.proof.content import (
    DIGESTS,
    DIMENSION,
    EMBEDDER,
    EMBEDDING,
    KV,
    READER,
    chunk_of,
    differences,
    frames_of,
    new_key,
    vector_of,
)
from tests.proof.once import reason_of
from tests.support.refusals import error_of

SERVICE = pb.DESCRIPTOR.services_by_name["MemoryService"]
# Of all services, so that a new one is fuzzed, or fails the test that its methods have templates.
METHODS = [method for service in SERVICES for method in service.methods]
TENANT = "fuzzed-tenant"
BANKS = ("fuzzed", "fuzzed-vectors")
# For calls that delete a bank, so that the others find theirs.
DOOMED = "fuzzed-doomed"
CANARY = "canary"
# Far more than any of these calls may take.
SECONDS = 60
# Of the calls, those over the socket for direct calls.
DIRECT_SHARE = 0.15
# Chunks in the beginning, and calls until they are laid out anew: soon one deletes the bank, or makes it too small.
LAID_OUT, ROUND = 30, 100
# What a caller can be told. An error without one of these was not made by us, or says that we are at fault.
OUR_FAULTS = {"UNSPECIFIED", "INTERNAL", "CHECKSUM_MISMATCH", "STORAGE_ERROR", "NOT_SERVING", "DISK_FULL"}
REASONS = {name.removeprefix("ERROR_REASON_") for name in error_pb2.ErrorReason.DESCRIPTOR.values_by_name} - OUR_FAULTS
INTEGERS = (0, 1, -1, 2, 8, 1000, 1001, 2**31 - 1, -(2**31), 2**31, 2**63 - 1, -(2**63), 2**64 - 1)
NUMBERS = (0.0, -1.0, 1e-30, 3e38, float("nan"), float("inf"), float("-inf"))
STRINGS = ("", "\0", "x" * 300, "ü" * 100, "../../etc", "a b", "99999999999999999999", "-1", READER, EMBEDDER, *BANKS)


def _bytes(choose: random.Random) -> bytes:
    vector = np.full(DIMENSION, choose.choice(NUMBERS)).astype("<f4").tobytes()
    return choose.choice((b"", b"\0" * 16, choose.randbytes(16), vector, vector * 3, vector[:-1]))


def _one_of(values: Iterable[Any]) -> Callable[[random.Random], Any]:
    kept = tuple(values)
    return lambda choose: choose.choice(kept)


# How to choose a value of a field that holds neither bytes nor a message, by its type in C++, which can hold them all.
VALUES: dict[int, Callable[[random.Random], Any]] = {
    FieldDescriptor.CPPTYPE_STRING: _one_of(STRINGS),
    FieldDescriptor.CPPTYPE_BOOL: lambda choose: choose.random() < 0.5,
    FieldDescriptor.CPPTYPE_DOUBLE: _one_of(NUMBERS),
    FieldDescriptor.CPPTYPE_FLOAT: _one_of(NUMBERS),
    FieldDescriptor.CPPTYPE_ENUM: _one_of((0, 1, 2, 3, 4, 99)),
    FieldDescriptor.CPPTYPE_INT32: _one_of(value for value in INTEGERS if -(2**31) <= value < 2**31),
    FieldDescriptor.CPPTYPE_UINT32: _one_of(value for value in INTEGERS if 0 <= value < 2**32),
    FieldDescriptor.CPPTYPE_INT64: _one_of(value for value in INTEGERS if value < 2**63),
    FieldDescriptor.CPPTYPE_UINT64: _one_of(value for value in INTEGERS if value >= 0),
}


@dataclass
class Fuzzed:
    """What a run has found. codes: answers by status code. bad: answers that break the rules. done: calls by method
    that ended well."""

    messages: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        codes = ", ".join(f"{name} {count}" for name, count in self.codes.most_common())
        return f"{self.messages} messages: {codes}; against the rules {len(self.bad)}"


def fuzz(
    address: str, calls: int, seed: int, *, threads: int = 4, tell: Callable[[int], None] = lambda _: None
) -> Fuzzed:
    """Make so many calls of a server that shares its files with us.

    A chunk of a bank that no call names is read again and again; it must stay what it is.
    """
    report, key = Fuzzed(), new_key(tokens=5)
    with kvbank.connect(address) as client, grpc.insecure_channel(address) as channel:
        client.create_bank(CANARY, kv=KV, embedding=EMBEDDING, exist_ok=True)
        chunk_id = client.write(CANARY, chunk_of(key), **DIGESTS).chunk_id
        with ThreadPoolExecutor(threads) as pool:
            for begin in range(0, calls, ROUND):
                known = know(client, channel)
                makers = [Maker(seed + begin + number, known) for number in range(min(ROUND, calls - begin))]
                for outcome in pool.map(lambda maker: maker.call(channel), makers):
                    report.messages += outcome.messages
                    report.codes[outcome.code] += 1
                    report.bad += outcome.bad
                    report.done[outcome.method] += outcome.code == "OK"
                (chunk,) = client.fetch(CANARY, [chunk_id], reader_digest=READER)
                assert not differences(chunk)
                tell(min(begin + ROUND, calls))
    return report


def _shared(channel: grpc.Channel) -> tuple[bytes, str]:
    """Return the proof that we may read the server's files (without which calls that name files end before they begin),
    and the socket for direct calls."""
    shared = make_stub(channel).GetServerInfo(pb.GetServerInfoRequest()).same_host
    nonce = Path(shared.root, shared.nonce_file).read_bytes()
    return _proof.of_client(nonce), str(Path(shared.root, shared.socket))


def _lay_out(client: kvbank.Client) -> list[int]:
    """Make the banks that the calls name anew, and return ids of chunks of the first one."""
    for bank, kv in zip(BANKS, (KV, None), strict=True):
        client.delete_bank(bank, missing_ok=True)
        client.create_bank(bank, kv=kv, embedding=EMBEDDING)
    client.create_bank(DOOMED, kv=None, embedding=EMBEDDING, exist_ok=True)
    chunks = [chunk_of(new_key(tokens=2)) for _ in range(LAID_OUT)]
    return [result.chunk_id for result in client.write_many(BANKS[0], chunks, **DIGESTS)]


@dataclass
class Known:
    """What a caller needs to come far: the proof that it has read the nonce, the socket for direct calls, and chunks,
    keys, a bank and sessions that were there."""

    proof: bytes
    socket: str
    chunk_ids: list[int]
    key_ids: list[str]
    bank_uid: str
    sessions: dict[str, fuzzed_sessions.KnownSession]


def know(client: kvbank.Client, channel: grpc.Channel) -> Known:
    """Learn the service, with the banks laid out anew."""
    if TENANT not in [tenant.name for tenant in client.access.list_tenants()]:
        client.access.create_tenant(TENANT)
    keys = [client.access.create_key("read").key.key_id for _ in range(2)]
    chunk_ids = _lay_out(client)
    sessions = fuzzed_sessions.lay_out(channel)
    return Known(*_shared(channel), chunk_ids, keys, client.get_bank(BANKS[0]).uid, sessions)


@dataclass
class Outcome:
    """How one call has ended."""

    method: str
    messages: int
    code: str
    bad: list[str]


class Maker:
    """One malformed call, made from its seed."""

    def __init__(self, seed: int, known: Known) -> None:
        self._choose = random.Random(seed)
        self._seed, self._known = seed, known

    def call(self, channel: grpc.Channel) -> Outcome:
        """Make it and judge the answer."""
        if self._choose.random() < DIRECT_SHARE:
            return self._call_directly()
        method = self._choose.choice(METHODS)
        frames = self._frames(list(TEMPLATES[method.name](self._choose, self._known)))
        kind = ("stream" if method.client_streaming else "unary") + ("_stream" if method.server_streaming else "_unary")
        send = getattr(channel, kind)(f"/{method.containing_service.full_name}/{method.name}")
        request = iter(frames) if method.client_streaming else frames[0]
        try:
            answer = send(request, timeout=SECONDS)
            for _ in answer if method.server_streaming else ():
                pass
        except grpc.RpcError as error:
            sent = f"{method.name} (seed {self._seed}): {[frame[:200] for frame in frames]}"
            bad = [] if reason_of(error) in REASONS else [f"{error.code().name} {error.details()} for {sent}"]
            return Outcome(method.name, len(frames), error.code().name, bad)
        return Outcome(method.name, len(frames), "OK", [])

    def _call_directly(self) -> Outcome:
        """Call over the socket; a message with a wrong length may be answered by the end of the connection."""
        make = self._choose.choice(list(DIRECT.values()))
        message = self._spoiled(make(self._choose, self._known))
        length = len(message) if self._choose.random() < 0.9 else self._choose.choice((0, 3, 2**31, 2**32 - 1))
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(SECONDS)
            connection.connect(self._known.socket)
            connection.sendall(length.to_bytes(4, "little") + message)
            connection.shutdown(socket.SHUT_WR)
            raw = local_socket.receive(connection)
        if raw is None:
            bad = [f"no answer to {message[:200]!r} (seed {self._seed})"] if length == len(message) else []
            return Outcome("direct", 1, "CLOSED", bad)
        answer = direct_pb2.DirectResponse.FromString(raw)
        if not answer.HasField("error"):
            return Outcome("direct", 1, "OK", [])
        code, reason, text = error_of(raw)
        bad = [] if reason in REASONS else [f"{code} {text} for {message[:200]!r} (seed {self._seed})"]
        return Outcome("direct", 1, code, bad)

    def _frames(self, messages: list[Any]) -> list[bytes]:
        """Make the messages of a stream. Mostly one of them is spoiled: where many are, none comes as far as the
        end."""
        spoiled = self._choose.randrange(len(messages)) if self._choose.random() < 0.7 else None
        return [
            self._spoiled(message) if spoiled in (None, number) else message.SerializeToString()
            for number, message in enumerate(messages)
        ]

    def _spoiled(self, message: Any) -> bytes:
        """Change few fields of a message, or none, so that it comes far; some messages become bytes that are none."""
        kind = self._choose.random()
        if kind < 0.05:
            return self._choose.randbytes(self._choose.choice((0, 1, 5, 100, 5000)))
        for _ in range(self._choose.choice((0, 0, 0, 1, 1, 1, 2, 5))):
            self._change(message)
        raw = message.SerializeToString()
        return self._corrupted(raw) if kind < 0.25 else raw

    def _corrupted(self, raw: bytes) -> bytes:
        begin = self._choose.randrange(len(raw) + 1)
        match self._choose.randrange(4):
            case 0:
                return raw[:begin]
            case 1:
                return raw[:begin] + self._choose.randbytes(self._choose.randint(1, 9)) + raw[begin:]
            case 2:
                return raw[:begin] + raw[begin + self._choose.randint(1, 9) :]
            case _:
                return raw[:begin] + self._choose.randbytes(1) + raw[begin + 1 :]

    def _change(self, message: Any) -> None:
        """Change one field, here or further in."""
        changed = self._choose.choice(message.DESCRIPTOR.fields or [None])
        if changed is None:
            return
        if self._choose.random() < 0.15:
            message.ClearField(changed.name)
        elif changed.message_type is not None and changed.message_type.GetOptions().map_entry:
            entries = getattr(message, changed.name)
            if changed.message_type.fields_by_name["value"].cpp_type == FieldDescriptor.CPPTYPE_STRING:
                entries[self._choose.choice(STRINGS)] = self._choose.choice((*STRINGS, "y" * 40_000))
        elif changed.message_type is not None:
            inner = getattr(message, changed.name)
            if changed.is_repeated:
                inner = self._choose.choice(inner) if inner and self._choose.random() < 0.7 else inner.add()
            inner.SetInParent()
            self._change(inner)
        elif changed.is_repeated:
            getattr(message, changed.name).extend(
                self._value(changed) for _ in range(self._choose.choice((1, 2, 1100)))
            )
        else:
            setattr(message, changed.name, self._value(changed))

    def _value(self, changed: FieldDescriptor) -> Any:
        if changed.type == FieldDescriptor.TYPE_BYTES:
            return _bytes(self._choose)
        return VALUES[changed.cpp_type](self._choose)


def _bank(choose: random.Random) -> bank_pb2.Bank:
    spec = {"reader_digest": READER, "layers": KV.layers, "kv_heads": KV.kv_heads, "head_dim": KV.head_dim}
    return bank_pb2.Bank(
        name=choose.choice((*BANKS, f"another-{choose.randrange(100)}")),
        kv=bank_pb2.KvSpec(**spec, dtype=bank_pb2.DATA_TYPE_BF16),
        embedding=bank_pb2.EmbeddingSpec(embedder_digest=EMBEDDER, dimension=DIMENSION),
        capacity=bank_pb2.Capacity(chunks=choose.randint(1, 50)),
    )


def _frames(choose: random.Random, _: Known) -> Iterator[pb.WriteChunksRequest]:
    for _ in range(choose.randint(1, 2)):
        yield from frames_of(choose.choice(BANKS), chunk_of(choose.randbytes(16)), step=choose.choice((500, 1 << 20)))


def _update(choose: random.Random, _: Known) -> pb.UpdateBankRequest:
    request = pb.UpdateBankRequest(bank=_bank(choose))
    paths = ("capacity", "policy", "metadata", "quota", "expiry", "index", "name", "")
    request.update_mask.paths.extend(choose.sample(paths, choose.randint(0, 3)))
    return request


def _retrieve(choose: random.Random, _: Known) -> pb.RetrieveRequest:
    queries = vector_of(choose.randbytes(16)).tobytes() * choose.randint(1, 3)
    return pb.RetrieveRequest(banks=[choose.choice(BANKS)], queries=queries, top_k=choose.randint(0, 20), **DIGESTS)


def _fetch(choose: random.Random, known: Known) -> pb.FetchChunksRequest:
    return pb.FetchChunksRequest(bank=choose.choice(BANKS), reader_digest=READER, chunk_ids=_ids(choose, known))


def _ids(choose: random.Random, known: Known) -> list[int]:
    return [
        choose.choice(known.chunk_ids) if choose.random() < 0.8 else choose.randint(1, 3000)
        for _ in range(choose.randint(1, 5))
    ]


def _proven(choose: random.Random, known: Known) -> bytes:
    return known.proof if choose.random() < 0.9 else choose.randbytes(len(known.proof))


def _retrieve_files(choose: random.Random, known: Known) -> pb.RetrieveFilesRequest:
    return pb.RetrieveFilesRequest(retrieve=_retrieve(choose, known), proof=_proven(choose, known))


def _fetch_files(choose: random.Random, known: Known) -> pb.FetchFilesRequest:
    return pb.FetchFilesRequest(fetch=_fetch(choose, known), proof=_proven(choose, known))


Template = Callable[[random.Random, Known], Any]
# The calls of direct.proto.
DIRECT: dict[str, Template] = {
    "retrieve": lambda choose, known: direct_pb2.DirectRequest(retrieve=_retrieve_files(choose, known)),
    "fetch": lambda choose, known: direct_pb2.DirectRequest(fetch=_fetch_files(choose, known)),
}


def _one(make: Template) -> Template:
    return lambda choose, known: [make(choose, known)]


# For every method how to make what it takes.
TEMPLATES: dict[str, Template] = {
    **fuzzed_sessions.TEMPLATES,
    "GetServerInfo": _one(lambda *_: pb.GetServerInfoRequest()),
    "CreateBank": _one(lambda choose, _: pb.CreateBankRequest(bank=_bank(choose))),
    "GetBank": _one(lambda choose, _: pb.GetBankRequest(name=choose.choice(BANKS))),
    "ListBanks": _one(lambda *_: pb.ListBanksRequest(page_size=10)),
    "UpdateBank": _one(_update),
    # As a call that was made before: with the uid of the bank that has the name by now.
    "ReplaceBank": _one(
        lambda _, known: pb.ReplaceBankRequest(name=BANKS[0], uid="ab" * 8, by="another", by_uid=known.bank_uid)
    ),
    "DeleteBank": _one(
        lambda choose, _: pb.DeleteBankRequest(name=choose.choice((DOOMED, f"another-{choose.randrange(100)}")))
    ),
    "WriteChunks": _frames,
    "Retrieve": _one(_retrieve),
    "FetchChunks": _one(_fetch),
    "RetrieveFiles": _one(_retrieve_files),
    "FetchFiles": _one(_fetch_files),
    "GetChunk": _one(
        lambda choose, known: pb.GetChunkRequest(bank=choose.choice(BANKS), chunk_id=_ids(choose, known)[0])
    ),
    "ListChunks": _one(lambda choose, _: pb.ListChunksRequest(bank=choose.choice(BANKS), page_size=5)),
    "UpdateChunk": _one(
        lambda choose, known: pb.UpdateChunkRequest(
            bank=choose.choice(BANKS), chunk_id=_ids(choose, known)[0], metadata={"a": "b"}
        )
    ),
    "DeleteChunks": _one(
        lambda choose, known: pb.DeleteChunksRequest(bank=choose.choice(BANKS), chunk_ids=_ids(choose, known))
    ),
    "PinChunks": _one(
        lambda choose, known: pb.PinChunksRequest(bank=choose.choice(BANKS), chunk_ids=_ids(choose, known))
    ),
    "ExplainEviction": _one(lambda choose, _: pb.ExplainEvictionRequest(bank=choose.choice(BANKS), need=3)),
    "ListEvictions": _one(lambda choose, _: pb.ListEvictionsRequest(bank=choose.choice(BANKS), page_size=5)),
    "GetStats": _one(lambda choose, _: pb.GetStatsRequest(banks=[choose.choice(BANKS)])),
    "Compact": _one(lambda choose, _: pb.CompactRequest()),
    "WhoAmI": _one(lambda *_: access_pb2.WhoAmIRequest()),
    "CreateKey": _one(lambda choose, _: access_pb2.CreateKeyRequest(role=choose.randint(1, 4), banks=["*"])),
    "ListKeys": _one(lambda *_: access_pb2.ListKeysRequest(page_size=5)),
    "RevokeKey": _one(lambda _, known: access_pb2.RevokeKeyRequest(key_id=known.key_ids[0])),
    "RotateKey": _one(lambda _, known: access_pb2.RotateKeyRequest(key_id=known.key_ids[1])),
    "CreateTenant": _one(lambda choose, _: access_pb2.CreateTenantRequest(name=f"tenant-{choose.randrange(10**6)}")),
    "ListTenants": _one(lambda *_: access_pb2.ListTenantsRequest(page_size=5)),
    "SetTenantQuota": _one(lambda *_: access_pb2.SetTenantQuotaRequest(name=TENANT, quota={"banks": 5})),
    "DeleteTenant": _one(lambda *_: access_pb2.DeleteTenantRequest(name=TENANT)),
}
