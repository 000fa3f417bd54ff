"""Tiny models and texts for runs of MemLong's training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from model_worker.train.memlong.run import MemlongReport, train_memlong
from model_worker.train.memlong.settings import MemlongTraining
from tests.worker.tiny import VOCABULARY, build, tokenizer

SMALL: dict[str, Any] = {
    **{"chunk": 4, "window": 12, "memory": 8, "recent": 1, "top_k": 1, "streams": 2, "blocks": 4, "embed": "lexical"},
    **{"log_every": 1, "warm_up": 0, "device": "cpu", "schedule": "constant"},
}


def texts(folder: Path, count: int = 3, tokens: int = 61) -> tuple[Path, ...]:
    """Write texts of random words, of which many come again."""
    paths = []
    for seed in range(count):
        words = np.random.default_rng(seed).integers(3, VOCABULARY, tokens)
        words[tokens // 2 :] = words[: tokens - tokens // 2]
        paths.append(folder / f"text-{seed}.txt")
        paths[-1].write_text(" ".join(f"w{word}" for word in words))
    return tuple(paths)


def loader(seed: int = 0) -> Callable[[str, str], tuple[Any, Any]]:
    """Return what loads the same tiny model for any name."""
    return lambda name, device: (build("llama_gqa", seed), tokenizer())


def train(out: Path, paths: tuple[Path, ...], *, resume: bool = False, **more: Any) -> MemlongReport:
    settings = MemlongTraining(**{**SMALL, "text": paths, **more})
    return train_memlong(settings, out, loader(), resume=resume, bars=lambda *at: None)


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return found
