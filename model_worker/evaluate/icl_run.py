"""A run of the evaluation `icl`: labels are told by demonstrations that stand in a memory, beside those of the context.

The protocol is that of MemLong's code: the demonstrations of the context are drawn once for each seed, those in memory
anew for each item, and the answer is the likeliest next token. The ways differ in the memory alone:

* `no memory`: only the context.
* `random`: as many demonstrations of the bank as a recall brings, drawn anew for each item.
* `found of N`: of N that are drawn anew for each item, those that are found for its text, as in MemLong.
* `found of all`: those that are found among all demonstrations of the bank.
* `vote`: no model; the label that most of those have that `found of all` attends to.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from model_worker.errors import InputError
from model_worker.evaluate.banks import forget
from model_worker.evaluate.cost import Cost, counted
from model_worker.evaluate.icl_bank import Demonstrations
from model_worker.evaluate.icl_examples import Draw, Example, Task, drawn, parted
from model_worker.evaluate.interval import Share, interval, interval_of_few
from model_worker.evaluate.journal import Journal
from model_worker.model import MemoryModel
from model_worker.user_text import begin_of, encode_text
from model_worker.window.cache import MemoryCache
from model_worker.window.recalled import RecalledChunk

NOTHING, RANDOM, ALL, VOTE = "no memory", "random", "found of all", "vote"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked, and with how many demonstrations.

    shots: demonstrations of the context. cached: of the memory that is drawn anew for each item. demonstrations: of the
    bank. items: of each seed. seeds: how many, from `seed` on. Raises InputError for more cached demonstrations than
    the bank has.
    """

    shots: tuple[int, ...]
    cached: int
    demonstrations: int
    items: int
    seeds: int
    seed: int

    def __post_init__(self) -> None:
        if self.cached > self.demonstrations:
            raise InputError(f"{self.cached} cached demonstrations cannot be drawn of {self.demonstrations}")

    @property
    def contexts(self) -> list[int]:
        """Return how many demonstrations stand in the context, ascending."""
        return sorted(set(self.shots))


@dataclass(frozen=True, slots=True)
class Answer:
    """The likeliest of the labels, by its first token; and whether the likeliest token of all begins the right one."""

    label: str
    greedy: bool


@dataclass
class IclRun:
    """A run over tasks with `model`. journal: what was measured before. progress: called with (stage, done, in all).

    Raises InputError for two tasks of one name, and for more hits than demonstrations.
    """

    model: MemoryModel
    tasks: Sequence[Task]
    plan: Plan
    journal: Journal
    progress: Progress
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        names, top_k = [task.name for task in self.tasks], self.model.memory.top_k
        if len(set(names)) < len(names):
            name = max(names, key=names.count)
            raise InputError(f"two tasks have the name {name}: they are told apart by the names of their files")
        if top_k > self.plan.demonstrations:
            raise InputError(f"{top_k} hits cannot be had of {self.plan.demonstrations} demonstrations")

    def report(self) -> dict[str, Any]:
        """Measure every task, and return all figures as plain values.

        Raises InputError, before anything is read, for labels that begin alike and for a task of too few examples; and
        where no context fits into the length that the model was trained for.
        """
        firsts = {task.name: self._first_tokens(task) for task in self.tasks}
        for task in self.tasks:
            self._parted(task)
        parts = [part for task in self.tasks for part in self._parts(task, firsts[task.name])]
        rows = [row for part in parts for row in part["rows"]]
        if not rows:
            raise InputError(f"no context fits into the {self.model.attachment.trained_length} tokens of the model")
        for part in parts:
            self.cost.add(part["cost"])
        return {
            "rows": summed(rows),
            "differences": differences(rows, f"found of {self.plan.cached}"),
            "left_out": sorted({(own["task"], own["shots"]) for part in parts for own in part["left_out"]}),
            "top_k": self.model.memory.top_k,
            "cost": asdict(self.cost),
        }

    def _first_tokens(self, task: Task) -> dict[int, str]:
        """Return the labels by their first token. Raises InputError where two labels begin with the same."""
        found: dict[int, str] = {}
        for label in task.labels:
            first = encode_text(self.model.tokenizer, f" {label}")[0]
            if first in found:
                raise InputError(
                    f"{task.name}: labels {found[first]!r} and {label!r} begin with the same token of this model, "
                    "which cannot tell them apart"
                )
            found[first] = label
        return found

    def _parts(self, task: Task, labels: Mapping[int, str]) -> Iterator[dict[str, Any]]:
        """Yield the figures of each seed of a task; those that the journal does not have are measured."""
        shown, others = self._parted(task)
        demonstrations: Demonstrations | None = None
        for seed in range(self.plan.seed, self.plan.seed + self.plan.seeds):
            key = f"{task.name}, seed {seed}"
            part = self.journal.get(key)
            if part is None:
                own = Cost()
                with counted(self.model.model, own):
                    if demonstrations is None:
                        demonstrations = self._written(task, shown)
                    part = self._measured(demonstrations, labels, self._drawn(task, others, seed), seed)
                own.stored = self.model.client.get_bank(demonstrations.bank).usage.bytes
                part["cost"] = asdict(own)
                self.journal.put(key, part)
            yield part
        if demonstrations is not None:
            forget(self.model.client, [demonstrations.bank])

    def _parted(self, task: Task) -> tuple[list[Example], list[Example]]:
        """Return the demonstrations of a task, and its other examples. Raises InputError where these are too few."""
        shown, others = parted(task, self.plan.demonstrations, self.plan.seed)
        needed = self.plan.items + self.plan.contexts[-1]
        if len(others) < needed:
            raise InputError(
                f"{task.name} has {len(task.examples)} examples; {self.plan.demonstrations} demonstrations, and "
                f"{needed} items and demonstrations of the context beside them, are more"
            )
        return shown, others

    def _written(self, task: Task, shown: Sequence[Example]) -> Demonstrations:
        def told(done: int, total: int) -> None:
            self.progress(f"{task.name}, demonstrations", done, total)

        return Demonstrations.written(self.model, task, shown, told)

    def _drawn(self, task: Task, others: Sequence[Example], seed: int) -> Draw:
        plan = self.plan
        return drawn(
            others, plan.items, plan.contexts[-1], plan.cached, self.model.memory.top_k, plan.demonstrations, seed
        )

    def _measured(self, bank: Demonstrations, labels: Mapping[int, str], draw: Draw, seed: int) -> dict[str, Any]:
        """Return a row for each item, context and way, and the contexts that do not fit."""
        task, rows, left_out = bank.task, list[dict[str, Any]](), []
        for shots in self.plan.contexts:
            context = self._beginning() + [
                token for own in draw.shots[:shots] for token in encode_text(self.model.tokenizer, task.told(own))
            ]
            asked = [encode_text(self.model.tokenizer, task.asked(item)) for item in draw.items]
            trained = self.model.attachment.trained_length
            if trained is not None and len(context) + max(map(len, asked)) >= trained:
                left_out.append({"task": task.name, "shots": shots})
                continue
            window = _Context(self.model, context, labels)
            for at, item in enumerate(draw.items):
                found = bank.found(item.text)
                memories = {
                    NOTHING: [],
                    RANDOM: bank.of(item.text, draw.chosen[at]),
                    f"found of {self.plan.cached}": bank.found(item.text, draw.cached[at]),
                    ALL: found,
                }
                answers = {way: window.answer(asked[at], chunks, item.label) for way, chunks in memories.items()}
                vote = bank.vote(found)
                answers[VOTE] = Answer(vote, vote == item.label)
                rows += [
                    {"task": task.name, "seed": seed, "shots": shots, "item": at, "way": way}
                    | {"label": answer.label == item.label, "greedy": answer.greedy}
                    for way, answer in answers.items()
                ]
                self.progress(f"{task.name}, seed {seed}, {shots} in context", at + 1, len(draw.items))
        return {"rows": rows, "left_out": left_out}

    def _beginning(self) -> list[int]:
        """Return the token with which the tokenizer begins a text, or nothing where it has none."""
        token = begin_of(self.model.tokenizer)
        return [] if token is None else [token]


class _Context:
    """The demonstrations of a context, read once; every item is asked behind them.

    labels: by first token. The window has no bound, and memory is set by hand.
    """

    def __init__(self, model: MemoryModel, context: Sequence[int], labels: Mapping[int, str]) -> None:
        self._model, self._labels, self._context = model, labels, list(context)
        self._state: dict[str, Tensor] = {}
        if self._context:
            cache = self._fresh()
            self._logits(cache, self._context)
            self._state = cache.state()

    def _fresh(self) -> MemoryCache:
        return MemoryCache(self._model.attachment, None, sinks=0)

    @torch.no_grad()
    def _logits(self, cache: MemoryCache, ids: Sequence[int]) -> Tensor:
        seen = torch.tensor([list(ids)], device=self._model.model.device)
        out = self._model.model(
            input_ids=seen, past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True
        )
        last: Tensor = out.logits[0, -1].float()
        return last

    def answer(self, asked: Sequence[int], chunks: Sequence[RecalledChunk], right: str) -> Answer:
        """Return the answer with these chunks as memory. asked: tokens of the item. right: its label."""
        cache = self._fresh()
        if self._state:
            cache.restore(self._state)
        cache.set_memory([list(chunks)])
        logits = self._logits(cache, asked)
        likeliest = max(self._labels, key=lambda token: float(logits[token]))
        said = str(self._model.tokenizer.decode([int(logits.argmax())])).strip().lower()
        return Answer(self._labels[likeliest], bool(said) and right.lower().startswith(said))


def summed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return how many answers were right by task, context and way, and the mean over seeds with half its interval."""
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["shots"], row["way"]), []).append(row)
    found = []
    for (task, shots, way), own in groups.items():
        label, greedy = (Share(sum(row[name] for row in own), len(own)) for name in ("label", "greedy"))
        by_seed = [[row["label"] for row in own if row["seed"] == seed] for seed in sorted({r["seed"] for r in own})]
        seeds = interval_of_few(torch.tensor([sum(each) / len(each) for each in by_seed]))
        found.append(
            {"task": task, "shots": shots, "way": way, "label": label.document(), "greedy": greedy.document()}
            | {"seeds": len(by_seed), "mean": seeds.mean, "width": seeds.known_width}
        )
    return found


def differences(rows: Sequence[Mapping[str, Any]], drawn_anew: str) -> list[dict[str, Any]]:
    """Return how much more is right with a memory than without and than by a vote, paired by item.

    drawn_anew: the way whose memory is drawn anew for each item.
    """
    right: dict[tuple[str, int, str], dict[tuple[int, int], bool]] = {}
    for row in rows:
        right.setdefault((row["task"], row["shots"], row["way"]), {})[row["seed"], row["item"]] = row["label"]
    found = []
    for task, shots in dict.fromkeys((row["task"], row["shots"]) for row in rows):
        for more, less in ((drawn_anew, NOTHING), (ALL, NOTHING), (ALL, RANDOM), (ALL, VOTE)):
            first, second = right[task, shots, more], right[task, shots, less]
            paired = interval(torch.tensor([float(first[key]) - float(second[key]) for key in first]))
            found.append(
                {"task": task, "shots": shots, "of": more, "less": less, "mean": paired.mean}
                | {"width": paired.known_width}
            )
    return found
