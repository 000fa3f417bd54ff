"""Search by inner product: exact, or by lists for big banks; derived from the records."""

from memory_service.search.index import Selection
from memory_service.search.indexes import SearchIndexes

__all__ = ["SearchIndexes", "Selection"]
