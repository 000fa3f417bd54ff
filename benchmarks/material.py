"""The data that is written and asked for: K-V of 256 tokens, clustered unit vectors, texts. The peers use it too, so
this file imports numpy only."""

import numpy as np
import numpy.typing as npt

MIB = 1 << 20
DIMENSION = 384
HEADS, HEAD_DIM, TOKENS = 8, 128, 256
CLUSTER = 100
"""Vectors in a cluster. Vector i belongs to the cluster i modulo the number of clusters."""

TEXT = "What was said at that time, in about two hundred characters, as a conversation remembers it. " * 2

Vectors = npt.NDArray[np.float32]


def vectors(count: int, dimension: int = DIMENSION, seed: int = 0) -> Vectors:
    """Make unit vectors [count, dimension] around count / CLUSTER random directions."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, count // CLUSTER), dimension), dtype=np.float32)
    found = centres[np.arange(count) % len(centres)]
    found += 0.7 * rng.standard_normal((count, dimension), dtype=np.float32)
    return unit(found)


def near(found: Vectors, count: int, seed: int = 1) -> Vectors:
    """Make unit vectors [count, d] near randomly chosen vectors of `found` [n, d], as queries."""
    rng = np.random.default_rng(seed)
    chosen = found[rng.integers(len(found), size=count)]
    noise = rng.standard_normal(chosen.shape, dtype=np.float32)
    return unit(chosen + 0.2 / np.sqrt(chosen.shape[1]) * noise)


def unit(found: Vectors) -> Vectors:
    """Scale each vector [n, d] to length 1."""
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def tensors(layers: int, tokens: int = TOKENS, seed: int = 0) -> dict[str, npt.NDArray[np.generic]]:
    """Make random K-V of a chunk in fp16, each [8 heads, tokens, 128]: a layer of 256 tokens has 1 MiB."""
    rng, shape = np.random.default_rng(seed), (HEADS, tokens, HEAD_DIM)
    made: dict[str, npt.NDArray[np.generic]] = {}
    for layer in range(layers):
        for name in "kv":
            made[f"{name}.{layer}"] = np.frombuffer(rng.bytes(2 * HEADS * tokens * HEAD_DIM), np.float16).reshape(shape)
        made[f"pos.{layer}"] = np.arange(tokens, dtype=np.int32)
    return made
