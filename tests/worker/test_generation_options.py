"""What a checkpoint or a caller asks of `generate`: kept, stated otherwise, or refused by name; never another text."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, TextStreamer

import kvbank
from model_worker.attaching import attach
from model_worker.errors import InputError
from model_worker.homer.prompt import compress_prompt
from model_worker.model import MemoryModel
from tests.support.diagonal import rotated
from tests.worker.tiny import bank, build, tokenizer, tokens

PROMPT = tokens(20, seed=3)[0].tolist()
GREEDY = {"do_sample": False, "max_new_tokens": 20}


@pytest.fixture(scope="module")
def model(client: kvbank.Client) -> Iterator[MemoryModel]:
    net = build("llama_gqa")
    with MemoryModel(net, tokenizer(), memory=client, bank=bank(), chunk=8, window=24, top_k=2) as model:
        yield model


@contextmanager
def defaults_of(model: MemoryModel, **defaults: Any) -> Iterator[None]:
    """Set defaults as if the checkpoint had them in its generation_config.json."""
    config = model.model.generation_config
    model.model.generation_config = GenerationConfig.from_dict({**config.to_dict(), **defaults})
    try:
        yield
    finally:
        model.model.generation_config = config


def answer(model: MemoryModel, asked: dict[str, Any], **defaults: Any) -> tuple[str, int]:
    """Return the text over an empty bank, and how many chunks were remembered on the way."""
    memory = model.with_bank(bank())
    with defaults_of(model, **defaults):
        text = model.generate(PROMPT, cache=model.cache(memory), **asked)
    return str(text), memory.stats.written


@pytest.fixture(scope="module")
def plain(model: MemoryModel) -> tuple[str, int]:
    found = answer(model, GREEDY)
    assert found[1] == 2
    return found


@pytest.mark.parametrize(
    "defaults",
    rotated(
        [
            {"use_cache": False},
            {"cache_implementation": "static"},
            {"cache_implementation": "quantized", "cache_config": {"backend": "quanto"}},
            {"cache_implementation": "paged"},
            {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
            {"output_attentions": True, "output_hidden_states": True},
            {"prompt_lookup_num_tokens": 3},
            {"prefill_chunk_size": 3},
            {"max_length": 21},
            {"pad_token_id": 5},
        ],
        0,
        every=2,
    ),
)
def test_how_a_text_is_computed_is_ours(model: MemoryModel, plain: tuple[str, int], defaults: dict[str, Any]) -> None:
    assert answer(model, GREEDY, **defaults) == plain


@pytest.mark.parametrize(
    ("defaults", "name"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"num_return_sequences": 3, "do_sample": True}, "num_return_sequences=3"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
        ({"dola_layers": "low"}, "dola_layers='low'"),
    ],
)
def test_a_checkpoint_that_wants_another_text_is_refused_by_name(
    model: MemoryModel, plain: tuple[str, int], defaults: dict[str, Any], name: str
) -> None:
    with pytest.raises(InputError, match=f"{name}, from the model's generation_config.*pass "):
        answer(model, {"max_new_tokens": 3}, **defaults)
    own = {key: {"num_beams": 1, "num_return_sequences": 1}.get(key) for key in defaults if key != "do_sample"}
    assert answer(model, {**own, "top_k": 50, **GREEDY}, **defaults) == plain


@pytest.mark.parametrize(
    "defaults",
    [
        {"repetition_penalty": 5.0},
        pytest.param({"no_repeat_ngram_size": 1}, marks=pytest.mark.slow),
        pytest.param({"suppress_tokens": list(range(3, 60))}, marks=pytest.mark.slow),
        {"min_new_tokens": 4, "eos_token_id": list(range(1, 97)), "max_new_tokens": 30},
        {"max_new_tokens": 5},
        {"eos_token_id": list(range(1, 97))},
        pytest.param({"guidance_scale": 2.0}, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_s_other_defaults_are_kept(
    model: MemoryModel, plain: tuple[str, int], defaults: dict[str, Any]
) -> None:
    """Defaults give the text of the caller who asks for the same."""
    asked = {key: value for key, value in GREEDY.items() if key not in defaults}
    found = answer(model, asked, **defaults)
    assert found == answer(model, {**asked, **defaults})
    assert found[0] != plain[0]


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"num_beams": 2}, "num_beams=2.*beam search"),
        ({"num_return_sequences": 3, "do_sample": True}, "num_return_sequences=3"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True"),
        ({"output_scores": True}, "output_scores=True"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
        ({"assistant_model": object()}, "assistant_model"),
        ({"custom_generate": "some/where"}, "custom_generate"),
        ({"past_key_values": None}, "past_key_values.*cache="),
        ({"input_ids": [[1]]}, "input_ids"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "num_beams=2"),
        ({"generation_config": {"use_cache": False}}, "use_cache=False"),
        ({"generation_config": 3}, "generation_config"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": "5"}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"max_length": 20}, "max_length=20 leaves no room behind a prompt of 20 tokens"),
        ({"max_new_token": 5}, "no option max_new_token"),
        ({"temperature": -1.0, "do_sample": True, "max_new_tokens": 2}, "temperature"),
        ({"cache": [1]}, "cache is a MemoryCache"),
    ],
)
def test_what_a_caller_cannot_have_is_refused_by_name(model: MemoryModel, asked: dict[str, Any], reason: str) -> None:
    """Refusals leave nothing in the bank, unless they show only when a token is to be drawn."""
    before = model.memory.stats.written
    with pytest.raises(InputError, match=reason):
        model.generate(PROMPT, **asked)
    assert model.memory.stats.written == before or "temperature" in asked


@pytest.mark.parametrize(
    "asked",
    [
        {"streamer": 3},
        {"logits_processor": 3},
        {"logits_processor": [3]},
        {"stopping_criteria": "x"},
        {"stopping_criteria": 3},
        {"prefix_allowed_tokens_fn": 3},
        {"eos_token_id": "x"},
        {"eos_token_id": [1, [2]]},
        {"temperature": 0, "do_sample": True},
        {"repetition_penalty": 0.0},
        {"bad_words_ids": [[10**6]]},
        {"forced_eos_token_id": 10**6},
        {"sequence_bias": {(3,): "x"}},
        {"exponential_decay_length_penalty": 3},
        {"max_time": "x"},
        {"stop_strings": [3]},
        {"num_beams": np.array([1, 1])},
    ],
    ids=str,
)
def test_what_generate_refuses_is_refused_before_anything_is_remembered(
    model: MemoryModel, asked: dict[str, Any]
) -> None:
    memory = model.with_bank(bank())
    with pytest.raises(InputError):
        model.generate(PROMPT, cache=model.cache(memory), max_new_tokens=3, **asked)
    assert memory.stats.written == 0


def test_one_streamer_is_for_one_prompt(model: MemoryModel) -> None:
    memory = model.with_bank(bank())
    with pytest.raises(InputError, match="streamer"):
        model.generate([PROMPT, PROMPT], cache=model.cache(memory), streamer=TextStreamer(model.tokenizer))
    assert memory.stats.written == 0


def test_trying_options_draws_no_random_numbers(model: MemoryModel) -> None:
    """Texts are the same for the same seed: options that are tried first take nothing from it."""
    texts = []
    for more in ({}, {"repetition_penalty": 1.0}):
        torch.manual_seed(5)
        texts.append(answer(model, {"do_sample": True, "max_new_tokens": 8, **more})[0])
    assert texts[0] == texts[1]


def test_a_checkpoint_s_short_max_length_is_told(model: MemoryModel) -> None:
    with pytest.raises(InputError, match="max_length=10, from the model's"):
        answer(model, {}, max_length=10)


def test_a_generation_config_is_taken(model: MemoryModel, plain: tuple[str, int]) -> None:
    for config in (GenerationConfig(**GREEDY), GREEDY):
        assert answer(model, {"generation_config": config}) == plain


def test_a_compressed_prompt_keeps_to_the_same() -> None:
    net, ids = build("llama_gqa"), tokens(40)[0].tolist()
    attachment = attach(net, tokenizer())
    prompt = compress_prompt(attachment, ids[:2], ids[2:36], ids[36:], size=16, bias="none")
    plain = prompt.generate(6)
    net.generation_config.use_cache = False
    net.generation_config.cache_implementation = "static"
    net.generation_config.return_dict_in_generate = True
    assert prompt.generate(6) == plain
    with pytest.raises(InputError, match="num_beams=2"):
        prompt.generate(6, num_beams=2)
    attachment.detach()
