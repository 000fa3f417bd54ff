"""A model that is compiled, before or after attach, has the same memory: hooks and cache are left out of its graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import kvbank
from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.remember.memory import Memory
from model_worker.window.cache import MemoryCache
from tests.worker.tiny import bank, build, tokenizer, tokens, worst

pytestmark = pytest.mark.slow  # a minute of tracing


def compile_forward(net: PreTrainedModel) -> None:
    net.forward = torch.compile(net.forward, backend="eager")


def compile_decoder(net: PreTrainedModel) -> None:
    net.model.forward = torch.compile(net.model.forward, backend="eager")


def compile_layers(net: PreTrainedModel) -> None:
    for layer in net.model.layers:
        layer.compile(backend="eager")


def remembering(attachment: Attachment, client: kvbank.Client, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a text that is fed in chunks, each of which is remembered by a real service and recalled."""
    memory = Memory(attachment, client, bank(), tokenizer(), chunk=4, top_k=8, strict=True)
    memory.open()
    cache = MemoryCache(attachment, memory, window=4)
    net: Any = attachment.model
    logits = torch.cat([net(part, past_key_values=cache).logits for part in ids.split(4, 1)], 1)
    assert memory.stats.written == ids.shape[1] // 4 - 1
    return logits


@pytest.mark.parametrize("late", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("compile_it", [compile_forward, compile_decoder, compile_layers])
def test_compiled_is_the_same(client: kvbank.Client, compile_it: Callable[[PreTrainedModel], None], late: bool) -> None:
    ids, net = tokens(16), build("llama_gqa")
    with torch.no_grad():
        plain = net(ids).logits
        if not late:
            compile_it(net)
        attachment = attach(net, tokenizer(), positions="original")
        if late:
            compile_it(net)
        assert worst(remembering(attachment, client, ids), plain) <= 5e-6
        attachment.detach()
