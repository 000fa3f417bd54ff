"""A passkey is a fact in the middle of a long text that is asked for at the end; here it is measured who still tells
it.

The text is filler with one statement of `evaluate.facts` in it, at evenly spread depths. An answer counts when
greedy decoding says the number to the last digit and no digit more. The same prompt, of multiples of the trained
length, is read in several ways:

* `plain, all tokens`: one forward at positions the model was not trained for.
* `plain, last tokens`: the most recent tokens that fit into the trained length.
* `homer, paper` and `homer, balanced`: whole prompts as published, calibrated or not.
* `homer, balanced, tuned`: with the deviations of `compress_prompt` that are asked for (merges, pool, again).
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.errors import InputError
from model_worker.evaluate.facts import Fact, make_facts
from model_worker.homer.bias import NONE, Bias
from model_worker.homer.calibrate import calibrate
from model_worker.homer.prompt import compress_prompt
from model_worker.user_text import encode_text, readable

_ANSWER = 8  # new tokens


@dataclass(frozen=True, slots=True)
class Tuning:
    """Parameters of `compress_prompt` for the tuned way; `size` counts for all ways of HOMER.

    Raises InputError for an even pool.
    """

    size: int | None = None
    leaf: int | None = None
    warmup: int | None = None
    merges: int | None = None
    pool: int = 1
    again: bool = False

    def __post_init__(self) -> None:
        if self.pool < 1 or self.pool % 2 == 0:
            raise InputError(f"pool={self.pool} has to be an odd number")


@dataclass(frozen=True, slots=True)
class Score:
    """The numbers told of those asked for, by one way at one length in tokens; or why the length cannot be read so."""

    way: str
    length: int
    right: int
    asked: int
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class _Prompt:
    """One prompt in token ids, and the fact that it asks for.

    prefix: BOS, where the tokenizer has one. context: filler with the statement. suffix: the question.
    """

    prefix: list[int]
    context: list[int]
    suffix: list[int]
    fact: Fact

    @property
    def ids(self) -> list[int]:
        return self.prefix + self.context + self.suffix


def measure_passkeys(
    model: Any,
    tokenizer: Any,
    filler: str,
    lengths: Sequence[int],
    *,
    samples: int = 20,
    seed: int = 0,
    tuning: Tuning | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Measure every way at every length in tokens. filler: text of which each prompt takes a part of its own.

    samples: prompts of each length. progress: called with (prompts done, prompts in all). Raises InputError for filler
    that is too short, and for a length without room for a statement and its question.
    """
    attachment = attach(model, tokenizer, mode="per_layer")
    try:
        ids = encode_text(tokenizer, readable(filler))
        first = len(ids) // 4  # for calibration; the prompts take the rest
        if len(ids) - first < max(lengths) + samples:
            raise InputError(f"{len(ids)} tokens of filler are too few for prompts of {max(lengths)}")
        half = (attachment.trained_length or 4096) // 2
        table = calibrate(attachment, ids[:first], distances=min(half, max(16, first // 4)), segments=40).table
        ways = _ways(attachment, Bias(table, "calibrated"), tuning or Tuning())
        scores = []
        for index, length in enumerate(lengths):
            prompts = list(_prompts(tokenizer, ids[first:], length, samples, seed))
            right, refused = dict.fromkeys(ways, 0), dict.fromkeys(ways, "")
            for done, prompt in enumerate(prompts, start=1):
                for name, answer in ways.items():
                    if not refused[name]:
                        try:
                            right[name] += tells(str(tokenizer.decode(answer(prompt))), prompt.fact.number)
                        except InputError as error:
                            refused[name] = str(error)
                if progress is not None:
                    progress(index * samples + done, len(lengths) * samples)
            scores += [Score(name, length, right[name], samples, refused[name] or None) for name in ways]
    finally:
        attachment.detach()
    return scores


def tells(answer: str, number: str) -> bool:
    """Return whether an answer begins with the number, to its last digit and with none behind it."""
    return re.match(rf"\s*{number}(?!\d)", answer) is not None


_Way = Callable[[_Prompt], list[int]]


def _ways(attachment: Attachment, table: Bias, tuning: Tuning) -> dict[str, _Way]:
    model: Any = attachment.model
    trained = attachment.trained_length or 4096

    def plain(ids: list[int]) -> list[int]:
        new: list[int] = []
        cache, now = None, torch.tensor([ids], device=model.device)
        with torch.no_grad():  # not generate(): it warns of lengths, which is what is measured here
            for _ in range(_ANSWER):
                out = model(input_ids=now, past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True)
                cache, now = out.past_key_values, out.logits[:, -1:].argmax(-1)
                new.append(int(now))
        return new

    def last(prompt: _Prompt) -> list[int]:
        room = trained - _ANSWER - len(prompt.prefix) - len(prompt.suffix)
        return plain(prompt.prefix + prompt.context[-room:] + prompt.suffix)

    def homer(mode: str, bias: Bias, **more: Any) -> _Way:
        def answer(prompt: _Prompt) -> list[int]:
            parts = prompt.prefix, prompt.context, prompt.suffix
            made = compress_prompt(attachment, *parts, size=tuning.size, mode=mode, bias=bias, **more)
            return made.generate(_ANSWER, do_sample=False)

        return answer

    ways: dict[str, _Way] = {"plain, all tokens": lambda prompt: plain(prompt.ids), "plain, last tokens": last}
    for mode in ("paper", "balanced"):
        ways[f"homer, {mode}"] = homer(mode, NONE)
        ways[f"homer, {mode}, calibrated"] = homer(mode, table)
    own = {name: getattr(tuning, name) for name in ("leaf", "warmup", "merges", "pool", "again")}
    if tuning != Tuning(tuning.size):
        ways["homer, balanced, tuned"] = homer("balanced", NONE, **own)
        ways["homer, balanced, tuned, calibrated"] = homer("balanced", table, **own)
        ways["the same, not asked again"] = homer("balanced", NONE, **{**own, "again": False})
    return ways


def _prompts(tokenizer: Any, filler: list[int], length: int, samples: int, seed: int) -> Iterator[_Prompt]:
    """Yield prompts of exactly `length` tokens, the statement at depth 0 to 1 in even steps."""
    draw = random.Random(f"passkeys:{seed}:{length}")
    prefix = [tokenizer.bos_token_id] if getattr(tokenizer, "bos_token_id", None) is not None else []
    for index, fact in enumerate(make_facts(seed, samples)):
        statement, suffix = (
            tokenizer.encode(f" {text}", add_special_tokens=False) for text in (fact.statement, fact.question)
        )
        room = length - len(prefix) - len(statement) - len(suffix)
        if room < 1:
            raise InputError(f"a prompt of {length} tokens has no room for text beside statement and question")
        begin = draw.randrange(len(filler) - room + 1)
        text, at = filler[begin : begin + room], round(room * (index + 0.5) / samples)
        yield _Prompt(prefix, text[:at] + statement + text[at:], suffix, fact)
