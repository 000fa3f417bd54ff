"""Room in banks of the local engine: what is counted, which chunks go, and how they go."""
