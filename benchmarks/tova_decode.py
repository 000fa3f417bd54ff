"""The row `tova_decode` of the benchmarks: decoding under TOVA with an eighth of the cache, beside the full cache. In
the same memory TOVA decodes eight times as many rows."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from benchmarks.bench import Bench
from benchmarks.pair import Contender, Result, Target, compare, timed
from model_worker.attaching import attach
from model_worker.window.cache import MemoryCache
from model_worker.window.tova import TovaRule

ROW = "tova_decode"
_STEPS = 8
_SHARE = 8


def run(bench: Bench) -> Iterator[Result]:
    """Time greedy steps of a Llama of 26 M random parameters (8 layers, 512 wide, 8 heads) behind 4,096 tokens,
    float32.

    The full cache of one row has 128 MiB beside 105 MiB of weights, about the proportion of the paper's setting, and
    TOVA's cache of eight rows has 128 MiB too. The K-V of the full cache are random, since only sizes matter here. The
    full cache is measured with room for new tokens, and as transformers' DynamicCache, which copies all of its K-V to
    append one token.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    length, rows = (1024 if bench.quick else 4096), 1
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            max_position_embeddings=2 * length,
        )
    ).eval()
    attachment = attach(model, mode="per_layer")
    prompts = torch.randint(3, 1024, (_SHARE * rows, length // _SHARE))
    bench.say(ROW)
    tova = MemoryCache(attachment, local=TovaRule(length // _SHARE))
    rounds = bench.n(12)
    spare = _STEPS * (rounds + 1)
    roomy, copied = Cache(layers=[_RoomyLayer(spare) for _ in range(8)]), DynamicCache()
    with torch.no_grad():
        model(input_ids=prompts, past_key_values=tova, use_cache=True, logits_to_keep=1)
    for layer in range(8):
        keys, values = torch.randn(2, rows, 8, length, 64)
        for cache in (roomy, copied):
            cache.update(keys, values, layer)
    held = [sum(x.nbytes for layer in own.layers for x in (layer.keys, layer.values)) for own in (tova, roomy, copied)]
    assert len(set(held)) == 1, "the caches are not of one size"
    decoded = _STEPS * rows
    contenders = [
        Contender("ours", "ours", _each_row(_decoder(model, tova, prompts[:, -1:]), _SHARE)),
        Contender(
            f"the full cache of {length:,} tokens, {rows} row",
            "peer",
            timed(_decoder(model, roomy, prompts[:rows, -1:])),
            (Target("ratio", 4.8, at_least=True),),
        ),
        Contender("the same as DynamicCache", "peer", timed(_decoder(model, copied, prompts[:rows, -1:]))),
    ]
    title = (
        f"decode of {_SHARE * rows} rows under TOVA at 1/{_SHARE} of the cache, {held[0] >> 20} MiB of K-V either way"
    )
    yield from compare(ROW, title, contenders, rounds, records=decoded, unit="tokens/s")
    attachment.detach()


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of the full cache with room for `spare` new tokens, which it writes behind the first ones; DynamicLayer
    copies all that it holds for each new token."""

    def __init__(self, spare: int) -> None:
        super().__init__()
        self._spare = spare
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        if self._room is None:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], end + self._spare, key_states.shape[3])
            self._room = key_states.new_empty(shape), value_states.new_empty(shape)
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values


def _decoder(model: LlamaForCausalLM, cache: Cache, token: Tensor) -> Callable[[], None]:
    """Return a function that decodes some more steps each time it is called, from `token` [rows, 1] on. A full cache
    grows by these steps in each round."""
    state = [token]

    def decode() -> None:
        with torch.no_grad():
            for _ in range(_STEPS):
                logits = model(input_ids=state[0], past_key_values=cache, use_cache=True).logits
                state[0] = logits[:, -1:].argmax(-1)

    return decode


def _each_row(call: Callable[[], None], times: int) -> Callable[[], float]:
    """Return a function that makes the call and returns its seconds divided by `times`, so that contenders with
    different numbers of rows count the same number of tokens."""
    run = timed(call)
    return lambda: run() / times
