"""A prompt many times the context, compressed by one tree and then continued.

`compress_prompt` keeps the whole input as one tree, depth first, so that at most one finished left half per height
waits; peak memory grows with the logarithm of the length. (`remember/forest.py` writes such an input into a memory.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_worker.arguments import whole
from model_worker.attachment.attachment import Attachment
from model_worker.attachment.hf_caches import DynamicCache
from model_worker.errors import InputError
from model_worker.homer.bias import Bias, load_bias
from model_worker.homer.schedule import Shape, default_warmup
from model_worker.homer.tree import Result, Trees, trees_of
from model_worker.window.generation import generated, generation_options


class CompressedPrompt:
    """A prompt that was compressed, ready to be continued. Its cache, positions and logits belong together.

    positions, origins: `[n]`, RoPE position and index in the input of each token that stayed, prefix included.
    next_logits: `[vocabulary]`, of the first new token, which stands at `last_position + 1`.
    """

    def __init__(self, attachment: Attachment, trees: Trees, result: Result, again: Sequence[int] = ()):
        """Take the root of a tree. again: the suffix's ids, to run it once more over the root (see `PromptOptions`)."""
        self.attachment, self.last_position = attachment, result.last
        front = torch.arange(len(result.prefix), device=trees.device)
        self.positions = torch.cat([front, result.tokens.positions])
        self.origins = torch.cat([front, result.tokens.origins])
        self._result = result
        self._asked: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            self.next_logits: Tensor = self._ask(again) if again else trees.logits(result.tokens.hidden[-1:])[0]

    def __len__(self) -> int:
        return len(self.positions)

    def cache(self) -> DynamicCache:
        """Make a fresh cache with keys at their positions; feed it tokens from position `last_position + 1` on."""
        cache = DynamicCache()  # without a config: it would build sliding layers
        before, tokens = self._result.prefix, self._result.tokens
        for layer in range(len(self.attachment.reports)):
            keys = torch.cat([before.keys[layer], tokens.keys[layer]], dim=1)[None]
            values = torch.cat([before.values[layer], tokens.values[layer]], dim=1)[None]
            cache.update(self.attachment.ropes[layer].rotate(keys, self.positions[None]), values, layer)
        for held, (keys, values) in zip(cache.layers, self._asked, strict=False):
            kept = len(self) - keys.shape[2]
            held.keys = torch.cat([held.keys[:, :, :kept], keys], dim=2)
            held.values = torch.cat([held.values[:, :, :kept], values], dim=2)
        return cache

    def _ask(self, suffix: Sequence[int]) -> Tensor:
        """Run the suffix over prefix and context alone, note its K-V, and return its next-token logits `[vocabulary]`.

        The K-V stand in the cache instead of their mean over leaves.
        """
        cache, device = self.cache(), self.positions.device
        for held in cache.layers:
            held.keys, held.values = (x[:, :, : len(self) - len(suffix)] for x in (held.keys, held.values))
        logits = self.attachment.model(
            input_ids=torch.tensor([list(suffix)], device=device),
            attention_mask=torch.ones(1, len(self), dtype=torch.long, device=device),
            position_ids=self.positions[None, -len(suffix) :],
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        ).logits
        self._asked = [tuple(x[:, :, -len(suffix) :] for x in (held.keys, held.values)) for held in cache.layers]
        last: Tensor = logits[0, -1]
        return last

    def generate(self, max_new_tokens: int, **options: Any) -> list[int]:
        """Generate new token ids, by Hugging Face `generate` with its options, from the right position on.

        The first token is the most likely one unless `do_sample` is set, in which case it is drawn at temperature 1;
        a token that ends a text ends this one too. Raises InputError for no new tokens, and by name for options that
        cannot be kept, such as beam search.
        """
        max_new_tokens = whole("max_new_tokens", max_new_tokens)
        model = self.attachment.model
        wanted = generation_options(model, self.attachment.tokenizer, options)
        first = self.next_logits.float()
        token = torch.multinomial(torch.softmax(first, -1), 1) if options.get("do_sample") else first.argmax()[None]
        if max_new_tokens == 1 or int(token) in self._stops(options):
            return token.tolist()
        device = self.next_logits.device
        out = generated(
            model,
            {**wanted, "max_new_tokens": max_new_tokens - 1},
            input_ids=token[None],
            attention_mask=torch.ones(1, len(self) + 1, dtype=torch.long, device=device),
            position_ids=torch.tensor([[self.last_position + 1]], device=device),
            past_key_values=self.cache(),
        )
        return out[0].tolist()

    def _stops(self, options: Mapping[str, Any]) -> set[int]:
        """Return the ids that end a text in `generate` with these options."""
        model: Any = self.attachment.model
        given, own = options.get("generation_config"), model.generation_config
        config = own if given is None or given.eos_token_id is None else given
        said = options.get("eos_token_id", config.eos_token_id)
        return set() if said is None else {said} if isinstance(said, int) else set(said)


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """The options of `compress_prompt`.

    size: tokens of a node, by default half of the trained length, as in the paper; the other half is for new tokens.
    target: tokens of the result (size). warmup: layers before the first merge (3/8 of them, the paper's 12 of 32).
    mode: `balanced` or `paper` (see schedule.py). bias: a table, or its name for `load_bias`. leaf: tokens of a leaf
    (size).

    Three deviations that shallow models need are off by default and refused in mode `paper` (docs/compression.md has
    figures). merges: how many heights run layers, so that the leaves run more. pool: over how many neighbours
    significance is the maximum. again: run the suffix once more over the result, since in a tree its states are the
    mean over leaves of which most say nothing.
    """

    size: int | None = None
    target: int | None = None
    warmup: int | None = None
    mode: str = "balanced"
    bias: str | Bias = "auto"
    leaf: int | None = None
    merges: int | None = None
    pool: int = 1
    again: bool = False

    def shape(self, attachment: Attachment) -> Shape:
        """Return the parameters of the tree over this model."""
        size = self.size or (attachment.trained_length or 4096) // 2
        warmup = default_warmup(len(attachment.reports)) if self.warmup is None else self.warmup
        return Shape(size, self.target or size, warmup, self.leaf, self.mode, self.merges)


def compress_prompt(
    attachment: Attachment, prefix: list[int], context: list[int], suffix: list[int], **options: Any
) -> CompressedPrompt:
    """Compress `context` of any length between a prefix (instruction) and a suffix (question), which stay whole.

    options: the fields of `PromptOptions`. Raises InputError when the lengths do not fit, UnsupportedModel when the
    model cannot be run layer by layer.
    """
    chosen = PromptOptions(**options)
    trees = trees_of(attachment)
    if chosen.again and chosen.mode == "paper":
        raise InputError("mode paper does not ask again")
    table = load_bias(attachment, chosen.bias) if isinstance(chosen.bias, str) else chosen.bias
    shape = chosen.shape(attachment)
    result = trees.build(shape, prefix, context, suffix, bias=table.table, pool=chosen.pool)
    return CompressedPrompt(attachment, trees, result, suffix if chosen.again else ())
