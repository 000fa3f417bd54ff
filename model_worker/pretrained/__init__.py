"""Pretrained models that have a name here: where they come from, how they are fetched once, and where they are kept."""
