"""Whether a memory is exact on a model: the judgement that every family of the installed transformers has to pass."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model_worker.attachment.attachment import Attachment
from model_worker.errors import UnsupportedModel
from model_worker.window.cache import MemoryCache
from model_worker.window.joint import forward, may_join, row_of
from tests.worker.tiny import BACKENDS, ListMemory, attached, tokens, worst

CHUNK, LENGTH, NEW = 4, 24, 12
# In float32, of the largest logit where that is above 1.
REMEMBERED, BY_TOKEN = 5e-6, 1e-5


@dataclass(frozen=True)
class Verdict:
    """What became of one model: the backends on which a memory is exact, or the reason why attach refuses it."""

    backends: tuple[str, ...] = ()
    reason: str = ""

    @property
    def kind(self) -> str:
        """Return the reason without the names of classes and layers, so that families with the same reason stand
        together."""
        text = re.sub(r"^\w*[A-Z]\w+(: layer \d+ is [\w-]+: |: layer \d+ |: | )", "", self.reason)
        text = re.sub(r"^\(\w+\) keeps a \w+: ", "", text)
        text = re.sub(r" runs \d+ times", " runs more than once", text)
        return re.sub(r": (the (logits|attention of) |\w+Error: |\[|unsqueeze).*", "", text, flags=re.DOTALL)


def judge(net: PreTrainedModel) -> Verdict:
    """Exact on all backends that the model has, or refused. Raises AssertionError for what is taken and wrong."""
    backends, reason = [], ""
    for backend in BACKENDS:
        try:
            net.set_attn_implementation(backend)
        except ValueError:  # not one of this model's
            continue
        try:
            with attached(net, backend, positions="original") as attachment, torch.no_grad():
                _check_exact(net, attachment)
        except UnsupportedModel as error:
            reason = str(error)
        else:
            backends.append(backend)
    assert not (backends and reason), f"exact with {backends}, refused otherwise: {reason}"
    assert backends or reason, "no backend was tried"
    return Verdict(tuple(backends), reason)


def _check_exact(net: PreTrainedModel, attachment: Attachment) -> None:
    ids = tokens(LENGTH)
    plain = net(ids).logits
    size = max(1.0, float(plain.abs().max()))
    empty = net(ids, past_key_values=MemoryCache(attachment, ListMemory(CHUNK))).logits
    assert torch.equal(empty, plain), "an empty memory changes the logits"

    seen = min([LENGTH, *(r.sliding_window for r in attachment.reports if r.sliding_window)])
    chunked = _fed(net, ids[:, :seen], CHUNK, MemoryCache(attachment, ListMemory(CHUNK), window=CHUNK))
    far = worst(chunked, net(ids[:, :seen]).logits)
    assert far <= REMEMBERED * size, f"remembered chunks differ from one forward by {far:.1e}"
    far = worst(_fed(net, ids, 1, MemoryCache(attachment)), plain)
    assert far <= BY_TOKEN * size, f"token by token differs from one forward by {far:.1e}"

    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    text = net.generate(ids, **options)
    assert torch.equal(net.generate(ids, past_key_values=MemoryCache(attachment), **options), text), "generate differs"

    joined = _joint_steps(net, ids, attachment)
    assert not joined or max(joined) <= BY_TOKEN * size, f"joint steps differ from single ones by {max(joined):.1e}"


def _joint_steps(net: PreTrainedModel, ids: Tensor, attachment: Attachment) -> list[float]:
    """Return how far joint steps of two conversations are from their single ones; nothing where none may be made."""
    seen = min((r.sliding_window for r in attachment.reports if r.sliding_window), default=None)
    caches = [[MemoryCache(attachment, window=seen, sinks=0) for _ in range(2)] for _ in range(2)]
    for length, pair in zip((3, 7), caches, strict=True):
        for cache in pair:
            net(ids[:, :length], past_key_values=cache)
    far = []
    for at in range(3):
        rows = [{"input_ids": ids[:, at : at + 1], "past_key_values": cache} for cache, _ in caches]
        if not all(may_join(net, row) for row in rows):
            return []
        for made, row, (_, alone) in zip(forward(net, [row_of(row) for row in rows]), rows, caches, strict=True):
            far.append(worst(made.logits, net(row["input_ids"], past_key_values=alone).logits))
    return far


def _fed(net: PreTrainedModel, ids: Tensor, size: int, cache: MemoryCache) -> Tensor:
    return torch.cat([net(part, past_key_values=cache).logits for part in ids.split(size, dim=1)], dim=1)
