"""What engines share about chunks: the values and checksums of their rows, keys, counts, and what evictions say."""
