"""A run of the evaluation `ppl` over texts: each document is measured, noted in a journal, and reported at the end.

A document that the journal has is not measured again.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from model_worker.errors import InputError
from model_worker.evaluate.banks import fill, forget, open_memory
from model_worker.evaluate.cost import Cost, counted
from model_worker.evaluate.gains import by_distance, by_document, gains, part
from model_worker.evaluate.journal import Journal
from model_worker.evaluate.last_seen import Words, rare_words, words_of
from model_worker.evaluate.memlong_protocol import BANK as PROTOCOL_BANK
from model_worker.evaluate.memlong_protocol import protocol_memory, score_windows, window_of_protocol, windows
from model_worker.evaluate.perplexity import Document, check_document, measure_document, sizes_of
from model_worker.model import MemoryModel
from model_worker.remember.memory import Memory
from model_worker.text_files import reference_text
from model_worker.user_text import encode_text, readable

_BANK, _OTHER = "text", "another-text"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured of each text.

    tokens: read before those that are scored. score: scored tokens. spans: documents of a text; the first begins with
    the text, the others at different places that the seed draws, as many as the text has. sizes: of memories, in
    tokens. other: tokens of another text's memory, 0 for none. memlong: windows in MemLong's own protocol.
    """

    tokens: int
    score: int
    spans: int
    sizes: tuple[int, ...]
    other: int
    memlong: int
    seed: int


class PerplexityRun:
    """A run over texts by their names, with the memories of `model`, whose settings hold for all of them.

    journal: what was measured before. progress: called with (stage, done, in all). Raises InputError for a text that is
    too short.
    """

    def __init__(
        self, model: MemoryModel, texts: Mapping[str, str], plan: Plan, journal: Journal, progress: Progress
    ) -> None:
        self.model, self.plan, self.journal, self.progress = model, plan, journal, progress
        self.cost = Cost()
        self._texts = {name: words_of(model.tokenizer, text) for name, text in texts.items()}

    def report(self) -> dict[str, Any]:
        """Measure what the journal does not have, and return all figures as plain values."""
        documents = [each for name in self._texts for each in self._documents(name)]
        for name, begin, words in documents:
            check_document(self.model, self._document(name, begin, words))
        if self.plan.memlong and all(len(own.ids) < window_of_protocol(self.model) for own in self._texts.values()):
            raise InputError("no text is long enough for a window of MemLong's protocol")
        parts = []
        for index, (name, begin, words) in enumerate(documents):
            self.progress("documents", index, len(documents))
            key = f"{name} from {begin}"
            parts.append(self._noted(key, partial(self._part, name, begin, words)))
        edges = sorted({self.model.window, *self.plan.sizes})
        found = {
            "gains": gains(parts),
            "documents": by_document(parts),
            "distance": by_distance(parts, edges),
            "window": self.model.window,
        }
        if self.plan.memlong:
            found["memlong"] = self._protocol()
        return {**found, "cost": asdict(self.cost)}

    def _noted(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return the part under `key` of the journal; measured and noted, with its cost, where it is not there."""
        noted = self.journal.get(key)
        if noted is None:
            with counted(self.model.model, Cost()) as cost:
                found = measure()
            cost.stored = forget(self.model.client, (_BANK, _OTHER, PROTOCOL_BANK))
            noted = {"found": found, "cost": asdict(cost)}
            self.journal.put(key, noted)
        self.cost.add(noted["cost"])
        return noted["found"]

    # -- documents ------------------------------------------------------------------------------------------------

    def _documents(self, name: str) -> Iterator[tuple[str, int, Words]]:
        """Yield the documents of a text: its name, where it begins, and its tokens and words."""
        text, plan = self._texts[name], self.plan
        length = min(plan.tokens + plan.score, len(text.ids))
        draw = random.Random(f"kvbank-spans:{plan.seed}:{name}")
        places = len(text.ids) - length  # behind the first
        drawn = draw.sample(range(1, places + 1), min(plan.spans - 1, places))
        for begin in (0, *drawn):
            yield name, begin, text.between(begin, begin + length)

    def _document(self, name: str, begin: int, words: Words) -> Document:
        return Document(f"{name} from {begin:,}" if begin else name, words.ids, self.plan.score)

    def _part(self, name: str, begin: int, words: Words) -> Mapping[str, Any]:
        """Measure one document, with a bank of its own and one of another text."""
        plan, model = self.plan, self.model
        document = self._document(name, begin, words)
        other = self._other_memory(name) if plan.other else None
        losses = measure_document(
            model,
            open_memory(model, _BANK, query="past", count=False),
            document,
            sizes_of(document.history, plan.sizes),
            other,
            partial(self.progress, document.name),
        )
        return part(document.name, document.history, losses, rare_words(words, document.history), document.history)

    def _other_memory(self, name: str) -> Memory:
        """Read the beginning of another text into a bank, and return the memory over it."""
        names = list(self._texts)
        following = names[(names.index(name) + 1) % len(names)]
        if following == name:
            ids = encode_text(self.model.tokenizer, readable(reference_text()[: 16 * self.plan.other]))
        else:
            ids = self._texts[following].ids
        memory = open_memory(self.model, _OTHER, query="past", count=False)
        fill(self.model, memory, ids[: self.plan.other])
        return memory

    def _protocol(self) -> list[dict[str, Any]]:
        """Score windows of every text by MemLong's protocol, with one memory that is never emptied."""
        # One part of the journal: what a window finds depends on all windows before it.
        found = self._noted("MemLong's protocol", self._protocol_windows)
        return windows([(a, b, c) for a, b, c in found]).document()

    def _protocol_windows(self) -> list[tuple[float, float, float | None]]:
        memory, found = protocol_memory(self.model), []
        for name, text in self._texts.items():
            tell = partial(self.progress, f"MemLong's protocol, {name}")
            found += score_windows(self.model, memory, text.ids, self.plan.memlong, tell)
        return found
