"""A question is asked here in several ways that share one search: what the search finds is attended to, or read again.

* `memory`: the model attends to the K-V of the hits.
* `re-reading`: the plain model reads the tokens of the same hits, in the same order, before the question.
* `nothing`: the plain window without a memory.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from model_worker.evaluate.greedy import answer, copied, read_plain
from model_worker.evaluate.stream import feed, window_of
from model_worker.evaluate.wordings import WordedFact
from model_worker.model import MemoryModel
from model_worker.remember.memory import Memory
from model_worker.user_text import encode_text, rendered
from model_worker.window.cache import MemoryCache
from model_worker.window.capture import Captured
from model_worker.window.recalled import RecalledChunk

MEMORY, REREAD, NOTHING = "memory", "re-reading", "nothing"
WAYS = (MEMORY, REREAD, NOTHING)
# New tokens: a number or a word, and a short sentence.
_TOKENS = {"complete": 8, "question": 8, "chat": 24}


class _Question:
    """The port of a window whose only recall is for one question; None recalls nothing. Nothing is written."""

    needs_queries, recent = False, 0

    def __init__(self, memory: Memory, query: Sequence[int] | None = None):
        self._memory, self._query = memory, query
        self.chunk, self.cadence = memory.chunk, memory.cadence
        self.query_tokens, self.query = memory.query_tokens, memory.query
        self.hits: list[RecalledChunk] | None = None

    def asked_for(self, query: Sequence[int] | None) -> Sequence[int] | None:
        """Recall for another query from now on, and return the one before."""
        before, self._query = self._query, query
        return before

    def remember(self, rows: Sequence[Captured | None]) -> None:
        """Let what leaves the window go."""

    def recall(
        self, rows: Sequence[Sequence[int]], without: Sequence[Collection[RecalledChunk]] | None = None
    ) -> list[list[RecalledChunk]] | None:
        """Return the hits of the question once, and go on with them."""
        if self._query is None or self.hits is not None:
            return None
        found = self._memory.recall([self._query])
        self.hits = [] if found is None else found[0]
        return [self.hits]


@dataclass(frozen=True, slots=True)
class Asked:
    """What came of a question. found: whether a hit holds the answer. right: by way; None where a way cannot be."""

    found: bool
    right: dict[str, bool | None]


@dataclass
class Asker:
    """Asks questions behind a local text, by a memory over a bank in which the answers stand.

    local: the tokens of the local text, which are read once. start: the offset of the first of them in the source.
    first: the first tokens of the text that the bank holds, where the questions belong to the stream that read it: they
    stay as sinks, as in a session. Without them each question begins a stream, as with `generate`.
    """

    model: MemoryModel
    memory: Memory
    local: Sequence[int]
    start: int
    first: Sequence[int] = ()
    _state: dict[str, Tensor] = field(init=False)
    _plain: DynamicCache = field(init=False)

    def __post_init__(self) -> None:
        self._state = {}
        if self.local:
            cache = self._begun(_Question(self.memory))
            feed(self.model, self.local, cache)
            self._state = cache.state()
        self._plain = read_plain(self.model.model, self.local)

    def _begun(self, port: _Question) -> MemoryCache:
        """Return a window behind the local text, or at its beginning where that is not read yet."""
        if self._state:
            cache = window_of(self.model, port, self.start)
            cache.restore(self._state)
            return cache
        cache = window_of(self.model, port, self.start - len(self.first))
        if self.first:
            query = port.asked_for(None)
            feed(self.model, self.first, cache)
            cache.flush()
            port.asked_for(query)
        return cache

    def ask(self, fact: WordedFact, place: int, form: str, ways: Sequence[str] = WAYS) -> Asked:
        """Ask for a fact in several ways, `memory` among them. place: of the last token of its answer in the source."""
        asked = fact.asked(form)
        hits, answers = self._answers(asked, self._prompt(asked, form), _TOKENS[form], ways)
        right = {way: None if text is None else fact.answered(text, form) for way, text in answers.items()}
        return Asked(any(hit.start <= place < hit.start + len(hit.token_ids) for hit in hits), right)

    def answers(self, asked: str, tokens: int, ways: Sequence[str]) -> tuple[list[RecalledChunk], dict[str, str]]:
        """Return what a question finds, and the texts of at most `tokens` tokens that go on from it, by way.

        A way that cannot be is left out.
        """
        hits, answers = self._answers(asked, self._prompt(asked, "complete"), tokens, ways)
        return hits, {way: text for way, text in answers.items() if text is not None and way in ways}

    def _answers(
        self, asked: str, prompt: Sequence[int], tokens: int, ways: Sequence[str]
    ) -> tuple[list[RecalledChunk], dict[str, str | None]]:
        """Search once for what is `asked`, and return the hits and the answers by way, `memory` always among them."""
        tokenizer = self.model.tokenizer
        port = _Question(self.memory, encode_text(tokenizer, asked))
        answers: dict[str, list[int] | None] = {MEMORY: self._answer(port, prompt, tokens)}
        hits = port.hits or []
        if REREAD in ways:
            answers[REREAD] = self._reread([token for hit in hits for token in hit.token_ids], prompt, tokens)
        if NOTHING in ways:
            answers[NOTHING] = self._answer(_Question(self.memory), prompt, tokens)
        told = {
            way: None if ids is None else str(tokenizer.decode(ids, skip_special_tokens=True))
            for way, ids in answers.items()
        }
        return hits, told

    def _prompt(self, asked: str, form: str) -> list[int]:
        tokenizer = self.model.tokenizer
        if form == "chat":
            text = rendered(tokenizer, [{"role": "user", "content": asked}])
            return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
        return encode_text(tokenizer, f"\n{asked}" if self.local else asked)

    def _answer(self, port: _Question, prompt: Sequence[int], tokens: int) -> list[int]:
        return answer(self.model.model, self._begun(port), prompt, tokens, self.model.chunk)

    def _reread(self, again: Sequence[int], prompt: Sequence[int], tokens: int) -> list[int] | None:
        """Answer by the plain model, which reads the hits between the local text and the question."""
        trained = self.model.attachment.trained_length
        between = [] if self.local else encode_text(self.model.tokenizer, "\n")
        ids = [*again, *between, *prompt]
        if trained is not None and len(self.local) + len(ids) + tokens > trained:
            return None
        return answer(self.model.model, copied(self._plain), ids, tokens, 0)


def room_for_local(model: MemoryModel, asked: Sequence[int], form: str) -> int:
    """Return how many local tokens fit into the window with a question of these tokens and its answer."""
    return max(0, model.window - len(asked) - _TOKENS[form])


def chat_is_possible(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))
