"""A conversation of the evaluation `chat` is asked for its facts, in several ways that share all that was said before.

Each way asks all questions one after the other, a turn each, in a session of its own (`kvbank chat` has the same):

* `told`: the session as it is; after a restart of everything, where the run is to have one.
* `whole context`: a fork whose window holds the whole conversation, where the model was trained for that length.
* `no memory`: a fork of the same window, into which nothing is recalled.

Beside these stands what must be right for a fact to be told: `whole` says that its statement stands whole in a chunk,
`found` that the chunk with its answer is among those found for the question, `empty window` that it is told from the
same bank where the question alone stands in a new stream.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import kvbank
from model_worker.evaluate.asking import MEMORY, Asker
from model_worker.evaluate.banks import open_memory
from model_worker.evaluate.chat_plan import Script
from model_worker.evaluate.wordings import WordedFact
from model_worker.model import MemoryModel
from model_worker.session.answer import decoded
from model_worker.session.opening import SessionOptions
from model_worker.session.preset import SessionPreset
from model_worker.session.session import Session
from model_worker.user_text import encode_text

TOLD, CONTEXT, NOTHING = "told", "whole context", "no memory"
WHOLE, FOUND, EMPTY = "whole", "found", "empty window"
WAYS = (TOLD, CONTEXT, NOTHING, WHOLE, FOUND, EMPTY)
# No score is that high: a session that asks for it recalls nothing, and does all else as ever.
_NOTHING_PASSES = 1e6
_AROUND = 16  # tokens that a format may put around a question
Progress = Callable[[int, int], None]


def converse(
    model: MemoryModel,
    name: str,
    texts: Sequence[str],
    answer: int,
    progress: Progress = lambda done, total: None,
    window: int | None = None,
    **options: Unpack[SessionOptions],
) -> None:
    """Say texts in the session of a name, a turn each; a new name begins a session.

    answer: tokens of the longest answer. progress: called with (turns done, turns in all). window, options: of
    `Session.open`.
    """
    with Session.open(model, name=name, window=window, **options) as session:
        for index, text in enumerate(texts):
            session.say(text, max_new_tokens=answer)
            progress(index + 1, len(texts))


@dataclass(frozen=True, slots=True)
class Interview:
    """Asks one conversation for its facts.

    name: of its session, in which the facts were told first, a turn each. said: what is told and asked. preset: of the
    sessions. answer: tokens of the longest answer. elsewhere: asks the session of a name these questions in a new
    process, after a restart; None asks in this one.
    """

    model: MemoryModel
    name: str
    said: Script
    preset: SessionPreset
    answer: int
    progress: Callable[[str, int, int], None]
    elsewhere: Callable[[str, Sequence[str]], None] | None = None

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each fact: its wording, and what was right by way; None where a way cannot be."""
        session = self.model.client.sessions.get(name=self.name)
        turns = turns_of(self.model.client, self.name)
        ids = [token for turn in turns for token in turn.token_ids]
        parts = self._parts(session, turns, ids[: int(session.settings.get("sinks", 0))])
        whole = self._whole_window(ids)
        told: dict[str, list[str] | None] = {
            NOTHING: self._in_fork(NOTHING, self.preset.window, min_score=_NOTHING_PASSES, recent=0),
            CONTEXT: None if whole is None else self._in_fork(CONTEXT, whole, recent=0),
            TOLD: self._in_session(),
        }
        return [
            {
                "wording": fact.wording,
                **{way: None if own is None else fact.answered(own[at], self.said.form) for way, own in told.items()},
                **parts[at],
            }
            for at, fact in enumerate(self.said.asked)
        ]

    def _in_session(self) -> list[str]:
        questions = self.said.questions
        if self.elsewhere is None:
            self._converse(self.name, TOLD, self.preset.window, **self.preset.memory)
        else:
            self.progress("after a restart", 0, 1)
            self.elsewhere(self.name, questions)
            self.progress("after a restart", 1, 1)
        return self._answers(self.name)

    def _in_fork(self, way: str, window: int | None = None, **options: Unpack[SessionOptions]) -> list[str]:
        """Ask in a fork, which goes on from what was said before the questions; return the answers."""
        name = f"{self.name}-{way.replace(' ', '-')}"
        client = self.model.client
        client.sessions.fork(client.sessions.get(name=self.name).session_id, name=name)
        self._converse(name, way, window, **options)
        return self._answers(name)

    def _converse(self, name: str, way: str, window: int | None = None, **options: Unpack[SessionOptions]) -> None:
        def told(done: int, total: int) -> None:
            self.progress(f"asking, {way}", done, total)

        converse(self.model, name, self.said.questions, self.answer, told, window, **options)

    def _answers(self, name: str) -> list[str]:
        """Return the answers to the questions, which were said last in the session of a name."""
        turns = [turn for turn in turns_of(self.model.client, name) if turn.status != "part"]
        return [turn.text("assistant") for turn in turns[-len(self.said.asked) :]]

    def _whole_window(self, ids: Sequence[int]) -> int | None:
        """Return a window that holds the whole conversation with the questions; None where the model knows none."""
        asked = [encode_text(self.model.tokenizer, question) for question in self.said.questions]
        needed = len(ids) + sum(len(own) + _AROUND + self.answer for own in asked)
        trained = self.model.attachment.trained_length
        return needed if trained is None or needed < trained else None

    def _parts(
        self, session: kvbank.Session, turns: Sequence[kvbank.Turn], first: Sequence[int]
    ) -> list[dict[str, Any]]:
        """Return what must be right for each fact to be told, in the order of the questions.

        turns: of the session. first: tokens of the conversation that stay as its sinks.
        """
        model, places, begin = self.model, {}, 0
        for fact, turn in zip(self.said.facts, turns, strict=False):
            places[fact] = begin + _answer_in(model.tokenizer, fact, turn.token_ids)
            begin += turn.token_count
        texts = [chunk.text for chunk in model.client.list_chunks(session.bank, filter=session.filter)]
        memory = open_memory(model, session.bank, count=False)
        memory.filter = session.filter  # forks, in which questions were asked, share the bank
        asker = Asker(model, memory, [], session.tokens, first)
        rows = []
        for at, fact in enumerate(self.said.asked):
            asked = asker.ask(fact, places[fact], self.said.form, [MEMORY])
            whole = any(fact.statement in text for text in texts)
            rows.append({WHOLE: whole, FOUND: asked.found, EMPTY: asked.right[MEMORY]})
            self.progress("asking in an empty window", at + 1, len(self.said.asked))
        return rows


def turns_of(client: kvbank.Client, name: str) -> list[kvbank.Turn]:
    """Return the turns of the session of a name, with their token ids."""
    return list(client.sessions.turns(client.sessions.get(name=name).session_id, token_ids=True))


def _answer_in(tokenizer: Any, fact: WordedFact, ids: Sequence[int]) -> int:
    """Return the place of the last token of a fact's answer among the tokens of the turn that states it."""
    told = fact.statement[:-1]
    return next((at for at in range(len(ids)) if told in decoded(tokenizer, ids[: at + 1])), len(ids) - 1)
