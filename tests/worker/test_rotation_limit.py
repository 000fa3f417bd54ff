"""Rotations that follow the length of the input: keys of one set never stand under queries of another."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import kvbank
from model_worker.errors import InputError
from model_worker.model import MemoryModel
from model_worker.window.cache import MemoryCache
from model_worker.window.encoding import encode
from tests.worker import zoo
from tests.worker.tiny import ListMemory, attached, recalled, tokenizer, tokens, worst

SWITCH = 64


def phi3(switch: int = SWITCH, longest: int = 512) -> PreTrainedModel:
    longrope = {
        **{"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "attention_factor": 1.2},
        **{"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 4.0, 6.0, 8.0]},
        "original_max_position_embeddings": switch,
    }
    sizes: dict[str, Any] = {"original_max_position_embeddings": switch, "max_position_embeddings": longest}
    return zoo.build("phi3", rope_parameters=longrope, **sizes)


def dynamic(switch: int = SWITCH) -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    return zoo.build("llama", rope_parameters=rope, max_position_embeddings=switch)


FAMILIES = [phi3, dynamic]


def feed(net: PreTrainedModel, ids: torch.Tensor, size: int, cache: MemoryCache) -> torch.Tensor:
    return torch.cat([net(part, past_key_values=cache).logits for part in ids.split(size, 1)], 1)


@pytest.mark.parametrize("make", FAMILIES)
@pytest.mark.parametrize("positions", ["original", pytest.param("continual", marks=pytest.mark.slow)])
def test_a_window_keeps_to_the_first_rotation(make: Any, positions: str) -> None:
    """Beyond the switch the window is moved back; the yardstick is a model that switches far beyond."""
    ids, logits = tokens(70), []
    for switch in (SWITCH, 4096):
        net = make(switch)
        with attached(net, positions=positions) as attachment, torch.no_grad():
            net(tokens(90))  # without a memory, it leaves its long frequencies behind
            cache = MemoryCache(attachment, ListMemory(4, recalls=False), window=16)
            cache.set_memory([recalled([encode(attachment, tokens(6, seed=9)[0].tolist())])])
            logits.append(feed(net, ids, 1, cache))
    assert worst(*logits) <= 1e-4


@pytest.mark.parametrize("make", FAMILIES)
def test_what_would_cross_is_an_error(make: Any) -> None:
    net, ids = make(), tokens(SWITCH + 1)
    with attached(net, positions="original") as attachment, torch.no_grad():
        limit = attachment.rotation_limit
        assert limit is not None
        assert attachment.trained_length == limit
        for size in (SWITCH + 1, SWITCH // 2, 1):
            with pytest.raises(InputError, match=f"position {SWITCH}|position {limit} is not below {limit}"):
                feed(net, ids, size, MemoryCache(attachment))
        cache = MemoryCache(attachment)
        cache.set_memory([recalled([encode(attachment, tokens(6, seed=9)[0].tolist(), start=2 * SWITCH)])])
        with pytest.raises(InputError, match="is not below"):
            net(ids[:, :4], past_key_values=cache)


def test_a_memory_is_not_put_aside_while_generating(client: kvbank.Client) -> None:
    """Phi-3's own code for generation drops its cache at the switch, whatever is in it."""
    net, prompt = phi3(), tokens(50)
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    with attached(net) as attachment:
        cache = MemoryCache(attachment, ListMemory(4), window=16)
        with pytest.raises(InputError, match="puts its cache aside"):
            net.generate(prompt, attention_mask=mask, past_key_values=cache, **options)
    plain = net.generate(prompt, attention_mask=mask, **options)
    assert plain.shape[1] == 90
    with MemoryModel(net, tokenizer(), memory=client, bank="longrope", chunk=8, window=24, top_k=2) as chat:
        assert chat.read(tokens(100, seed=2)[0].tolist()) == 100
        assert chat.generate(prompt[0, :20].tolist(), max_new_tokens=10, do_sample=False)
        with pytest.raises(InputError, match="puts its cache aside"):
            chat.generate(prompt[0].tolist(), **options)
    assert "prepare_inputs_for_generation" not in vars(net)


def test_a_method_that_somebody_has_put_on_the_model_is_used_and_stays() -> None:
    net, prompt, calls = phi3(), tokens(8), []
    own = net.prepare_inputs_for_generation

    def patch(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args))
        return own(*args, **kwargs)

    net.prepare_inputs_for_generation = patch
    with attached(net) as attachment:
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        net.generate(prompt, past_key_values=MemoryCache(attachment), **options)
    assert len(calls) == 4
    assert net.prepare_inputs_for_generation is patch


def test_a_switch_that_leaves_no_room_is_refused() -> None:
    from model_worker.attaching import attach
    from model_worker.errors import UnsupportedModel

    with pytest.raises(UnsupportedModel, match="leaves no room"):
        attach(phi3(switch=6))
