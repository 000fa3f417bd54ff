"""The chunks that left a window last: each row keeps some of them before it, without asking its bank."""

from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from model_worker.window.capture import Layers
from model_worker.window.recalled import RecalledChunk

_PARTS = ("keys", "values", "offsets")


class Recents:
    """The last `most` chunks of each row, oldest first. changed: whether others are held since it was set to False."""

    def __init__(self, most: int):
        self.most = most
        self.reset()

    def reset(self) -> None:
        """Forget the chunks of all rows."""
        self.rows: list[deque[RecalledChunk]] = []
        self.changed = False

    def add(self, chunks: Sequence[RecalledChunk | None]) -> None:
        """Take one more chunk for each row (None: a row from which none left), and let the oldest one go."""
        self.rows = self.rows or [deque(maxlen=self.most) for _ in chunks]
        for row, chunk in zip(self.rows, chunks, strict=True):
            if chunk is not None:
                row.append(chunk)
                self.changed = True

    def take(self, rows: Sequence[Sequence[RecalledChunk]]) -> None:
        """Hold these chunks of each row, of which the last `most` stay."""
        self.rows, self.changed = [deque(row, maxlen=self.most) for row in rows], True

    def state(self) -> dict[str, Tensor]:
        """Return the chunks of the first row, by name."""
        found = {}
        for index, chunk in enumerate(self.rows[0] if self.rows else ()):
            found[f"recent_chunk.{index}.start"] = torch.tensor(chunk.start)
            found[f"recent_chunk.{index}.token_ids"] = torch.tensor(chunk.token_ids, dtype=torch.long)
            for layer, tensors in chunk.layers.items():
                for part, tensor in zip(_PARTS, tensors, strict=True):
                    found[f"recent_chunk.{index}.layer.{layer}.{part}"] = tensor
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the chunks of a `state`, for one row, whatever else is in it."""
        self.rows = [deque(maxlen=self.most)]
        index = 0
        while f"recent_chunk.{index}.start" in state:
            self.rows[0].append(_chunk(state, f"recent_chunk.{index}."))
            index += 1
        self.changed = index > 0


def _chunk(state: Mapping[str, Tensor], name: str) -> RecalledChunk:
    """Return the chunk whose tensors have names in `state` that begin with `name`."""
    layers: Layers = {}
    for layer in sorted({int(key.split(".")[3]) for key in state if key.startswith(f"{name}layer.")}):
        keys, values, offsets = (state[f"{name}layer.{layer}.{part}"] for part in _PARTS)
        layers[layer] = keys, values, offsets
    return RecalledChunk(0, int(state[f"{name}start"]), layers, tuple(state[f"{name}token_ids"].tolist()))
