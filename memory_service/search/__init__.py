"""Search by inner product, exact or by lists for big banks. It is derived from a store (`memory_service.storage.base`),
whose commits it follows, and is the one package that knows FAISS."""

from memory_service.search.candidates import Selection
from memory_service.search.indexes import IndexOptions, SearchIndexes
from memory_service.search.matches import Matches
from memory_service.search.snapshots import largest_id
from memory_service.search.unindexed import AtOnce, Unindexed

__all__ = ["AtOnce", "IndexOptions", "Matches", "SearchIndexes", "Selection", "Unindexed", "largest_id"]
