"""A prompt of the evaluation `ruler`: a text, a question behind it, and the strings that an answer has to hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from model_worker.errors import InputError
from model_worker.user_text import encode_text, readable
from model_worker.window.chunking import sentence_ends


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text in token ids, and what is asked behind it.

    question: ends where the answer begins. expected: the strings that the answer has to hold. budget: new tokens of an
    answer at most.
    """

    text: list[int]
    question: str
    expected: tuple[str, ...]
    budget: int

    def score(self, answer: str) -> float:
        """Return the share of the expected strings that stand in an answer, in any case (RULER's string match)."""
        return share_in(self.expected, answer)


def share_in(expected: Sequence[str], text: str) -> float:
    """Return the share of the `expected` strings that stand in a text, upper and lower case alike."""
    written = text.lower()
    return sum(each.lower() in written for each in expected) / len(expected)


class Source:
    """What prompts are made of: a tokenizer, and a text that fills them.

    ids: the tokens of the filler, which is repeated where a prompt needs more. Raises InputError for a filler of fewer
    than 256 tokens.
    """

    def __init__(self, tokenizer: Any, filler: str):
        self.tokenizer = tokenizer
        self._filler = readable(filler).lower()
        self.ids = self.encode(readable(filler))
        if len(self.ids) < 256:
            raise InputError(f"{len(self.ids)} tokens of filler are too few; 256 are needed")

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a piece of text, none of which is a control token."""
        return encode_text(self.tokenizer, text)

    def encode_each(self, words: Sequence[str]) -> list[list[int]]:
        """Return the tokens of many words or numbers that were made here, and so hold no control token."""
        return [list(ids) for ids in self.tokenizer(list(words), add_special_tokens=False)["input_ids"]]

    @cached_property
    def ends(self) -> frozenset[int]:
        """Return the tokens that end a sentence."""
        return sentence_ends(self.tokenizer)

    def holds(self, text: str) -> bool:
        """Return whether a string stands in the filler, in any case."""
        return text.lower() in self._filler

    def room(self, tokens: int, question: str, budget: int) -> int:
        """Return how many tokens of text are left where text, question and answer have `tokens` together."""
        return tokens - len(self.asked(question)) - budget

    def asked(self, question: str) -> list[int]:
        """Return the tokens of a question as it stands behind a text, in a line of its own."""
        return self.encode(f"\n{question}")
