"""The row `compressors` of the benchmarks: the time that each registered compressor takes, beside the plain forward of
the same chunk."""

from collections.abc import Iterator
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.bench import Bench
from benchmarks.pair import Contender, Result, Skipped, compare, timed
from model_worker.attaching import attach
from model_worker.compress import REGISTRY, compressor
from model_worker.errors import WorkerError
from model_worker.window.encoding import encode

ROW = "compressors"
FORWARD = "the chunk's plain forward"
_BUDGET = 64
_FORMS = {
    "none": ["none"],
    "tova": [
        f"tova:m={_BUDGET}",
        f"tova:m={_BUDGET},observer=window:16",
        f"tova:m={_BUDGET},block=16",
        f"tova:m={_BUDGET},block=4",
    ],
    "homer": [f"homer:m={_BUDGET},leaf=128"],
    "press": [f"press:SnapKVPress,m={_BUDGET}"],
}


def run(bench: Bench) -> Iterator[Result]:
    """Compress a chunk of 512 tokens to 64, in a Llama of 26 M random parameters with all 8 layers stored, on one
    thread.

    A method that chooses from what a forward captured is timed without that forward. A method that runs the model
    itself (`encodes`) is timed with its own forward, which replaces the plain one, in half as many rounds.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    attachment = attach(LlamaForCausalLM(LlamaConfig(vocab_size=1024, **sizes)).eval(), mode="per_layer")
    ids = torch.randint(3, 1024, (256 if bench.quick else 512,)).tolist()
    captured = encode(attachment, ids, needs_queries=True)
    bench.say(ROW)
    floor = Contender(FORWARD, "floor", timed(partial(encode, attachment, ids)))
    quick, slow = [floor], [floor]
    for name in REGISTRY:
        for form in _FORMS.get(name, [f"{name}:m={_BUDGET}"]):
            try:
                method = compressor(form)
                method.compress(captured, attachment)
            except WorkerError as error:
                bench.skipped.append(Skipped(ROW, form, str(error)))
                continue
            work = timed(partial(method.compress, captured, attachment))
            own = Contender(form + (" (its own forward)" if method.encodes else ""), "ours", work)
            (slow if method.encodes else quick).append(own)
    for contenders, rounds in ((quick, 8), (slow, 4)):
        yield from compare(ROW, f"compress {len(ids)} tokens to {_BUDGET}", contenders, bench.n(rounds))
    attachment.detach()
