"""The row `decode` of the benchmarks: the time of decoding with a memory, beside the same model without one."""

from collections.abc import Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.bench import Bench
from benchmarks.pair import Contender, Result, Target, compare, timed
from model_worker.attaching import attach
from model_worker.window.cache import MemoryCache
from model_worker.window.encoding import encode
from model_worker.window.recalled import RecalledChunk

ROW = "decode"
_STEPS = 64


def run(bench: Bench) -> Iterator[Result]:
    """Time 64 greedy steps of a Llama of 11 M parameters, local window 256, with 1,024 retrieved tokens in all 8
    layers."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=320, intermediate_size=864, num_hidden_layers=8, num_attention_heads=5
    )
    model = LlamaForCausalLM(config).eval()
    attachment = attach(model)
    prompt = torch.randint(3, 1024, (1, 192))
    recalled = []
    for index in range(16):
        captured = encode(attachment, torch.randint(3, 1024, (64,)).tolist())
        layers = {x: (c.keys, c.values, torch.arange(64)) for x, c in captured.layers.items()}
        recalled.append(RecalledChunk(index, 0, layers))

    def decode(with_memory: bool) -> None:
        cache = MemoryCache(attachment, window=256)
        if with_memory:
            cache.set_memory([recalled])
        with torch.no_grad():
            token = model(input_ids=prompt, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            for _ in range(_STEPS):
                token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    bench.say("decode")
    contenders = [
        Contender("ours", "ours", timed(lambda: decode(True))),
        Contender("the same window without memory", "floor", timed(lambda: decode(False)), (Target("ratio", 1.05),)),
    ]
    title = f"prompt of 192 and {_STEPS} steps, 1,024 retrieved tokens in all layers"
    yield from compare(ROW, title, contenders, bench.n(12))
