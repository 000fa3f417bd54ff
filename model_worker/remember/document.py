"""While a document is read, what is stored carries the document's name and metadata."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from kvbank.wire.scalars import Scalar
from model_worker.errors import InputError
from model_worker.remember.settings import MemorySettings, changed

# The key of metadata that has the name of a chunk's document, as in a `kvbank.TextMemory`.
SOURCE = "source"


class Stores(Protocol):
    """What stores chunks by its settings: a memory, or passages."""

    settings: Any


@contextmanager
def of_document(store: Stores, source: str | None, metadata: Mapping[str, Scalar] | None) -> Iterator[None]:
    """Let what is stored in the block carry a document's name and metadata, beside those of the settings.

    Raises InputError for metadata that have a source of their own.
    """
    before: MemorySettings = store.settings
    own = {**(before.metadata or {}), **(metadata or {})}
    if source is not None:
        if own.get(SOURCE, source) != source:
            raise InputError(f"metadata have the source {own[SOURCE]!r}, and the document is {source!r}")
        own[SOURCE] = source
    store.settings = changed(before, {"metadata": own} | ({} if source is None else {"source": source}))
    try:
        yield
    finally:
        store.settings = before
