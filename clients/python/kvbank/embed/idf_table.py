"""The weights of hashed features, by how rare they are in English prose: the logarithm of inverse chunk frequency.

A table is counted once over many chunks of text (`python -m model_worker.train.idf`), and ships with the package. A
feature's weight is that of its bucket, log((N + 1) / (n + 1)) where n of N chunks have a feature of the bucket (Sparck
Jones 1972). Weights are kept in steps of a 255th of log(N + 1), from 1 on, so that a text with a word never becomes the
zero vector.
"""

import io
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvbank._exceptions import InvalidArgument

BUCKETS = 1 << 18
SHIPPED = Path(__file__).parent / "idf.npz"
_STEPS = 255


class IdfTable:
    """Weights of features by the bucket of their hash.

    steps: `[buckets]` uint8, the weights in steps. chunks: how many were counted.
    """

    def __init__(self, steps: NDArray[np.uint8], chunks: int):
        self._steps, self.chunks = steps, chunks
        self.digest = xxhash.xxh3_128_hexdigest(f"{chunks} ".encode() + steps.tobytes())

    @classmethod
    def counted(cls, chunks: Iterable[NDArray[np.uint64]], buckets: int = BUCKETS) -> Self:
        """Count chunks, each given as the hashes of its features. Errors: InvalidArgument where there is no chunk."""
        found, total = np.zeros(buckets), 0
        for hashes in chunks:
            found[np.unique(hashes % np.uint64(buckets)).astype(np.int64)] += 1
            total += 1
        if not total:
            raise InvalidArgument("there is no chunk of text to count")
        weights = np.log((total + 1) / (found + 1)) / math.log(total + 1)
        return cls(np.maximum(np.rint(weights * _STEPS), 1).astype(np.uint8), total)

    def weights(self, hashes: NDArray[np.uint64], known: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the weight of each feature, by its hash.

        known: which features are of the script that was counted. The others, which no chunk has, weigh log(N + 1) each,
        since what their buckets say is about other features. So a text of another script is embedded as without a
        table, and a foreign name in an English text counts as the rare word that it is.
        """
        steps = self._steps[(hashes % np.uint64(len(self._steps))).astype(np.int64)]
        return np.where(known, steps, _STEPS) * (math.log(self.chunks + 1) / _STEPS)

    def write(self, path: Path) -> None:
        """Write the table to a file, compressed; the same table gives the same bytes."""
        content = io.BytesIO()
        np.savez_compressed(content, steps=self._steps, chunks=np.int64(self.chunks))
        path.write_bytes(content.getvalue())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a table that `write` has written. Errors: InvalidArgument for any other file."""
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as content:
                steps: Any = content["steps"]
                chunks = int(content["chunks"])
        except Exception as error:  # of zipfile, zlib and numpy, by what is wrong with the file
            raise InvalidArgument(f"cannot read the table {path}: {error}") from error
        if steps.dtype != np.uint8 or steps.ndim != 1 or not len(steps) or chunks < 1:
            raise InvalidArgument(f"{path} is no table of weights")
        return cls(steps, chunks)


@cache
def shipped_table() -> IdfTable:
    """Return the table that ships with the package, counted over novels."""
    return IdfTable.read(SHIPPED)
