"""The options of Hugging Face `generate` for a call whose cache carries a memory.

A checkpoint brings defaults of its own for `generate` (generation_config.json). This file owns three rules: what the
cache needs is stated in every call, whatever the checkpoint says; an option that the cache cannot keep is refused by
its name, whether the caller or the checkpoint set it; and all others reach `generate` as they are.
"""

import inspect
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from transformers import GenerationConfig

from model_worker.attachment.model_parts import device_of
from model_worker.errors import InputError, first_line
from model_worker.window.stepping import Step, stepping

# Below this temperature the likeliest token is taken: divided by less, the model's numbers are no longer finite.
COLDEST = 1e-6

_CACHE = "the memory's cache is the one that is used"
_TEXT = "the result is the new text alone"
_BRANCHES = "beam search and several sequences would remember every branch"
_ROLLBACK = "what was remembered cannot be taken back"
_STRATEGY = "this way of decoding does not go through one forward a token"

# How a text is computed, not which text: a checkpoint's value is overruled, a caller's other value is refused.
_STATED: dict[str, tuple[Any, str]] = {
    "use_cache": (True, "the memory is in the cache"),
    **dict.fromkeys(("cache_implementation", "cache_config", "max_cache_len"), (None, _CACHE)),
    "prefill_chunk_size": (None, "a prompt is fed in the model's chunks"),
    **dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits"), (False, _TEXT)),
    **dict.fromkeys(("output_attentions", "output_hidden_states"), (False, _TEXT)),
    **dict.fromkeys(("prompt_lookup_num_tokens", "use_mtp", "assistant_early_exit"), (None, _ROLLBACK)),
    **dict.fromkeys(("is_assistant", "speculation_type"), (None, _ROLLBACK)),
    "compile_config": (None, "a cache that grows is not compiled"),
}
# Which text: refused, whether the caller or the checkpoint asks for it.
_PLAIN: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("num_beams", "num_return_sequences", "num_beam_groups"), (1, _BRANCHES)),
    **dict.fromkeys(("constraints", "force_words_ids"), (None, _BRANCHES)),
    **dict.fromkeys(("penalty_alpha", "dola_layers", "low_memory"), (None, _STRATEGY)),
    "token_healing": (None, "the end of the prompt has been read already"),
}
_DEFAULT_LENGTH = 20  # new tokens where no option says how many: the number of transformers, which warns of it
# Options whose values are looked at here, so that most calls need not be tried.
_ORDINARY = {"max_new_tokens", "min_new_tokens", "max_length", "min_length", "do_sample", "pad_token_id", "streamer"}
_FUNCTIONS = ("logits_processor", "stopping_criteria")  # lists of them; they may keep a state, so they are not tried
# Arguments of `generate` that are no part of its configuration.
_NEVER: dict[str, str] = {
    **dict.fromkeys(("inputs", "input_ids", "inputs_embeds"), "the prompt is the first argument"),
    **dict.fromkeys(("attention_mask", "position_ids", "cache_position", "token_type_ids"), "it follows the prompt"),
    "past_key_values": "a cache is passed as cache=",
    **dict.fromkeys(("assistant_model", "assistant_tokenizer"), _ROLLBACK),
    **dict.fromkeys(("custom_generate", "trust_remote_code"), _STRATEGY),
}


def generation_options(
    model: Any,
    tokenizer: Any,
    options: Mapping[str, Any],
    *,
    own: Mapping[str, Any] | None = None,
    prompt: int | None = None,
) -> dict[str, Any]:
    """Return the keywords of one call of `model.generate`.

    options: what the caller asks for, a `generation_config` among them. own: what the calling part of kvbank decides
    itself; the caller may not give these, and the checkpoint's values for them are overruled. prompt: tokens of the
    prompt, where `max_length` counts them. Raises InputError with the option's name and the reason for what cannot be
    kept, and for names and values that `generate` does not take.
    """
    asked, own = _asked(options), dict(own or {})
    for name in asked:
        if name in _NEVER or name in own:
            raise InputError(f"option {name} cannot be given here: {_NEVER.get(name, 'it is set by the session')}")
    _check_known(model, asked)
    for name, (value, reason) in (_STATED | _PLAIN).items():
        if _differs(asked.get(name), value):
            raise InputError(f"{name}={asked[name]!r} cannot be kept with a memory: {reason}")
    for name, (value, reason) in _PLAIN.items():
        default = getattr(model.generation_config, name, None)
        if name not in asked and name not in own and default not in (None, False, value):
            raise InputError(
                f"{name}={default!r}, from the model's generation_config, cannot be kept with a memory: {reason}; "
                f"pass {name}={value!r}"
            )
    stated = {name: value for name, (value, _) in _STATED.items()}
    plain = {name: asked[name] for name in _PLAIN if name in asked}
    _check_values(model, asked, prompt)
    result = {**asked, **stated, **plain, **own}
    if all(_effective(model, result, name) is None for name in ("max_new_tokens", "max_length")):
        result["max_new_tokens"] = _DEFAULT_LENGTH
    if result.get("stop_strings") or model.generation_config.stop_strings:
        result.setdefault("tokenizer", tokenizer)
    if asked.keys() - _ORDINARY:
        _check_accepted(model, result)
    return result


def generated(model: Any, options: Mapping[str, Any], *, step: Step | None = None, **inputs: Any) -> torch.Tensor:
    """Call `model.generate` and return its ids, `[B, prompt + new]`. Raises InputError for what it does not accept.

    step: makes the forwards of one token; None: the model does.
    """
    try:
        with torch.no_grad():
            ids: torch.Tensor = (model if step is None else stepping(model, step)).generate(**inputs, **options)
            return ids
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"generate refused its options: {first_line(error)}") from error


def plain_decoding() -> dict[str, Any]:
    """Return the options of one branch and one forward a token, for a caller that decides the way of decoding."""
    return {name: value for name, (value, _) in _PLAIN.items()}


def _effective(model: Any, options: Mapping[str, Any], name: str) -> Any:
    """Return an option as `generate` takes it: the checkpoint's where the call does not state it."""
    return options[name] if options.get(name) is not None else getattr(model.generation_config, name, None)


def _asked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with those of a `generation_config` among them, as `generate` takes them: None is the default."""
    asked = dict(options)
    config = asked.pop("generation_config", None)
    if config is None:
        return asked
    if isinstance(config, GenerationConfig):
        config = {name: value for name, value in vars(config).items() if value is not None and name[0] != "_"}
        config.pop("transformers_version", None)
    if not isinstance(config, Mapping):
        raise InputError(f"generation_config is a GenerationConfig or a mapping, not {type(config).__name__}")
    return {**config, **asked}


def _check_known(model: Any, asked: Mapping[str, Any]) -> None:
    """Raise InputError for names that `generate` does not take."""
    taken = {"tokenizer", *vars(GenerationConfig()), *vars(model.generation_config)}
    taken |= {*inspect.signature(model.generate).parameters, *inspect.signature(model.forward).parameters}
    unknown = sorted(name for name in asked if name not in taken - {"kwargs", "self"})
    if unknown:
        raise InputError(f"generate has no option {', '.join(unknown)}")


def _check_values(model: Any, asked: Mapping[str, Any], prompt: int | None) -> None:
    """Raise InputError for values that `generate` does not take, before a token of the prompt is fed and remembered."""
    _check_functions(asked)
    for name in ("max_new_tokens", "min_new_tokens", "max_length", "min_length"):
        value = asked.get(name)
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise InputError(f"{name} is a whole number, not {value!r}")
    known = {name: value for name, value in asked.items() if name in vars(GenerationConfig())}
    try:
        GenerationConfig(**known)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"generate refused its options: {first_line(error)}") from error
    if asked.get("max_new_tokens") or model.generation_config.max_new_tokens:
        return
    longest = asked.get("max_length", model.generation_config.max_length)
    if prompt is not None and longest is not None and longest <= prompt:
        whose = "" if "max_length" in asked else ", from the model's generation_config,"
        raise InputError(
            f"max_length={longest}{whose} leaves no room behind a prompt of {prompt} tokens; pass max_new_tokens"
        )


def _check_functions(asked: Mapping[str, Any]) -> None:
    """Raise InputError for what should be functions or a streamer, and is not."""
    for name in _FUNCTIONS:
        value = asked.get(name)
        if value is not None and not (isinstance(value, list | tuple) and all(map(callable, value))):
            raise InputError(f"{name} is a list of functions, not {value!r}")
    allowed, streamer = asked.get("prefix_allowed_tokens_fn"), asked.get("streamer")
    if allowed is not None and not callable(allowed):
        raise InputError(f"prefix_allowed_tokens_fn is a function, not {allowed!r}")
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise InputError(f"streamer has methods put and end, and a {type(streamer).__name__} has not")


def _check_accepted(model: Any, options: Mapping[str, Any]) -> None:
    """Raise InputError for what `generate` refuses only while it runs, on one token and without a memory."""
    left_out = {*_FUNCTIONS, "prefix_allowed_tokens_fn", "streamer"}
    tried = {name: value for name, value in options.items() if name not in left_out}
    tried |= {"max_new_tokens": 1, "min_new_tokens": 0, "min_length": 0}
    token = torch.ones((1, 1), dtype=torch.long, device=device_of(model))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[token.device] if token.is_cuda else []):
            model.generate(input_ids=token, attention_mask=token, **tried)
    except Exception as error:  # of foreign code, and about the options: there is nothing else in this call
        raise InputError(f"generate refused its options: {type(error).__name__}: {first_line(error)}") from error


def _differs(given: Any, value: Any) -> bool:
    """Tell whether an option is given and is not `value`."""
    try:
        return given is not None and not bool(given == value)
    except (TypeError, ValueError):  # an array
        return True
