"""Runs a tree of HOMER over a transformers decoder, depth first (arXiv 2404.10308, sections 3.1 to 3.3).

Nothing of a model is copied: its decoder layers are called one by one with a rotation that does nothing, so that the
attention function sees keys before RoPE; it rotates them to the node's positions, and keeps them unrotated for the
merge. Averaging unrotated suffix keys equals averaging rotated ones, since their positions are the same.

Deviations from the authors' code, none of which changes a number beyond rounding: grouped query heads; the prefix runs
once and is attended to as a past, since it never depends on what follows; scores are float32 and ties drop the earlier
token; tokens leave after the layer's MLP instead of before it, which is the same for those that stay.

Extensions, off unless asked for: `pool` gives each token the largest significance among its neighbours, so that the
words behind a match stay with it (as SnapKV pools, arXiv 2404.14469); heights without layers, see schedule.py.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.model_parts import config_of, device_of, embeddings_of, evaluating, head_of
from model_worker.errors import InputError, UnsupportedModel
from model_worker.homer.node_view import NodeView
from model_worker.homer.schedule import Node, Plan, Shape, plan
from model_worker.homer.tokens import Prefix, Tokens, merge, pick, survivors

_CHANGING = ("dynamic", "longrope")  # frequencies that depend on the longest position of a call


@dataclass(frozen=True, slots=True)
class Step:
    """One node as it was run, for a caller that watches.

    entered: positions and origins of the tokens. significance: `[n]`, None when nothing was dropped. left: the tokens
    that go on.
    """

    node: Node
    entered: tuple[Tensor, Tensor]
    significance: Tensor | None
    left: Tokens


@dataclass(frozen=True, slots=True)
class Result:
    """The root of a tree that was run. last: position of its last token, so that the next one stands at `last + 1`."""

    prefix: Prefix
    tokens: Tokens
    plan: Plan
    last: int


class Trees:
    """The trees of one attached model.

    Making this object raises UnsupportedModel where running the layers one by one is not what the model does.
    """

    def __init__(self, attachment: Attachment):
        self._attachment = ref(attachment)  # weak: `_TREES` keeps these trees for as long as the attachment lives
        self.decoder = attachment.decoder
        self._check_rope()
        _self_test(self)

    @property
    def attachment(self) -> Attachment:
        """Return the attachment of the model, which must not be gone."""
        found = self._attachment()
        assert found is not None, "the attachment is gone"
        return found

    @property
    def layers(self) -> int:
        """Return the number of decoder layers of the model."""
        return len(self.attachment.reports)

    @torch.no_grad()
    def build(
        self,
        shape: Shape,
        prefix: list[int],
        context: list[int],
        suffix: list[int],
        *,
        bias: Tensor | None = None,
        wanted: Collection[int] | None = None,
        watch: Callable[[Step], None] | None = None,
        pool: int = 1,
    ) -> Result:
        """Compress `context` between its affixes, and return the root of the tree.

        bias: `[layers, distances]`, what is subtracted from the significance; the last column serves all distances
        beyond. wanted: layers whose K-V the caller needs (all). watch: called after every node. pool: tokens, an odd
        number, over which the significance of context is the maximum; 1 is the paper's. Raises InputError for lengths
        that do not fit.
        """
        if pool < 1 or pool % 2 == 0 or (pool > 1 and shape.mode == "paper"):
            raise InputError(f"pool={pool} is an odd number, and 1 in mode paper")
        found = plan(shape, self.layers, len(prefix), len(context), len(suffix))
        last = len(prefix) + found.stride + len(suffix) - 1
        self._check_length(last + 1, found.root)
        before = self.prefix(prefix)
        chosen = range(self.layers) if wanted is None else wanted
        run = _Run(self, before, context, suffix, found, bias, chosen, watch, pool)
        return Result(before, run.node(found.root), found, last)

    @torch.no_grad()
    def prefix(self, ids: list[int]) -> Prefix:
        """Run the prefix on its own, since it depends on nothing that follows."""
        hidden = self.embed(ids)
        none = {r.layer: hidden.new_empty(r.kv_heads, 0, r.head_dim) for r in self.attachment.reports}
        empty = Prefix(hidden[:0], none, none)
        if not ids:
            return empty
        view = NodeView(self.attachment, self._range(0, len(ids)), empty)
        return Prefix(self.run(hidden, view, range(self.layers)), view.keys, view.values)

    def embed(self, ids: list[int]) -> Tensor:
        """Return what enters the first layer for these token ids, `[n, hidden]`."""
        rows: Tensor = embeddings_of(self.attachment.model)(torch.tensor(ids, dtype=torch.long, device=self.device))
        return rows

    def run(self, hidden: Tensor, view: "NodeView", layers: range) -> Tensor:
        """Take `hidden` `[n, hidden]` through decoder layers, whose attention is `view`'s."""
        hidden, still = hidden[None], self._no_rotation(view.positions, hidden.dtype)
        for index in layers:
            out = self.decoder.layers[index](
                hidden,
                attention_mask=None,
                position_ids=view.positions[None],
                position_embeddings=still,
                past_key_values=None,
                use_cache=False,
                kvbank=view,
            )
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the next-token logits, `[n, vocabulary]`, of what left the last layer."""
        found: Tensor = head_of(self.attachment.model)(self.decoder.norm(hidden))
        return found

    @property
    def device(self) -> torch.device:
        """Return the device that the model is on."""
        return device_of(self.attachment.model)

    def _range(self, begin: int, end: int) -> Tensor:
        return torch.arange(begin, end, device=self.device)

    def _no_rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of angle 0, in the model's own layout."""
        rope = next((r for r in self.attachment.ropes.values() if r.rotates), None)
        if rope is None:
            raise UnsupportedModel("HOMER needs rotary positions; this model has none")
        cos, sin = rope.cos_sin(positions[None])
        return torch.ones_like(cos, dtype=dtype), torch.zeros_like(sin, dtype=dtype)

    def _check_rope(self) -> None:
        """Raise UnsupportedModel for a rotation that follows the length of the input."""
        parameters = getattr(config_of(self.attachment.model), "rope_parameters", None) or {}
        kind = parameters.get("rope_type", "default")
        if kind in _CHANGING:
            raise UnsupportedModel(
                f"rope type {kind!r} changes its frequencies with the length of the input, so that merged keys would "
                "disagree; use linear, yarn, or a larger base"
            )

    def _check_length(self, positions: int, root: Node) -> None:
        """Raise InputError for leaves beyond the trained length, and for nodes beyond a sliding window."""
        trained = self.attachment.trained_length
        if trained is not None and positions > trained:
            raise InputError(f"a leaf takes {positions} positions, the model was trained for {trained}; shorten leaves")
        windows = [r.sliding_window for r in self.attachment.reports if r.sliding_window]
        longest = _longest(root)
        if windows and longest > min(windows):
            raise InputError(f"a node of {longest} tokens exceeds the model's sliding window of {min(windows)}")


def _longest(node: Node) -> int:
    """Return the largest number of tokens that enter a node of the tree below `node`."""
    return max([node.length, *map(_longest, node.children or ())])


_TREES: WeakKeyDictionary[Attachment, Trees] = WeakKeyDictionary()


def trees_of(attachment: Attachment) -> Trees:
    """Return the trees of this attachment, made at the first call: the self-test runs once per attached model."""
    if attachment not in _TREES:
        _TREES[attachment] = Trees(attachment)
    return _TREES[attachment]


@dataclass(frozen=True, slots=True)
class _Run:
    """One input on its way through the tree; see `Trees.build` for its parts."""

    trees: Trees
    before: Prefix
    context: list[int]
    suffix: list[int]
    plan: Plan
    bias: Tensor | None
    wanted: Collection[int]
    watch: Callable[[Step], None] | None
    pool: int

    def node(self, node: Node) -> Tokens:
        """Run the tree below `node`, then its own layers over what that left, and return the tokens that go on."""
        if node.children is None:
            tokens = self._leaf(node)
        else:  # a caller that watches may look at the halves later
            tokens = merge(*map(self.node, node.children), consume=self.watch is None)
        entered = (tokens.positions, tokens.origins)
        drops = node.length > node.target
        if node.begin < node.end:
            self._layers(node, tokens, drops or (node.children is None and self.plan.without > 0))
        significance = tokens.significance
        if drops:
            assert significance is not None
            tokens = pick(tokens, survivors(significance, len(tokens) - (node.length - node.target)))
        if self.watch is not None:
            self.watch(Step(node, entered, significance if drops else None, tokens))
        return tokens

    def _layers(self, node: Node, tokens: Tokens, score: bool) -> None:
        """Run the node's layers; note the significance in the last one, if it is asked for."""
        view = NodeView(self.trees.attachment, tokens.positions, self.before, self.wanted, node.end - 1, score)
        tokens.hidden = self.trees.run(tokens.hidden, view, range(node.begin, node.end))
        tokens.keys |= view.keys
        tokens.values |= view.values
        tokens.significance = self._significance(view, tokens, node.end - 1) if score else None

    def _leaf(self, node: Node) -> Tokens:
        """Return the tokens of a leaf as they enter the first layer."""
        begin, end = node.context
        first, total = len(self.before), len(self.context)
        ids = self.context[begin:end] + self.suffix
        arange = self.trees._range
        tail = first + self.plan.stride
        positions = torch.cat([arange(first, first + end - begin), arange(tail, tail + len(self.suffix))])
        origins = torch.cat(
            [arange(first + begin, first + end), arange(first + total, first + total + len(self.suffix))]
        )
        return Tokens(self.trees.embed(ids), positions, origins, len(self.suffix))

    def _significance(self, view: "NodeView", tokens: Tokens, layer: int) -> Tensor:
        """Return the largest logit over heads, less the bias of layer and distance: `[n]`, infinite for the suffix."""
        assert view.significance is not None
        found = view.significance
        if self.bias is not None:
            distance = (tokens.positions[-1] - tokens.positions).clamp(max=self.bias.shape[1] - 1)
            found = found - self.bias[layer].to(found.device)[distance]
        found = found[: len(tokens) - tokens.suffix]
        if self.pool > 1:
            found = nn.functional.max_pool1d(found[None, None], self.pool, 1, self.pool // 2)[0, 0]
        return nn.functional.pad(found, (0, tokens.suffix), value=torch.inf)


def _self_test(trees: Trees) -> None:
    """Raise UnsupportedModel unless a tree of one leaf gives the logits of a plain forward.

    Where it does not, the model does something between its layers that running them one by one leaves out.
    """
    attachment, name = trees.attachment, type(trees.attachment.model).__name__
    ids = [i % int(config_of(attachment.model).vocab_size) for i in range(1, 13)]
    try:
        with evaluating(attachment.model), torch.no_grad():
            plain = attachment.model(torch.tensor([ids], device=trees.device), return_dict=True).logits[0, 3:].float()
            root = trees.build(Shape(12, 12, 0), ids[:3], ids[3:9], ids[9:])
            own = trees.logits(root.tokens.hidden).float()
    except Exception as error:
        raise UnsupportedModel(f"{name} cannot be run layer by layer: {type(error).__name__}: {error}") from error
    bound = 1e-3 if next(attachment.model.parameters()).dtype == torch.float32 else 8e-2
    off = float((own - plain).abs().max() / plain.abs().max().clamp(min=1e-6))
    if not off <= bound:
        raise UnsupportedModel(f"{name} run layer by layer differs from itself by {off:.1e} of its largest logit")
