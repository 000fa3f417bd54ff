"""The forgetting of turns, sessions, chunks and tenants for good: what goes, in which order, and that a start finishes
what a stop has interrupted."""
