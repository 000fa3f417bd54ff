"""Why a text was found is told here by the words that it shares with what was searched for."""

from collections import defaultdict

from kvbank.embed import Embedder


def shared_words(embedder: Embedder, query: str, text: str, most: int = 8) -> dict[str, float]:
    """Return what words and word pairs of a query add to the score of a text, the largest share first.

    A word counts with its parts of four letters, so that "ships" has a share in a text with "ship". most: how many are
    returned. An embedder that goes by meaning has no shares of words: nothing is returned.
    """
    by_feature = getattr(embedder, "shared", None)
    if by_feature is None:
        return {}
    shares: defaultdict[str, float] = defaultdict(float)
    words = query.lower().split()
    for feature, share in by_feature(query, text).items():
        kind, _, name = feature.partition(" ")
        if kind == "g":
            name = next((word for word in words if name in word), name)
        shares[name.strip(".,;:!?\"'()")] += share
    return dict(sorted(shares.items(), key=lambda each: -each[1])[:most])
