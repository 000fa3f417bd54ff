"""The forgetting of turns, sessions, chunks and tenants for good, as every engine over a database does it: what goes,
in which order, and that what a stop has interrupted is finished. An engine brings the statements, and what it does with
chunks."""
