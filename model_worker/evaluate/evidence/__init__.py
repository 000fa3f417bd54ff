"""Is what answers a question found: recall at k of the passage or turn that holds the answer, by embedder."""
