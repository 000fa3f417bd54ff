"""How an answer is decoded: the session's choice and the caller's, not the checkpoint's."""

from collections.abc import Mapping
from typing import Any

from model_worker.arguments import finite, whole
from model_worker.errors import InputError
from model_worker.model import MemoryModel
from model_worker.window.generation import COLDEST, generation_options, plain_decoding

MOST_NEW_TOKENS = 256
# What a session says itself to `generate`, since it ends and shows its answers itself.
_OWN = ("streamer", "eos_token_id", "pad_token_id")


def decoding_options(model: MemoryModel, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of Hugging Face `generate` for one answer.

    asked: options that the caller asks for: max_new_tokens, at least 1, by default 256; temperature, by default 0,
    which takes the likeliest token, as all below `COLDEST` do; and others. Raises InputError for options that a session
    decides itself, or that a memory cannot keep.
    """
    given = {"max_new_tokens": MOST_NEW_TOKENS, "temperature": 0.0, **asked}
    limit = whole("max_new_tokens", given.pop("max_new_tokens"))
    heat = finite("temperature", given.pop("temperature"))
    if heat < 0:
        raise InputError(f"temperature is 0 or more, not {heat}")
    least = given.get("min_new_tokens", model.model.generation_config.min_new_tokens)
    own: dict[str, Any] = {
        "max_new_tokens": limit,
        "min_new_tokens": None if least is None else min(whole("min_new_tokens", least, least=0), limit),
        **dict.fromkeys(("max_length", "min_length")),  # they count what was said before, as far as the window goes
        **{name: value for name, value in plain_decoding().items() if name not in given},
    }
    if heat >= COLDEST:
        own |= {"do_sample": True, "temperature": heat}
    else:
        own |= {"do_sample": False, **dict.fromkeys(("temperature", "top_p", "top_k"))}
    others = {name: value for name, value in given.items() if name != "min_new_tokens"}
    if taken := [name for name in _OWN if name in others]:
        raise InputError(f"option {taken[0]} cannot be given here: a session ends and shows its answers itself")
    return generation_options(model.model, model.tokenizer, others, own=own)
