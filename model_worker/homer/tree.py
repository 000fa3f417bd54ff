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

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.attention import Backend
from model_worker.attachment.model_parts import decoder_of
from model_worker.attachment.view import ForwardView
from model_worker.errors import InputError, UnsupportedModel
from model_worker.homer.schedule import Node, Plan, Shape, plan

_CHANGING = ("dynamic", "longrope")  # frequencies that depend on the longest position of a call


@dataclass
class Tokens:
    """What travels through the tree: context tokens, then `suffix` suffix tokens.

    hidden `[n, hidden]`; positions `[n]` in RoPE; origins `[n]`, index in the whole input. keys (before RoPE) and
    values of the finished layers that are wanted, `[Hkv, n, D]` each. significance `[n]`: the last one measured, where
    a later node may need it.
    """

    hidden: Tensor
    positions: Tensor
    origins: Tensor
    suffix: int
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    significance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, slots=True)
class Prefix:
    """Tokens that stand before every leaf, at positions 0 to P-1; keys before RoPE, `[Hkv, P, D]` by layer."""

    hidden: Tensor
    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]

    def __len__(self) -> int:
        return self.hidden.shape[0]


@dataclass(frozen=True, slots=True)
class Step:
    """One node as it was run, for whoever watches: what entered, significance `[n]` (None when nothing was dropped),
    and what left."""

    node: Node
    entered: tuple[Tensor, Tensor]  # positions, origins
    significance: Tensor | None
    left: Tokens


@dataclass(frozen=True, slots=True)
class Result:
    """The root of a tree. last: position of its last token, so that the next one stands at `last + 1`."""

    prefix: Prefix
    tokens: Tokens
    plan: Plan
    last: int


class Trees:
    """Builds trees over one attached model. Raises UnsupportedModel when layer by layer is not what the model does."""

    def __init__(self, attachment: Attachment):
        self._attachment = ref(attachment)  # not the other way round: an attachment may go while its trees are known
        self.decoder: Any = decoder_of(attachment.model)
        self._check_rope()
        _self_test(self)

    @property
    def attachment(self) -> Attachment:
        """The model's memory."""
        found = self._attachment()
        assert found is not None, "the attachment is gone"
        return found

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
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
        """Compress `context` between its affixes.

        bias: `[layers, distances]`, what is subtracted from the significance; the last column serves all distances
        beyond. wanted: layers whose K-V the caller needs (all). watch: called after every node. pool: tokens, an odd
        number, over which the significance of context is the maximum; 1 is the paper's.
        """
        if pool < 1 or pool % 2 == 0 or (pool > 1 and shape.mode == "paper"):
            raise InputError(f"pool={pool} is an odd number, and 1 in mode paper")
        found = plan(shape, self.layers, len(prefix), len(context), len(suffix))
        last = len(prefix) + found.stride + len(suffix) - 1
        self._check_length(last + 1, found.root)
        before = self.prefix(prefix)
        run = _Run(self, before, context, suffix, found, bias, wanted, watch, pool)
        return Result(before, run.node(found.root), found, last)

    @torch.no_grad()
    def prefix(self, ids: list[int]) -> Prefix:
        """The prefix on its own; it depends on nothing that follows."""
        hidden = self.embed(ids)
        none = {r.layer: hidden.new_empty(r.kv_heads, 0, r.head_dim) for r in self.attachment.reports}
        empty = Prefix(hidden[:0], none, none)
        if not ids:
            return empty
        view = _NodeView(self.attachment, self._range(0, len(ids)), empty)
        return Prefix(self.run(hidden, view, range(self.layers)), view.keys, view.values)

    def embed(self, ids: list[int]) -> Tensor:
        """`[n, hidden]` that enter the first layer."""
        table = self.attachment.model.get_input_embeddings()  # type: ignore[operator]
        return table(torch.tensor(ids, dtype=torch.long, device=self.device))  # type: ignore[no-any-return]

    def run(self, hidden: Tensor, view: "_NodeView", layers: range) -> Tensor:
        """Take `hidden` `[n, hidden]` through decoder layers."""
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
        """Next-token logits `[n, vocabulary]` of what left the last layer."""
        head = self.attachment.model.get_output_embeddings()  # type: ignore[operator]
        return head(self.decoder.norm(hidden))  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.attachment.model.parameters()).device

    def _range(self, begin: int, end: int) -> Tensor:
        return torch.arange(begin, end, device=self.device)

    def _no_rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of angle 0, in the model's own layout."""
        rope = next((r for r in self.attachment.ropes.values() if r.rotates), None)
        if rope is None:
            raise UnsupportedModel("HOMER needs rotary positions; this model has none")
        cos, sin = rope.cos_sin(positions[None])
        return torch.ones_like(cos, dtype=dtype), torch.zeros_like(sin, dtype=dtype)

    def _check_rope(self) -> None:
        parameters = getattr(self.attachment.model.config, "rope_parameters", None) or {}  # type: ignore[union-attr]
        kind = parameters.get("rope_type", "default")
        if kind in _CHANGING:
            raise UnsupportedModel(
                f"rope type {kind!r} changes its frequencies with the length of the input, so that merged keys would "
                "disagree; use linear, yarn, or a larger base"
            )

    def _check_length(self, positions: int, root: Node) -> None:
        trained = self.attachment.trained_length
        if trained is not None and positions > trained:
            raise InputError(f"a leaf takes {positions} positions, the model was trained for {trained}; shorten leaves")
        windows = [r.sliding_window for r in self.attachment.reports if r.sliding_window]
        longest = _longest(root)
        if windows and longest > min(windows):
            raise InputError(f"a node of {longest} tokens exceeds the model's sliding window of {min(windows)}")


def _longest(node: Node) -> int:
    return max([node.length, *map(_longest, node.children or ())])


_TREES: WeakKeyDictionary[Attachment, Trees] = WeakKeyDictionary()


def trees_of(attachment: Attachment) -> Trees:
    """The one of this attachment: the self-test runs once per attached model."""
    if attachment not in _TREES:
        _TREES[attachment] = Trees(attachment)
    return _TREES[attachment]


class _Run:
    """One input on its way through the tree."""

    def __init__(
        self,
        trees: Trees,
        before: Prefix,
        context: list[int],
        suffix: list[int],
        plan: Plan,
        bias: Tensor | None,
        wanted: Collection[int] | None,
        watch: Callable[[Step], None] | None,
        pool: int,
    ):
        self.trees, self.before, self.context, self.suffix = trees, before, context, suffix
        self.plan, self.bias, self.watch, self.pool = plan, bias, watch, pool
        self.wanted = range(trees.layers) if wanted is None else wanted

    def node(self, node: Node) -> Tokens:
        """Everything below, merged, run through this node's layers, and reduced."""
        if node.children is None:
            tokens = self._leaf(node)
        else:  # who watches may look at the halves later
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
        view = _NodeView(self.trees.attachment, tokens.positions, self.before, self.wanted, node.end - 1, score)
        tokens.hidden = self.trees.run(tokens.hidden, view, range(node.begin, node.end))
        tokens.keys |= view.keys
        tokens.values |= view.values
        tokens.significance = self._significance(view, tokens, node.end - 1) if score else None

    def _leaf(self, node: Node) -> Tokens:
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

    def _significance(self, view: "_NodeView", tokens: Tokens, layer: int) -> Tensor:
        """`[n]`, infinite for the suffix; the largest scaled logit over heads, less the bias of layer and distance."""
        assert view.significance is not None
        found = view.significance
        if self.bias is not None:
            distance = (tokens.positions[-1] - tokens.positions).clamp(max=self.bias.shape[1] - 1)
            found = found - self.bias[layer].to(found.device)[distance]
        found = found[: len(tokens) - tokens.suffix]
        if self.pool > 1:
            found = nn.functional.max_pool1d(found[None, None], self.pool, 1, self.pool // 2)[0, 0]
        return nn.functional.pad(found, (0, tokens.suffix), value=torch.inf)


def survivors(significance: Tensor, count: int) -> Tensor:
    """Indices of the `count` most significant tokens, ascending; among equals the earlier one is dropped."""
    order = torch.sort(significance, stable=True).indices
    return order[len(significance) - count :].sort().values


def pick(tokens: Tokens, keep: Tensor) -> Tokens:
    """The tokens at `keep`, in every finished layer: the paper's propagative refinement. Takes `tokens` apart, so that
    no more than one layer is held twice."""
    return Tokens(
        tokens.hidden[keep],
        tokens.positions[keep],
        tokens.origins[keep],
        tokens.suffix,
        {layer: tokens.keys.pop(layer)[:, keep] for layer in list(tokens.keys)},
        {layer: tokens.values.pop(layer)[:, keep] for layer in list(tokens.values)},
        None if tokens.significance is None else tokens.significance[keep],
    )


def merge(left: Tokens, right: Tokens, *, consume: bool = False) -> Tokens:
    """Both contexts, one behind the other at the positions they have, and the mean of the two suffixes.

    consume: take both halves apart, so that no more than one layer is held twice.
    """

    def join(a: Tensor, b: Tensor, dim: int = 0) -> Tensor:
        (a, a_tail), (b, b_tail) = (x.split([x.shape[dim] - left.suffix, left.suffix], dim) for x in (a, b))
        return torch.cat([a, b, (a_tail + b_tail) / 2], dim)

    def follow(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a[: len(a) - left.suffix], b])

    def layers(a: dict[int, Tensor], b: dict[int, Tensor]) -> dict[int, Tensor]:
        take = dict.pop if consume else dict.__getitem__
        return {layer: join(take(a, layer), take(b, layer), 1) for layer in list(a)}

    a, b = left.significance, right.significance
    return Tokens(
        join(left.hidden, right.hidden),
        follow(left.positions, right.positions),
        follow(left.origins, right.origins),
        left.suffix,
        layers(left.keys, right.keys),
        layers(left.values, right.values),
        None if a is None or b is None else follow(a, b),
    )


class _NodeView(ForwardView):
    """One node's pass through some layers: rotates, puts the prefix in front, keeps raw K-V, scores in the last one."""

    def __init__(
        self,
        attachment: Attachment,
        positions: Tensor,
        before: Prefix,
        wanted: Collection[int] | None = None,
        last: int = -1,
        score: bool = False,
    ):
        super().__init__()
        self.attachment, self.positions, self.before = attachment, positions, before
        self.wanted, self.last, self.score = wanted, last, score
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.significance: Tensor | None = None

    def attend(
        self,
        backend: Backend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """query and key come unrotated: the layer was called with angles of 0."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if self.wanted is None or layer in self.wanted:
            self.keys[layer], self.values[layer] = key[0], value[0]
        rope = self.attachment.ropes[layer]
        query, key = (rope.rotate(x, self.positions[None]) for x in (query, key))
        if self.score and layer == self.last:
            self.significance = logits(query[:, :, -1:], key, self.attachment.reports[layer].scaling)[0, :, 0].amax(0)
        first = len(self.before)
        if first:
            front = torch.arange(first, device=key.device)[None]
            key = torch.cat([rope.rotate(self.before.keys[layer][None], front), key], dim=2)
            value = torch.cat([self.before.values[layer][None], value], dim=2)
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril(first)[None, None]
        return backend(module, query, key, value, self.attachment.as_mask(seen, query), **kwargs)


def logits(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Attention logits `[B, Hq, Q, L]` before softmax, float32, of rotated tensors."""
    rows, heads, queries, dim = query.shape
    grouped = query.float().reshape(rows, key.shape[1], -1, dim)
    return (grouped @ key.float().transpose(2, 3)).view(rows, heads, queries, -1) * scaling


def _self_test(trees: Trees) -> None:
    """A tree of one leaf is a plain forward; where it is not, the model does something between layers that we miss."""
    attachment, name = trees.attachment, type(trees.attachment.model).__name__
    ids = [i % int(attachment.model.config.vocab_size) for i in range(1, 13)]  # type: ignore[union-attr,arg-type]
    training = attachment.model.training
    attachment.model.eval()
    try:
        with torch.no_grad():
            plain = attachment.model(torch.tensor([ids], device=trees.device), return_dict=True).logits[0, 3:].float()
            root = trees.build(Shape(12, 12, 0), ids[:3], ids[3:9], ids[9:])
            own = trees.logits(root.tokens.hidden).float()
    except Exception as error:
        raise UnsupportedModel(f"{name} cannot be run layer by layer: {type(error).__name__}: {error}") from error
    finally:
        attachment.model.train(training)
    bound = 1e-3 if next(attachment.model.parameters()).dtype == torch.float32 else 8e-2
    off = float((own - plain).abs().max() / plain.abs().max().clamp(min=1e-6))
    if not off <= bound:
        raise UnsupportedModel(f"{name} run layer by layer differs from itself by {off:.1e} of its largest logit")
