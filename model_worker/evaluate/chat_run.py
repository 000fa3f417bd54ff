"""A run of the evaluation `chat`: facts are told early in a conversation, and asked for many turns later.

Every turn is one of a `Session` over a real service. What is said behind a place where the facts were asked for is said
in a fork of the conversation, so that no question of one place is in the memory of the next.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from model_worker.errors import InputError
from model_worker.evaluate.asking import chat_is_possible
from model_worker.evaluate.banks import forget
from model_worker.evaluate.chat_asking import TOLD, WAYS, Interview, converse
from model_worker.evaluate.chat_plan import Plan, script
from model_worker.evaluate.cost import Cost, counted
from model_worker.evaluate.interval import Share
from model_worker.evaluate.journal import Journal
from model_worker.model import MemoryModel
from model_worker.session.preset import SessionPreset

Progress = Callable[[str, int, int], None]
# Asks the session of a name these questions in a new process, after a restart of everything; returns tokens fed there.
Elsewhere = Callable[[str, Sequence[str]], int]


@dataclass
class ChatRun:
    """A run of conversations with `model`.

    sentences: what is said behind the facts. preset: of the sessions. journal: what was measured before. progress:
    called with (stage, done, in all). elsewhere: asks after a restart of everything; None asks in this process. Raises
    InputError where a chat template is needed and missing.
    """

    model: MemoryModel
    sentences: Sequence[str]
    plan: Plan
    preset: SessionPreset
    journal: Journal
    progress: Progress
    elsewhere: Elsewhere | None = None
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        if self.plan.ask == "chat" and not chat_is_possible(self.model.tokenizer):
            raise InputError("the model has no chat template: its facts can only be completed")

    def report(self) -> dict[str, Any]:
        """Hold all conversations, and return all figures as plain values."""
        parts = {seed: self._part(seed) for seed in self.plan.seeds}
        return {
            "answers": counts([row for part in parts.values() for row in part["rows"]]),
            "conversations": [row for seed, part in parts.items() for row in _told(seed, part)],
            "window": self.preset.window or self.model.window,
            "chunk": self.model.chunk,
            "form": self.plan.ask,
            "restarted": self.elsewhere is not None,
            "load": os.getloadavg()[0],
            "cost": asdict(self.cost),
        }

    def _part(self, seed: int) -> dict[str, Any]:
        """Return the figures of a conversation, which is held where the journal does not have it."""
        key = f"conversation {seed}"
        part: dict[str, Any] | None = self.journal.get(key)
        if part is None:
            own = Cost()
            with counted(self.model.model, own):
                part = self._held(seed, own)
            own.stored = self._forgotten(seed)
            part["cost"] = asdict(own)
            self.journal.put(key, part)
        self.cost.add(part["cost"])
        return part

    def _held(self, seed: int, cost: Cost) -> dict[str, Any]:
        """Hold a conversation, and ask at each place; return a row for each question, and tokens by place."""
        said, places = script(self.sentences, self.plan, seed), self.plan.places
        texts = [*(fact.statement for fact in said.facts), *said.others]
        name, done, rows, tokens = f"chat-{seed}", 0, list[dict[str, Any]](), dict[str, int]()
        for place in places:
            until, answer = len(said.facts) + place, self.plan.answer
            stage = f"conversation {seed}, up to turn {place}"
            say = partial(converse, self.model, window=self.preset.window, **self.preset.memory)
            say(name, texts[done:until], answer, partial(self.progress, stage))
            session = self.model.client.sessions.get(name=name)
            tokens[str(place)] = session.tokens
            behind = f"chat-{seed}-behind-{place}"
            if place != places[-1]:
                self.model.client.sessions.fork(session.session_id, name=behind)
            interview = Interview(
                self.model, name, said, self.preset, answer, self._below(stage), self._elsewhere(cost)
            )
            rows += [{"turns": place, **row} for row in interview.rows()]
            name, done = behind, until
        return {"rows": rows, "tokens": tokens}

    def _forgotten(self, seed: int) -> int:
        """Delete the sessions of a conversation with their bank; return the bytes that the bank took."""
        client, own = self.model.client, f"chat-{seed}"
        sessions = [each for each in client.sessions.list() if each.name == own or each.name.startswith(f"{own}-")]
        stored = forget(client, {each.bank for each in sessions})
        for each in sessions:
            client.sessions.forget(each.session_id)
        return stored

    def _below(self, stage: str) -> Progress:
        return lambda name, done, total: self.progress(f"{stage}, {name}", done, total)

    def _elsewhere(self, cost: Cost) -> Callable[[str, Sequence[str]], None] | None:
        """Return what asks after a restart, and adds the tokens that were fed there to a cost."""
        elsewhere = self.elsewhere
        if elsewhere is None:
            return None

        def asked(name: str, questions: Sequence[str]) -> None:
            cost.tokens += elsewhere(name, questions)

        return asked


def counts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return how many answers were right by turns, wording and way, those of all wordings last; rows: of answers."""
    found: dict[tuple[int, str, str], Share] = {}
    for row in rows:
        for way in WAYS:
            for wording in (row["wording"], "all"):
                if row[way] is not None:
                    key = (row["turns"], wording, way)
                    found[key] = found.get(key, Share(0, 0)) + Share(int(row[way]), 1)
    turns = list(dict.fromkeys(row["turns"] for row in rows))
    wordings = [*dict.fromkeys(row["wording"] for row in rows), "all"]
    return [
        {"turns": place, "wording": wording, "way": way, **found[place, wording, way].document()}
        for place in turns
        for wording in wordings
        for way in WAYS
        if (place, wording, way) in found
    ]


def _told(seed: int, part: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return how many facts a conversation told by place, and how many tokens it had."""
    return [
        {"seed": seed, "turns": int(place), "tokens": tokens, "told": own["right"], "asked": own["asked"]}
        for place, tokens in part["tokens"].items()
        for own in counts([row for row in part["rows"] if row["turns"] == int(place)])
        if own["wording"] == "all" and own["way"] == TOLD
    ]
