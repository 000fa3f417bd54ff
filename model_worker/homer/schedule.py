"""The schedule of a tree: which tokens and layers each node runs, and how many tokens it may keep. Integers only.

`paper` follows the authors' code to the token (HOMER, arXiv 2404.10308, sections 3.1 and 3.3; alinlab/HOMER at
822ef84),
including its rule for a short right half. What their code computes wrongly or crashes on is refused here: an empty
context, affixes that fill a chunk, more halvings than layers (their result silently exceeds the target), a target
below the affixes (they silently drop affix tokens).

`balanced` differs in three things: leaves differ by at most one token; each half of a merge gets what it has, up to
half of the capacity, and what one half leaves the other may use, so that a merge is always full; and where there are
more heights than layers for them, the lowest heights run none: their nodes merge, and drop by the significance that
the tokens got in the leaves (the authors' code would exceed its target there). So the number of leaves has no bound.
"""

from dataclasses import dataclass

from model_worker.errors import InputError

MODES = ("paper", "balanced")


def default_warmup(layers: int) -> int:
    """Return how many of a model's layers run before the first merge: the paper's share, 12 of 32."""
    return 3 * layers // 8


@dataclass(frozen=True, slots=True)
class Shape:
    """The parameters of a tree. All lengths count tokens, affixes included.

    chunk: no merged node has more (C). target: tokens of the result (T). warmup: layers that run before any merge, at
    the leaves (W). leaf: length of a leaf, which may exceed `chunk` (I); None for `chunk`. merges: heights that run
    layers of their own, the uppermost (`balanced` only); None for as many as there are layers for.
    """

    chunk: int
    target: int
    warmup: int
    leaf: int | None = None
    mode: str = "balanced"
    merges: int | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a tree.

    first, last: leaves below it. begin, end: decoder layers that run here. length: tokens that enter. target: tokens
    that may leave. context: a leaf's part of the context, `(begin, end)`.
    """

    first: int
    last: int
    begin: int
    end: int
    length: int
    target: int
    children: tuple["Node", "Node"] | None = None
    context: tuple[int, int] = (0, 0)

    @property
    def kept(self) -> int:
        """Return the number of tokens that leave."""
        return min(self.length, self.target)


@dataclass(frozen=True, slots=True)
class Plan:
    """A tree as it is planned.

    stride: positions that the context of a leaf takes; the suffix stands behind them in every leaf. without: how many
    of the lowest heights have nodes that run no layer.
    """

    root: Node
    stride: int
    without: int = 0


def plan(shape: Shape, layers: int, prefix: int, context: int, suffix: int) -> Plan:
    """Plan the tree for a model of `layers` layers and an input of these lengths. Raises InputError with the reason."""
    affixes = prefix + suffix
    capacity = shape.chunk - affixes
    first = (shape.leaf or shape.chunk) - affixes
    _check(shape, layers, suffix, context, capacity, first, affixes)
    height = (-(-context // first) - 1).bit_length()
    if shape.mode == "paper":
        _check_halvings(layers - shape.warmup, height, shape)
        without = 0
    else:
        height = min(height, context.bit_length() - 1)
        without = max(0, height - min(layers - shape.warmup - 1, shape.merges or layers))
    leaves = 1 << height
    stride = -(-context // leaves)
    if shape.mode == "paper":
        if stride * (leaves - 1) > context:
            raise InputError(f"{context} context tokens do not fill {leaves} leaves of {stride}; use longer leaves")
        bounds = [*range(0, stride * leaves, stride), context]
    else:
        bounds = [context * i // leaves for i in range(leaves + 1)]
    per = (layers - shape.warmup) // (height - without + 1)
    tree = _Tree(shape, prefix, suffix, bounds, layers - per * (height - without), per, without)
    return Plan(tree.node(0, leaves - 1, min(shape.target, affixes + context)), stride, without)


def _check(shape: Shape, layers: int, suffix: int, context: int, capacity: int, first: int, affixes: int) -> None:
    """Raise InputError for a tree that cannot be built, with the reason."""
    if shape.mode not in MODES:
        raise InputError(f"mode {shape.mode!r} is not one of {MODES}")
    if suffix < 1:
        raise InputError("the suffix has at least one token: the last one is the query of every significance score")
    if context < 1:
        raise InputError("there is no context to compress")
    if capacity < 1 or first < 1:
        short = "chunk" if capacity < 1 else "leaf"
        raise InputError(f"a {short} of {getattr(shape, short)} tokens has no room beside {affixes} affix tokens")
    if not 0 <= shape.warmup < layers:
        raise InputError(f"warmup {shape.warmup} does not leave a layer of the model's {layers}")
    if shape.merges is not None and (shape.merges < 1 or shape.mode == "paper"):
        raise InputError(f"merges={shape.merges} is at least 1, and for balanced trees only")
    if shape.target < affixes:
        raise InputError(f"a target of {shape.target} tokens cannot hold the {affixes} affix tokens")


def _check_halvings(layers: int, height: int, shape: Shape) -> None:
    """Raise InputError where a tree in mode `paper` has more heights than there are layers for them."""
    if layers < height + 1:
        raise InputError(
            f"{1 << height} leaves need a layer for each of {height + 1} heights, but {layers} follow the "
            f"{shape.warmup} warm-up layers; use longer leaves or a shorter warm-up"
        )


@dataclass(frozen=True, slots=True)
class _Tree:
    """The tree that is being planned. bounds: where in the context each leaf begins, and where the last one ends.

    leaf_end: the first layer that does not run at the leaves. per: layers of each height above.
    """

    shape: Shape
    prefix: int
    suffix: int
    bounds: list[int]
    leaf_end: int
    per: int
    without: int

    def node(self, first: int, last: int, target: int) -> Node:
        """Plan the node above the leaves `first` to `last`, of which `target` tokens may leave."""
        if first == last:
            begin, end = self.bounds[first], self.bounds[first + 1]
            return Node(first, last, 0, self.leaf_end, self._affixes + end - begin, target, None, (begin, end))
        middle = (first + last + 1) // 2
        to_left, to_right = self._targets(first, middle, last)
        left, right = self.node(first, middle - 1, to_left), self.node(middle, last, to_right)
        height = (last - first).bit_length()
        begin = self.leaf_end + self.per * max(0, height - self.without - 1)
        end = begin if height <= self.without else begin + self.per
        length = left.kept + right.kept - self._affixes
        return Node(first, last, begin, end, length, target, (left, right))

    @property
    def _affixes(self) -> int:
        return self.prefix + self.suffix

    def _targets(self, first: int, middle: int, last: int) -> tuple[int, int]:
        """Return the numbers of tokens that the two halves may bring to their merge."""
        capacity = self.shape.chunk - self._affixes
        half = capacity // 2
        if self.shape.mode == "balanced":
            left, right = self._available(first, middle - 1), self._available(middle, last)
            to_left = min(left, max(capacity - half, capacity - right))
            return self._affixes + to_left, self._affixes + min(right, capacity - to_left)
        right = self.bounds[middle + 1] - self.bounds[middle]  # the first leaf of the right half, whatever the height
        return (
            (self._affixes + half,) * 2 if right >= half else (self.shape.chunk - right, self._affixes + right)
        )  # the authors' rule for a short right half

    def _available(self, first: int, last: int) -> int:
        """Return how many context tokens the leaves `first` to `last` can bring at most."""
        tokens = self.bounds[last + 1] - self.bounds[first]
        return tokens if first == last else min(tokens, self.shape.chunk - self._affixes)
