"""Peak tensor memory of a long prompt: HOMER's tree against a plain prefill, by length.

What is counted is every allocation of torch's CPU allocator while a prompt is processed, as torch's profiler records
them (`profile_memory=True`), temporaries inside kernels included; weights are there before and do not count. The peak
is the largest running sum. Only shapes matter for it, so that weights may be random.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from model_worker.attaching import attach
from model_worker.errors import InputError
from model_worker.homer.bias import NONE
from model_worker.homer.prompt import compress_prompt
from model_worker.homer.tree import trees_of

_PREFIX, _SUFFIX = 4, 16


@dataclass(frozen=True, slots=True)
class Peak:
    """One length in tokens; bytes above the weights at the peak. plain: None where it was not run."""

    length: int
    homer: int
    plain: int | None


@dataclass(frozen=True, slots=True)
class Fit:
    """`a + b x` by least squares. residual: root mean square that is left, in bytes."""

    a: float
    b: float
    residual: float


def random_model(layers: int = 16) -> LlamaForCausalLM:
    """A Llama of random weights: layers 128 wide, multi-head attention, so that K-V weigh as in Llama-2."""
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "vocab_size": 512}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=4096)
        return LlamaForCausalLM(config).eval()


def measure_peaks(
    model: nn.Module,
    lengths: Sequence[int],
    *,
    size: int,
    plain_up_to: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Peak]:
    """Peaks at each length (tokens in all), HOMER with nodes of `size` tokens. Raises InputError for too few tokens."""
    if min(lengths) <= _PREFIX + _SUFFIX or size <= _PREFIX + _SUFFIX:
        raise InputError(f"lengths and size are above {_PREFIX + _SUFFIX} tokens, those of the affixes")
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise InputError("peaks are measured on a CPU")
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]
    attachment = attach(model, mode="per_layer")
    peaks = []
    try:
        trees_of(attachment)  # its self-test is no part of a prompt
        for done, length in enumerate(lengths, start=1):
            ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
            parts = ids[:_PREFIX], ids[_PREFIX:-_SUFFIX], ids[-_SUFFIX:]
            homer = peak_bytes(lambda parts=parts: compress_prompt(attachment, *parts, size=size, bias=NONE).cache())  # type: ignore[misc]
            plain = peak_bytes(lambda ids=ids: _prefill(model, ids)) if length <= plain_up_to else None  # type: ignore[misc]
            peaks.append(Peak(length, homer, plain))
            if progress is not None:
                progress(done, len(lengths))
    finally:
        attachment.detach()
    return peaks


def _prefill(model: nn.Module, ids: list[int]) -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator held at once for `work` and what it returns."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = work()
    del kept  # it lived to the end of the recording
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return int(peak)


def fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """The best line through the points."""
    design = torch.tensor([[1.0, value] for value in x], dtype=torch.float64)
    target = torch.tensor(y, dtype=torch.float64)[:, None]
    solution = torch.linalg.lstsq(design, target).solution
    rest = (design @ solution - target).square().mean().sqrt()
    return Fit(float(solution[0]), float(solution[1]), float(rest))
