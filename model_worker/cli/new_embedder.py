"""The embedder of what is new and of which nothing is asked: a session, or a bank of documents."""

from model_worker.embed.hybrid import WEIGHT
from model_worker.pretrained.cache import kept_folder

# The encoder that new sessions are searched by, where it is in the cache.
_ENCODER = "minilm"


def new_embedder() -> str:
    """Return how something new is searched: by words and meaning where an encoder is in the cache, else by words.

    The weight is written out, so that a later release with another one still opens what was begun.
    """
    return "lexical:idf" if kept_folder(_ENCODER) is None else f"hybrid:lexical:idf+{_ENCODER},w={WEIGHT:g}"
