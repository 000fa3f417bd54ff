"""Searches in a bank "v" of vectors alone, and what brute force finds in the same vectors."""

import numpy as np

from kvbank.v1 import service_pb2 as pb


def ids_of(caller, vector=(1, 0, 0, 0), **fields):
    """Search, and return the ids of the hits of each query."""
    header, _ = caller.retrieve(vector, **({"reader_digest": ""} | fields))
    return [[hit.chunk_id for hit in query.hits] for query in header.queries]


def stats(caller, bank="v"):
    """Return the figures of the index of a bank."""
    return caller.stub.GetStats(pb.GetStatsRequest(banks=[bank])).banks[0].index


def fill(caller, vectors, bank="v", **fields):
    """Write chunks without K-V, and return their ids."""
    return caller.write_together((caller.chunk(vector, layers=[], **fields) for vector in vectors), bank)


def normal(count, seed=0):
    """Return `count` random vectors [count, 4]."""
    return np.random.default_rng(seed).standard_normal((count, 4)).astype("<f4")


def best(found, ids, query, top_k=8):
    """Return the ids of the best chunks by brute force."""
    scores = np.multiply(found, query, dtype=np.float64).sum(axis=1).astype(np.float32)
    return [ids[i] for i in np.lexsort((ids, -scores))[:top_k]]
