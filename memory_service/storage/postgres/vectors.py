"""Embeddings on their way to the database and back. This file owns that no bit of them changes: they go as the binary
form of pgvector's type, and come back as float32 LE."""

import numpy as np
import psycopg
from psycopg import pq
from psycopg.abc import Buffer
from psycopg.adapt import Dumper, Loader
from psycopg.types import TypeInfo

# The number of values, and two bytes that are always 0.
_HEAD = 4


class Embedding(bytes):
    """An embedding, float32 LE, as a parameter of a statement."""


class _BinaryDumper(Dumper):
    format = pq.Format.BINARY

    def dump(self, obj: Buffer) -> bytes:
        vector = np.frombuffer(obj, "<f4")
        return len(vector).to_bytes(2, "big") + b"\0\0" + vector.astype(">f4").tobytes()


class _BinaryLoader(Loader):
    format = pq.Format.BINARY

    def load(self, data: Buffer) -> bytes:
        return np.frombuffer(data, ">f4", offset=_HEAD).astype("<f4").tobytes()


class _TextLoader(Loader):
    def load(self, data: Buffer) -> bytes:
        return np.array(bytes(data)[1:-1].split(b","), np.float32).astype("<f4").tobytes()


def register(connection: "psycopg.Connection[object]") -> None:
    """Let a connection know the type, where the database has it already."""
    info = TypeInfo.fetch(connection, "vector")
    if info is None:
        return
    info.register(connection)
    dumper = type("EmbeddingDumper", (_BinaryDumper,), {"oid": info.oid})
    connection.adapters.register_dumper(Embedding, dumper)
    for loader in (_TextLoader, _BinaryLoader):
        connection.adapters.register_loader(info.oid, loader)
