"""Hierarchical context merging, HOMER (arXiv 2404.10308, ICLR 2024).

A long input is cut into leaves that share positions; the leaves run through the lower layers, lose the tokens that the
last token finds least significant, and are merged in pairs on their way up. `schedule` (integers only) says what runs
where, `tree` runs it, `bias` and `calibrate` make significance comparable over distances, `prompt` reads an input many
times the context, and `model_worker.compress.homer` makes a chunk's payload.
"""
