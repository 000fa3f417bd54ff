"""A run of the evaluation `ruler`: each prompt is read and answered in several ways, and noted in a journal.

* `plain`: the plain model reads text and question, where both fit into its trained length.
* `memory`: the text is read into a bank of its own, and the model attends to the K-V of what the question finds.
* `re-reading`: the plain model reads the tokens of the same hits before the question.
* `nothing`: the question alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

from transformers import DynamicCache

import kvbank
from model_worker.errors import InputError
from model_worker.evaluate.asking import MEMORY, NOTHING, REREAD, Asker
from model_worker.evaluate.banks import forget, open_memory
from model_worker.evaluate.cost import Cost, counted
from model_worker.evaluate.greedy import answer
from model_worker.evaluate.interval import Share
from model_worker.evaluate.journal import Journal
from model_worker.evaluate.ruler.prompt import Prompt, Source, share_in
from model_worker.evaluate.ruler.tasks import TASKS, prompt_of
from model_worker.model import MemoryModel

PLAIN, FOUND = "plain", "found"
WAYS = (PLAIN, REREAD, MEMORY, NOTHING)
_BANK, _PIECE = "ruler", 512
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked, and in which ways it is answered.

    tokens: lengths of prompts, their answers included. tasks, ways: names. prompts: of each task at each length. local:
    last tokens of the text that stand in the window before the question. stream: the question belongs to the stream
    that read the text. Raises InputError for a task or a way that is not there or given twice.
    """

    tokens: tuple[int, ...]
    tasks: tuple[str, ...]
    ways: tuple[str, ...]
    prompts: int
    local: int
    stream: bool
    seed: int

    def __post_init__(self) -> None:
        for name, known in (("tokens", None), ("tasks", TASKS), ("ways", WAYS)):
            given = getattr(self, name)
            for each in given:
                if known is not None and each not in known:
                    raise InputError(f"there is no {name[:-1]} {each!r}; there are {', '.join(known)}")
            if len(set(given)) < len(given):
                raise InputError(f"{name} {max(given, key=given.count)!r} is given twice")


class RulerRun:
    """A run with filler out of a text, whose prompts are told to a journal as they come.

    progress: called with (stage, done, in all). Raises InputError for a filler, a length or a local text that does not
    fit.
    """

    def __init__(self, model: MemoryModel, filler: str, plan: Plan, journal: Journal, progress: Progress) -> None:
        self.model, self.plan, self.journal, self.progress = model, plan, journal, progress
        self.cost = Cost()
        self._source = Source(model.tokenizer, filler)
        for task in plan.tasks:
            made = prompt_of(self._source, task, min(plan.tokens), plan.seed, 0)  # refuses what does not fit
            if plan.local and plan.local + len(self._source.asked(made.question)) + made.budget > model.window:
                raise InputError(f"{plan.local} local tokens do not fit into the window with a question of {task}")

    def report(self) -> dict[str, Any]:
        """Answer what the journal does not have, and return all figures as plain values."""
        wanted = list(product(self.plan.tokens, self.plan.tasks, range(self.plan.prompts)))
        parts: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
        for done, (tokens, task, index) in enumerate(wanted):
            self.progress("prompts", done, len(wanted))
            key = f"{task}, {tokens} tokens, prompt {index + 1}"
            part = self.journal.get(key)
            if part is None:
                part = self._part(prompt_of(self._source, task, tokens, self.plan.seed, index))
                self.journal.put(key, part)
            self.cost.add(part["cost"])
            parts.setdefault((tokens, task), []).append(part)
        self.progress("prompts", len(wanted), len(wanted))
        rows = [row for (tokens, task), own in parts.items() for row in _rows(tokens, task, own)]
        found = {"trained": self.model.attachment.trained_length, "hits": self.model.memory.top_k}
        return {**found, "window": self.model.window, "rows": rows, "cost": asdict(self.cost)}

    def _part(self, prompt: Prompt) -> dict[str, Any]:
        """Answer one prompt in every way."""
        ways = self.plan.ways
        found: float | None = None
        with counted(self.model.model, Cost()) as cost:
            answers = self._plain(prompt) if PLAIN in ways else {}
            if set(ways) - {PLAIN}:
                hits, others = self._recalled(prompt)
                answers |= others
                found = share_in(prompt.expected, hits)
        cost.stored = forget(self.model.client, (_BANK,))
        told = {way: prompt.score(text) for way, text in answers.items()}
        return {
            "expected": prompt.expected,
            "answers": answers,
            "told": told if found is None else {**told, FOUND: found},
            "cost": asdict(cost),
        }

    def _plain(self, prompt: Prompt) -> dict[str, str]:
        """Answer by the plain model with the whole text before the question; nothing where that is too long."""
        ids = [*prompt.text, *self._source.asked(prompt.question)]
        trained = self.model.attachment.trained_length
        if trained is not None and len(ids) + prompt.budget > trained:
            return {}
        new = answer(self.model.model, DynamicCache(), ids, prompt.budget, _PIECE)
        return {PLAIN: str(self.model.tokenizer.decode(new, skip_special_tokens=True))}

    def _recalled(self, prompt: Prompt) -> tuple[str, dict[str, str]]:
        """Return the text of the hits, and the answers of the ways that read the text into a bank, or not at all."""
        model, plan = self.model, self.plan
        forget(model.client, (_BANK,))  # of a run that was interrupted
        memory = open_memory(model, _BANK, count=False)
        model.read(prompt.text, partial(self.progress, "reading a text"), memory=memory)
        before = len(prompt.text) - plan.local
        memory.filter = kvbank.Filter(start_before=before)
        first = prompt.text[: model.sinks] if plan.stream else []
        asker = Asker(model, memory, prompt.text[before:], before, first)
        hits, answers = asker.answers(prompt.question, prompt.budget, [way for way in plan.ways if way != PLAIN])
        held = str(model.tokenizer.decode([token for hit in hits for token in hit.token_ids]))
        return held, answers


def _rows(tokens: int, task: str, parts: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a row of each way that answered prompts of a task and a length.

    The interval is Wilson's with the sum of shares as right answers, which is too wide rather than too narrow where a
    prompt expects several strings, since shares vary less than answers that are right or wrong.
    """
    ways = dict.fromkeys(way for part in parts for way in part["told"])
    for way in ways:
        told = [part["told"][way] for part in parts if way in part["told"]]
        share = Share(sum(told), len(told)).document()
        yield {"tokens": tokens, "task": task, "kind": TASKS[task].kind, "way": way, **share}
