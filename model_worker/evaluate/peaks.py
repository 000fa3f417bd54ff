"""Peak tensor memory of a long prompt is measured here by its length: HOMER's tree against a plain prefill.

What is counted is every allocation of torch's CPU allocator while a prompt is processed, as torch's profiler records
them (`profile_memory=True`), temporaries inside kernels included; weights are there before and do not count. The peak
is the largest running sum. Only shapes matter for it, so that weights may be random.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.errors import InputError
from model_worker.homer.bias import NONE
from model_worker.homer.prompt import compress_prompt
from model_worker.homer.tree import trees_of

_PREFIX, _SUFFIX = 4, 16


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes above the weights at the peak of a prompt of `length` tokens. plain: None where it was not run."""

    length: int
    homer: int
    plain: int | None


@dataclass(frozen=True, slots=True)
class Fit:
    """The line `a + b x` by least squares. residual: root mean square that is left, in bytes."""

    a: float
    b: float
    residual: float


@dataclass(frozen=True, slots=True)
class PeaksReport:
    """Peaks by length, and lines through them.

    fits: by who ("HOMER", and "plain" where three lengths or more were run) and by x ("log2(n)" and "n").
    """

    peaks: list[Peak]
    fits: dict[str, dict[str, Fit]]

    def document(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return asdict(self)


def random_model(layers: int = 16) -> LlamaForCausalLM:
    """Make a Llama of random weights: layers 128 wide, multi-head attention, so that K-V weigh as in Llama-2."""
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
) -> PeaksReport:
    """Measure the peak at each length (tokens in all), HOMER with nodes of `size` tokens.

    plain_up_to: the longest prompt that the plain prefill is run on. progress: called with (lengths done, lengths in
    all). Raises InputError for lengths or nodes without room beside the affixes, and for a model that is on no CPU.
    """
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
            homer = peak_bytes(partial(_tree, attachment, ids, size))
            plain = peak_bytes(partial(_prefill, model, ids)) if length <= plain_up_to else None
            peaks.append(Peak(length, homer, plain))
            if progress is not None:
                progress(done, len(lengths))
    finally:
        attachment.detach()
    return PeaksReport(peaks, _fits(peaks))


def _fits(peaks: Sequence[Peak]) -> dict[str, dict[str, Fit]]:
    """Return the lines through log2(n) and through n, of HOMER and of the plain prefill, of three points or more."""
    plain = [(peak.length, peak.plain) for peak in peaks if peak.plain is not None]
    found = {}
    for who, points in (("HOMER", [(peak.length, peak.homer) for peak in peaks]), ("plain", plain)):
        if len(points) >= 3:
            n, y = zip(*points, strict=True)
            found[who] = {"log2(n)": fit([math.log2(x) for x in n], y), "n": fit(n, y)}
    return found


def _tree(attachment: Attachment, ids: list[int], size: int) -> DynamicCache:
    parts = ids[:_PREFIX], ids[_PREFIX:-_SUFFIX], ids[-_SUFFIX:]
    return compress_prompt(attachment, *parts, size=size, bias=NONE).cache()


def _prefill(model: nn.Module, ids: list[int]) -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most bytes that torch's CPU allocator held at once for `work` and what it returns."""
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
    """Return the line through the points that leaves the least squares."""
    design = torch.tensor([[1.0, value] for value in x], dtype=torch.float64)
    target = torch.tensor(y, dtype=torch.float64)[:, None]
    solution = torch.linalg.lstsq(design, target).solution
    rest = (design @ solution - target).square().mean().sqrt()
    return Fit(float(solution[0]), float(solution[1]), float(rest))
