"""Streams remember here the K-V of their last chunks as these were written, and the vectors by which they are found.

A chunk has a number in its stream, which counts all chunks that the stream has ever written. Numbers of one document
follow each other, so that a number less that of a row's first chunk says how far away a chunk is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_worker.train.memlong.forward import KeyValue

Numbers = NDArray[np.int64]
_COUNTS = ("written", "first", "begun")


class Pool:
    """The last `size` chunks of each of some streams, in rings: chunk n of a stream stands in place n modulo `size`.

    kv: by memory layer, keys and values `[streams * size, Hkv, S, D]`; empty before the first chunk. vectors:
    `[streams, size, dimension]`. written: how many chunks each stream has written. first: the number of the oldest
    chunk that a stream may still attend to. begun: the number of the first chunk of its present document.
    """

    def __init__(self, streams: int, size: int, dimension: int):
        self.size = size
        self.kv: dict[int, KeyValue] = {}
        self.vectors = np.zeros((streams, size, dimension), dtype=np.float32)
        self.written, self.first, self.begun = [0] * streams, [0] * streams, [0] * streams

    @property
    def room(self) -> int:
        """Return how many chunks there is room for, of all streams."""
        return len(self.vectors) * self.size

    def live(self, stream: int) -> Numbers:
        """Return the numbers of the chunks that a stream remembers, oldest first."""
        return np.arange(max(self.first[stream], self.written[stream] - self.size), self.written[stream])

    def places(self, stream: int, numbers: Numbers) -> Numbers:
        """Return where chunks of a stream stand in `kv`."""
        return stream * self.size + numbers % self.size

    def vectors_of(self, stream: int, numbers: Numbers) -> NDArray[np.float32]:
        """Return the vectors of chunks of a stream, `[n, dimension]`."""
        found: NDArray[np.float32] = self.vectors[stream, numbers % self.size]
        return found

    def add(self, stream: int, kv: Mapping[int, KeyValue], vectors: NDArray[np.float32]) -> None:
        """Write chunks of a stream. kv: by memory layer, `[n, Hkv, S, D]`. vectors: `[n, dimension]`."""
        count = len(vectors)
        numbers = np.arange(self.written[stream], self.written[stream] + count)[-self.size :]
        kept = len(numbers)
        at = torch.from_numpy(self.places(stream, numbers))
        for layer, parts in kv.items():
            if layer not in self.kv:
                self.kv[layer] = _room(parts[0], self.vectors), _room(parts[1], self.vectors)
            for whole, part in zip(self.kv[layer], parts, strict=True):
                whole[at] = part[-kept:].detach().to(whole.dtype)
        self.vectors[stream, numbers % self.size] = vectors[-kept:]
        self.written[stream] += count

    def begin(self, stream: int, keep: bool) -> None:
        """Let what a stream writes from now on be another document. keep: go on attending to the chunks before it."""
        self.begun[stream] = self.written[stream]
        if not keep:
            self.first[stream] = self.written[stream]

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, without the places that no stream attends to."""
        at = torch.from_numpy(self._held())
        flat = torch.from_numpy(self.vectors.reshape(-1, self.vectors.shape[2]))
        kv = {layer: [part[at] for part in parts] for layer, parts in self.kv.items()}
        counts = {name: list(getattr(self, name)) for name in _COUNTS}
        return {**counts, "kv": kv, "vectors": flat[at]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Hold the chunks of a `state` of a pool of the same size, and nothing else."""
        for name in _COUNTS:
            setattr(self, name, list(state[name]))
        at = self._held()
        self.vectors.reshape(-1, self.vectors.shape[2])[at] = state["vectors"].numpy()
        self.kv = {}
        for layer, parts in state["kv"].items():
            rooms = [_room(part, self.vectors) for part in parts]
            for room, part in zip(rooms, parts, strict=True):
                room[torch.from_numpy(at)] = part.to(room.device)
            self.kv[layer] = rooms[0], rooms[1]

    def _held(self) -> Numbers:
        streams: Sequence[int] = range(len(self.written))
        return np.concatenate([self.places(stream, self.live(stream)) for stream in streams])


def _room(chunks: Tensor, vectors: NDArray[np.float32]) -> Tensor:
    """Return zeros for as many chunks as there are vectors, each like those of `chunks` `[n, Hkv, S, D]`."""
    return chunks.new_zeros(vectors.shape[0] * vectors.shape[1], *chunks.shape[1:], requires_grad=False)
