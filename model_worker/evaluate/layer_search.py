"""Small sets of layers are searched for here, by taking away layer after layer from all of them.

Layers do not add up: what one layer's memory is worth depends on which others have one. So sets are compared, by a
function that scores a whole set. The module is pure.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

LayerSet = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """A set of layers, ascending, and its score, of which more is better."""

    layers: LayerSet
    score: float


def eliminate(layers: Iterable[int], score: Callable[[LayerSet], float]) -> Iterator[Scored]:
    """Yield all layers, then sets that lack one layer more each time, down to a single layer.

    Each time that layer goes whose loss is least, by lazy greedy search (Minoux 1978): what the loss of a layer was in
    a larger set is taken for the least that it is now, since fewer others stand in for the layer; so only the layers
    that look cheapest are scored again. For n layers these are about 2 n to 3 n sets in all, and not n * n / 2.
    """
    current = frozenset(layers)
    best = score(tuple(sorted(current)))
    yield Scored(tuple(sorted(current)), best)
    # Loss of each layer, the layer, and in a set of how many layers the loss was measured; first guesses come first.
    queue = [(float("-inf"), layer, 0) for layer in sorted(current)]
    found: dict[int, float] = {}
    while len(current) > 1:
        _, layer, size = heapq.heappop(queue)
        if size == len(current):
            current, best = current - {layer}, found[layer]
            yield Scored(tuple(sorted(current)), best)
            continue
        found[layer] = score(tuple(sorted(current - {layer})))
        heapq.heappush(queue, (best - found[layer], layer, len(current)))
