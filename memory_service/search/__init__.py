"""Search by inner product: exact, or by lists for big banks; derived from the records."""

from memory_service.search.index import Best, Selection
from memory_service.search.indexes import SearchIndexes

__all__ = ["Best", "SearchIndexes", "Selection"]
