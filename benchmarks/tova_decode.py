"""Decoding under TOVA at an eighth of the cache against the full cache in the same memory: eight times the batch."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.bench import Bench
from benchmarks.pair import Contender, Result, Target, compare, timed
from model_worker.attachment import attach
from model_worker.cache import MemoryCache
from model_worker.local import TovaRule

ROW = "tova_decode"
_STEPS = 8
_SHARE = 8


def run(bench: Bench) -> Iterator[Result]:
    """Greedy steps of a Llama of 26 M random parameters (8 layers, 512 wide, 8 heads) behind 4,096 tokens, float32.

    The full cache of one row has 128 MiB beside 105 MiB of weights, about the proportion of the paper's setting; so has
    TOVA's cache of eight rows. The full cache is transformers' own, filled with random K-V: only sizes matter here.
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
    tova, full = MemoryCache(attachment, local=TovaRule(length // _SHARE)), DynamicCache()
    with torch.no_grad():
        model(input_ids=prompts, past_key_values=tova, use_cache=True, logits_to_keep=1)
    for layer in range(8):
        full.update(torch.randn(rows, 8, length, 64), torch.randn(rows, 8, length, 64), layer)
    held = [sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)) for cache in (tova, full)]
    assert held[0] == held[1], "the two caches are not of one size"
    decoded = _STEPS * rows
    contenders = [
        Contender("ours", "ours", _each_row(_decoder(model, tova, prompts[:, -1:]), _SHARE)),
        Contender(
            f"the full cache of {length:,} tokens, {rows} row",
            "peer",
            timed(_decoder(model, full, prompts[:rows, -1:])),
            (Target("ratio", 4.8, at_least=True),),
        ),
    ]
    title = (
        f"decode of {_SHARE * rows} rows under TOVA at 1/{_SHARE} of the cache, {held[0] >> 20} MiB of K-V either way"
    )
    yield from compare(ROW, title, contenders, bench.n(12), records=decoded, unit="tokens/s")
    attachment.detach()


def _decoder(model: LlamaForCausalLM, cache: Cache, token: Tensor) -> Callable[[], None]:
    """Some more steps each time it is called; the full cache so grows by a few tokens a round."""
    state = [token]

    def decode() -> None:
        with torch.no_grad():
            for _ in range(_STEPS):
                logits = model(input_ids=state[0], past_key_values=cache, use_cache=True).logits
                state[0] = logits[:, -1:].argmax(-1)

    return decode


def _each_row(call: Callable[[], None], times: int) -> Callable[[], float]:
    """Seconds of a share of the rows, so that both contenders count the same number of tokens."""
    run = timed(call)
    return lambda: run() / times
