"""The training of a model to use its memory, as MemLong trains (arXiv 2408.16967): `kvbank train memlong`."""
