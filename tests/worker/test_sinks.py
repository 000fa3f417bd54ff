"""Attention sinks are the first tokens of a stream, which stay when the window moves on."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

import kvbank
from model_worker.errors import InputError
from model_worker.model import MemoryModel
from model_worker.window.cache import MemoryCache
from model_worker.window.tova import TovaRule
from tests.worker.tiny import BACKENDS, SLIDING, ListMemory, attached, bank, build, tokenizer, tokens, worst

Models = Callable[[str], PreTrainedModel]


@pytest.mark.parametrize("sinks", [0, 1, 4, 9])
def test_nothing_changes_before_anything_has_left(model: Models, sinks: int) -> None:
    net, ids = model("qwen3"), tokens(24, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad(), attached(net) as attachment:
        caches = [MemoryCache(attachment, ListMemory(4), window=24, sinks=n) for n in (sinks, 0)]
        for begin, end in ((0, 7), (7, 8), (8, 24)):
            one, other = (
                net(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits for cache in caches
            )
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("llama_gqa", {}, 4),
        ("llama_gqa", {"sinks": 7}, 7),
        ("mistral_sliding", {}, 0),  # its own window
        ("mistral_sliding", {"window": SLIDING}, 0),
        ("mistral_sliding", {"window": SLIDING - 4}, 4),
        ("mistral_sliding", {"sinks": 3}, 3),
    ],
)
def test_how_many_there_are(model: Models, family: str, options: dict[str, int], expected: int) -> None:
    with attached(model(family)) as attachment:
        assert MemoryCache(attachment, **options).sinks.wanted == expected


@pytest.mark.parametrize("family", ["llama_gqa", "qwen3"])
def test_both_backends_leave_out_recalled_sinks_under_a_local_rule(model: Models, family: str) -> None:
    """Compare tokens that are fed one by one, and attend to a recalled chunk without the sinks in it."""
    net, ids, logits = model(family), tokens(32), []
    for backend in BACKENDS:
        with torch.no_grad(), attached(net, backend) as attachment:
            cache = MemoryCache(attachment, ListMemory(4), window=8, local=TovaRule(6), sinks=2)
            parts = [ids[:, :4], *ids[:, 4:].split(1, 1)]
            logits.append(torch.cat([net(part, past_key_values=cache).logits for part in parts], 1))
    assert worst(*logits) <= 1e-5


def test_a_model_may_say_how_many(client: kvbank.Client) -> None:
    options = {"memory": client, "bank": bank(), "chunk": 8, "window": 64, "top_k": 2}
    net = build("llama_gqa")
    for made_for, asked, expected in ((None, None, 4), (0, None, 0), (6, None, 6), (6, 2, 2)):
        net.config.kvbank = {} if made_for is None else {"sinks": made_for}
        with MemoryModel(net, tokenizer(), sinks=asked, **options) as chat:
            assert chat.sinks == chat.cache().sinks.wanted == expected
        with MemoryModel(net, tokenizer(), sinks=asked, local="tova:m=3", **options) as chat:
            assert chat.sinks == chat.cache().sinks.wanted == min(expected, 2)


def test_what_makes_no_sense(client: kvbank.Client) -> None:
    options = {"memory": client, "bank": bank(), "chunk": 8, "top_k": 2}
    for sinks in (-1, 1.5, "4", True):
        with pytest.raises(InputError, match="sinks"):
            MemoryModel(build("llama_gqa"), tokenizer(), sinks=sinks, **options)
    with pytest.raises(InputError, match=r"229 sinks \+ window 12 \+ 16 positions of memory exceed the 256"):
        MemoryModel(build("llama_gqa"), tokenizer(), sinks=229, window=12, **options)
    MemoryModel(build("llama_gqa"), tokenizer(), sinks=228, window=12, **options).close()
    net = build("llama_gqa")
    net.config.kvbank = {"sinks": "four"}
    with pytest.raises(InputError, match="kvbank entry"):
        MemoryModel(net, tokenizer(), **options)
