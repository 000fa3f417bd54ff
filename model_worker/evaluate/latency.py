"""The time to answer from memory slots that are at hand is measured here, against reading the whole chunk again.

Three contenders answer the same prompt about the same chunk with the same greedy loop: the frozen model over chunk and
prompt; over the chunk's slots, as embeddings, and prompt; over the prompt with the K-V of the slots (interface `kv`). A
round runs each once, another one first in each round; figures are medians over rounds, after a round to warm up. Time
depends on shapes alone, so model and adapter may be random.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model_worker.errors import InputError
from model_worker.icae.config import IcaeConfig
from model_worker.icae.decode import generate
from model_worker.icae.layout import Row, answer_row, continue_row
from model_worker.icae.model import Icae

TARGET = 3.0  # times as fast to the first token, for chunks of 512 tokens and more
# Layers, width, inner width, heads, K-V heads, vocabulary; heads of 64.
SHAPES = {
    "tiny": (2, 64, 128, 4, 2, 256),
    "0.5b": (24, 896, 4864, 14, 2, 151_936),  # as Qwen2.5-0.5B
    "1b": (16, 2048, 8192, 32, 8, 128_256),  # as Llama-3.2-1B
}


@dataclass(frozen=True, slots=True)
class Latency:
    """The times of one contender at one chunk length, medians in seconds.

    read: positions that were read. first: time to the first token of the answer. whole: time to the last of its
    `answer` tokens. ratio, whole_ratio: the time over the full chunk divided by this one. load: the one-minute load
    average.
    """

    tokens: int
    contender: str
    read: int
    first: float
    ratio: float
    whole: float
    whole_ratio: float
    answer: int
    rounds: int
    load: float


def random_model(shape: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Make a Llama of a named shape, with random weights and no EOS, so that answers are as long as asked for.

    Raises InputError for a shape that is not in SHAPES.
    """
    if shape not in SHAPES:
        raise InputError(f"there is no shape {shape!r}; there are {', '.join(SHAPES)}")
    layers, width, inner, heads, kv_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=1 << 15,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        dtype=dtype,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def measure_latency(
    model: Any,
    chunks: Sequence[int],
    *,
    slots: int = 128,
    rate: int = 4,
    prompt: int = 16,
    answer: int = 32,
    rounds: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> list[Latency]:
    """Measure every contender at every chunk length, in tokens.

    slots, rate: of the random adapter. prompt, answer: tokens asked and answered. progress: called with (rounds done,
    in all). Raises InputError for lengths below 1, and for an answer of fewer than 2 tokens.
    """
    if min(*chunks, prompt, rounds, 1) < 1 or answer < 2:
        raise InputError("lengths and rounds are at least 1, and an answer has 2 tokens or more")
    # LoRA takes no part in reading, so its size does not matter.
    soft = Icae.create(model, IcaeConfig(slots, rate), rank=1)
    pairs = Icae.create(model, replace(soft.config, interface="kv"), rank=1)
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.vocab_size)
    rows: list[Latency] = []
    for index, length in enumerate(chunks):
        ids = torch.randint(vocabulary, (length + prompt,), generator=generator).tolist()
        contenders = _contenders(soft, pairs, ids[:length], ids[length:])
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for turn in range(rounds + 1):
            for name, both in _round(contenders, turn, answer):
                if turn:  # the first one warms up
                    times[name].append(both)
            if progress is not None:
                progress(index * (rounds + 1) + turn + 1, len(chunks) * (rounds + 1))
        medians = {name: [median(column) for column in zip(*own, strict=True)] for name, own in times.items()}
        load = os.getloadavg()[0]
        first_full, whole_full = medians["full"]
        for name, (first, whole) in medians.items():
            ratios = first_full / first, whole_full / whole
            read = len(contenders[name][1])
            rows.append(Latency(length, name, read, first, ratios[0], whole, ratios[1], answer, rounds, load))
        del contenders
        gc.collect()
    return rows


def _contenders(soft: Icae, pairs: Icae, chunk: list[int], asked: list[int]) -> dict[str, tuple[Icae, Row]]:
    """Return what each contender reads before it answers, and the adapter that it reads with."""
    [own], [own_pairs] = soft.encode([chunk]), pairs.encode([chunk])
    return {
        "full": (soft, continue_row(soft, None, [*chunk, *asked])),
        "slots": (soft, answer_row(soft, own, asked, ends=False)),
        "slots' K-V": (pairs, answer_row(pairs, own_pairs, asked, ends=False)),
    }


def _round(
    contenders: dict[str, tuple[Icae, Row]], turn: int, answer: int
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield the seconds of every contender to its first token and to its last; another one begins in each turn."""
    names = list(contenders)
    for step in range(len(names)):
        name = names[(turn + step) % len(names)]
        icae, row = contenders[name]
        yield name, (_timed(icae, row, 1), _timed(icae, row, answer))


def _timed(icae: Icae, row: Row, tokens: int) -> float:
    if icae.device.type == "cuda":
        torch.cuda.synchronize(icae.device)
    began = time.perf_counter()
    generate(icae, [row], tokens)
    return time.perf_counter() - began
