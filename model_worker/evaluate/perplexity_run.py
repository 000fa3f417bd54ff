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
from model_worker.evaluate.memlong_protocol import protocol_memory, score_windows, windows
from model_worker.evaluate.perplexity import Document, measure_document, sizes_of
from model_worker.model import MemoryModel
from model_worker.remember.memory import Memory
from model_worker.text_files import reference_text

_BANK, _OTHER = "text", "another-text"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured of each text.

    tokens: read before those that are scored. score: scored tokens. spans: documents of a text; the first begins with
    the text, the others at places that the seed draws. sizes: of memories, in tokens. other: tokens of another text's
    memory, 0 for none. memlong: windows in MemLong's own protocol.
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
            cost.stored = forget(self.model.client, (_BANK, _OTHER))
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
        for span in range(plan.spans):
            begin = draw.randrange(len(text.ids) - length + 1) if span else 0
            yield name, begin, text.between(begin, begin + length)

    def _part(self, name: str, begin: int, words: Words) -> Mapping[str, Any]:
        """Measure one document, with a bank of its own and one of another text."""
        plan, model = self.plan, self.model
        document = Document(f"{name} from {begin:,}" if begin else name, words.ids, plan.score)
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
            ids = words_of(self.model.tokenizer, reference_text()[: 16 * self.plan.other]).ids
        else:
            ids = self._texts[following].ids
        memory = open_memory(self.model, _OTHER, query="past", count=False)
        fill(self.model, memory, ids[: self.plan.other])
        return memory

    def _protocol(self) -> list[dict[str, Any]]:
        """Score windows of every text by MemLong's protocol, with one memory that is never emptied."""
        memory = protocol_memory(self.model)
        found = []
        for name, text in self._texts.items():
            stage = f"MemLong's protocol, {name}"
            tell = partial(self.progress, stage)
            found += self._noted(stage, partial(score_windows, self.model, memory, text.ids, self.plan.memlong, tell))
        if not found:
            raise InputError("no text is long enough for a window of MemLong's protocol")
        return windows([(a, b, c) for a, b, c in found]).document()
