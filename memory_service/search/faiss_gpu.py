"""FAISS, and the same index on a GPU where there is one. This file owns the rule that a GPU is a help and never a
condition: what it cannot do, or fails to do, is done by the CPU."""

import logging
import threading
from typing import Any

import faiss as _faiss

# Its stubs describe it in part.
faiss: Any = _faiss

# So many hits a GPU can sort.
_MOST = 2048
_log = logging.getLogger(__name__)
_resources: list[Any] = []


class GpuCopy:
    """Holds a copy of a sealed fp16 index on the first GPU. The first search makes it; one thread at a time
    searches."""

    def __init__(self, index: Any) -> None:
        self._index = index
        self._copy: Any = None
        self._tried = False
        self._lock = threading.Lock()

    @property
    def in_use(self) -> bool:
        """Tell whether scores may be those of a GPU, where the query is fp16 too."""
        return self._copy is not None

    def search(self, queries: Any, width: int, **parameters: Any) -> Any:
        """Search the copy as one searches the index itself; return None where the index must be searched."""
        if (self._tried and self._copy is None) or width > _MOST:
            return None
        with self._lock:
            try:
                if not self._tried:
                    self._tried = True
                    self._copy = _cloned(self._index)
                if self._copy is not None:
                    return self._copy.search(queries, width, **parameters)
            except Exception:
                _log.warning("the GPU is not used for this index any more", exc_info=True)
                self._copy = None
        return None


def _cloned(index: Any) -> Any:
    # A build without GPU has none of these names, or says 0.
    if not getattr(faiss, "get_num_gpus", int)() or not hasattr(faiss, "index_cpu_to_gpu"):
        return None
    if not _resources:
        _resources.append(faiss.StandardGpuResources())
    options = faiss.GpuClonerOptions()
    options.useFloat16 = True
    return faiss.index_cpu_to_gpu(_resources[0], 0, index, options)


def selector(bits: Any) -> Any:
    """Make what lets FAISS find only the rows whose bit is set; None lets it find all."""
    return None if bits is None else faiss.IDSelectorBitmap(bits)
