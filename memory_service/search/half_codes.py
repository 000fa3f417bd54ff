"""An index of FAISS over fp16 vectors in memory that this process has taken itself.

FAISS fills the memory that it takes with zeros, page by page, before anything else can be put there: this took twice as
long as to read the vectors from a file and to hash them.
"""

import mmap
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory_service.search.faiss_gpu import faiss

# From so many bytes on NumPy asks for huge pages, for which the system may have to move others first: measured, five
# times as long as ordinary pages take.
_HUGE = 1 << 22
# Where codes begin, in bytes: at the beginning of a line of the processor's cache.
_LINE = 64


def half_index(dimension: int, rows: int) -> tuple[Any, NDArray[np.float16]]:
    """Return an index of so many rows, which never grows, and its codes [rows, dimension]: the caller puts them in, and
    the index searches them where they are."""
    empty = faiss.IndexScalarQuantizer(dimension, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    empty.ntotal = rows
    size = rows * dimension * 2
    # What FAISS writes ends with the codes, and the number of their bytes in front, which is 0 here.
    head = faiss.serialize_index(empty)[:-8].tobytes() + struct.pack("<Q", size)
    skipped = -len(head) % _LINE
    memory = _memory(skipped + len(head) + size)[skipped:]
    memory[: len(head)] = np.frombuffer(head, np.uint8)
    index = faiss.read_index(faiss.ZeroCopyIOReader(faiss.swig_ptr(memory), memory.nbytes))
    index.referenced_objects = (memory,)  # kept for as long as the index
    return index, memory[len(head) :].view(np.float16).reshape(rows, dimension)


def _memory(size: int) -> NDArray[np.uint8]:
    if size < _HUGE:
        return np.empty(size, np.uint8)
    return np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
