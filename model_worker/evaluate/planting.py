"""Facts are planted in a text of token ids, as lines of their own behind sentences, at known places."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from model_worker.errors import InputError
from model_worker.evaluate.wordings import WordedFact
from model_worker.user_text import encode_text, readable
from model_worker.window.chunking import sentence_ends


@dataclass(frozen=True, slots=True)
class Planted:
    """A fact in a text; `answer` is the place of the last token of its answer."""

    fact: WordedFact
    answer: int


@dataclass(frozen=True, slots=True)
class PlantedText:
    """A text of token ids with facts in it, in the order of the text. filler: text that stands nowhere in it."""

    ids: list[int]
    facts: list[Planted]
    filler: list[int]


def plant(
    tokenizer: Any, text: str, facts: Sequence[WordedFact], tokens: int, within: int, local: int, seed: int
) -> PlantedText:
    """Return a text of `tokens` tokens with the facts spread evenly over its first `within` tokens, in a drawn order.

    text: filler, repeated where it is too short. local: tokens of filler that are left over. Raises InputError where
    the facts do not fit.
    """
    source = encode_text(tokenizer, readable(text))
    if len(source) < local + 256:
        raise InputError(f"{len(source)} tokens of filler are too few; {local + 256} are needed")
    draw = random.Random(f"kvbank-planting:{seed}")
    order = draw.sample(list(facts), len(facts))
    lines = [_line(tokenizer, fact) for fact in order]
    room = within - sum(len(line) for line, _ in lines)
    if room < 16 * len(lines):
        raise InputError(f"{len(lines)} facts do not fit into the first {within:,} tokens of the text")
    left, rest = source[:local], source[local:]
    filler = list(islice(cycle(rest), tokens))
    ends = sentence_ends(tokenizer)
    slot, ids, planted, taken = room / max(len(lines), 1), [], [], 0
    for index, ((line, answer), fact) in enumerate(zip(lines, order, strict=True)):
        wanted = int(index * slot + draw.random() * slot / 2)
        stop = next((at + 1 for at in range(wanted, min(wanted + int(slot / 2), room)) if filler[at] in ends), wanted)
        ids += filler[taken:stop]
        taken = stop
        planted.append(Planted(fact, len(ids) + answer))
        ids += line
    ids += filler[taken:]
    return PlantedText(ids[:tokens], planted, left)


def _line(tokenizer: Any, fact: WordedFact) -> tuple[list[int], int]:
    """Return the tokens of a fact's line, and which of them is the last of the answer."""
    line = encode_text(tokenizer, f"\n{fact.statement}\n")
    before = encode_text(tokenizer, f"\n{fact.statement[:-1]}")
    return line, min(len(before), len(line)) - 1
