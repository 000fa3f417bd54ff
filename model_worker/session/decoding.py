"""How an answer is decoded: the session's choice and the caller's, not the checkpoint's."""

from typing import Any

from model_worker.arguments import finite, whole
from model_worker.errors import InputError
from model_worker.model import MemoryModel
from model_worker.window.generation import generation_options, plain_decoding

# What a session says itself to `generate`, since it ends and shows its answers itself.
_OWN = ("streamer", "eos_token_id", "pad_token_id")


def decoding_options(
    model: MemoryModel, max_new_tokens: object, temperature: object, given: dict[str, Any]
) -> dict[str, Any]:
    """Return the options of Hugging Face `generate` for one answer.

    max_new_tokens: at least 1. temperature: 0 takes the likeliest token. given: other options, which the caller asks
    for. Raises InputError for options that a session decides itself, or that a memory cannot keep.
    """
    limit, heat = whole("max_new_tokens", max_new_tokens), finite("temperature", temperature)
    if heat < 0:
        raise InputError(f"temperature is 0 or more, not {heat}")
    least = given.get("min_new_tokens", model.model.generation_config.min_new_tokens)
    own: dict[str, Any] = {
        "max_new_tokens": limit,
        "min_new_tokens": None if least is None else min(whole("min_new_tokens", least, least=0), limit),
        **dict.fromkeys(("max_length", "min_length")),  # they count what was said before, as far as the window goes
        **{name: value for name, value in plain_decoding().items() if name not in given},
    }
    if heat > 0:
        own |= {"do_sample": True, "temperature": heat}
    else:
        own |= {"do_sample": False, **dict.fromkeys(("temperature", "top_p", "top_k"))}
    asked = {name: value for name, value in given.items() if name != "min_new_tokens"}
    if taken := [name for name in _OWN if name in asked]:
        raise InputError(f"option {taken[0]} cannot be given here: a session ends and shows its answers itself")
    return generation_options(model.model, model.tokenizer, asked, own=own)
