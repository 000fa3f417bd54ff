"""A run of the evaluation `facts`: one text with facts in it is read once, and asked for at several distances.

The facts stand in the beginning of the text, up to the first distance. Whenever so many tokens were read as a distance
says, every fact is asked for in every way (asking.py), behind local texts of several lengths. While the text is read
the memory of the process is noted. In the end the chunks are written again to a bank that has no room for them, some of
the facts are asked for meanwhile, and what is left of the others is counted (under_pressure.py).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import xxhash

import kvbank
from model_worker.errors import InputError
from model_worker.evaluate.asking import WAYS, Asker, chat_is_possible, room_for_local
from model_worker.evaluate.banks import open_memory
from model_worker.evaluate.cost import Cost, counted
from model_worker.evaluate.interval import Share
from model_worker.evaluate.journal import Journal
from model_worker.evaluate.planting import PlantedText, plant
from model_worker.evaluate.resident import resident_bytes
from model_worker.evaluate.under_pressure import measure_pressure
from model_worker.evaluate.wordings import FORMS, worded_facts, wordings_named
from model_worker.model import MemoryModel
from model_worker.remember.memory import Memory
from model_worker.user_text import encode_text

FULL, FOUND = "full", "chunk found"
_READ = "read to its end"  # metadata of a bank
_FIRST_MARK = 8192  # tokens after which the memory of the process is noted first; then at each doubling
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is planted, and how it is asked for.

    tokens: distances, after which all facts are asked for. facts: of each wording. wording: names of wordings, or of
    groups. ask: forms of the question. local: tokens before the question, or `full` for as many as fit. stream: the
    questions belong to the stream that read the text. capacity: tokens of the bank under pressure, 0 to leave that out.
    seed: of names, numbers and places. Raises InputError for what is none of these.
    """

    tokens: tuple[int, ...]
    facts: int
    wording: tuple[str, ...]
    ask: tuple[str, ...]
    local: tuple[str, ...]
    stream: bool
    capacity: int
    seed: int

    def __post_init__(self) -> None:
        for form in self.ask:
            if form not in FORMS:
                raise InputError(f"ask {form!r} is not one of {', '.join(FORMS)}")
        for local in self.local:
            if local != FULL and not (local.isascii() and local.isdigit()):
                raise InputError(f"local {local!r} is neither a number of tokens nor {FULL!r}")
        for name in ("wording", "ask", "local"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise InputError(f"{name} {max(given, key=given.count)!r} is given twice")


class FactsRun:
    """A run over a bank of `model`, with filler out of a text.

    journal: what was asked before. progress: called with (stage, done, in all). stored: what decides, beside the text,
    what is stored of it, as plain values: a text that was read with the same is not read again. Raises InputError for
    a text or a distance that is too short, a local text or a capacity that does not fit, and for a chat with a model
    that has no template.
    """

    def __init__(
        self,
        model: MemoryModel,
        text: str,
        plan: Plan,
        journal: Journal,
        progress: Progress,
        stored: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.plan, self.journal, self.progress = model, plan, journal, progress
        self.cost = Cost()
        if "chat" in plan.ask and not chat_is_possible(model.tokenizer):
            raise InputError("the model has no chat template: its facts can only be completed")
        if 0 < plan.capacity < 2 * model.chunk:
            raise InputError(f"a capacity of {plan.capacity} tokens has no room for two chunks of {model.chunk}")
        self._wordings = wordings_named(plan.wording)
        facts = worded_facts(plan.seed, self._wordings, plan.facts)
        first, last = min(plan.tokens), max(plan.tokens)
        # What is in the window is not in the bank yet.
        within = max(0, first - model.window - 2 * model.chunk)
        self.planted: PlantedText = plant(model.tokenizer, text, facts, last, within, model.window, plan.seed)
        decides = json.dumps([self.planted.ids, stored, model.attachment.reader.digest], default=str)
        self.bank = f"facts-{xxhash.xxh3_64_hexdigest(decides.encode())}"
        for local in plan.local:
            for form in plan.ask:
                self._local_text(local, form)  # refuses one that does not fit, before the text is read
        self._rows: list[dict[str, Any]] = []
        self._resident: list[dict[str, int]] = []

    def report(self) -> dict[str, Any]:
        """Read, ask, and return all figures as plain values."""
        with counted(self.model.model, self.cost):
            self._read()
            pressure = self._pressure() if self.plan.capacity else None
        self.cost.stored = self.model.client.get_bank(self.bank).usage.bytes
        return {
            "answers": self._rows,
            "resident": self._resident,
            "pressure": pressure,
            "window": self.model.window,
            "cost": asdict(self.cost),
        }

    # -- reading --------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Read the text, note the memory of the process at each doubling, and ask at each distance."""
        distances, mark = sorted(set(self.plan.tokens)), _FIRST_MARK
        memory, client = open_memory(self.model, self.bank, count=False), self.model.client
        if client.get_bank(self.bank).metadata.get(_READ):
            for tokens in distances:
                self._ask_at(tokens)
            return
        if client.get_bank(self.bank).usage.chunks_written:  # an earlier run was interrupted
            client.delete_bank(self.bank)
            memory = open_memory(self.model, self.bank, count=False)

        def between(done: int, total: int) -> None:
            nonlocal mark
            self.progress("reading", done, total)
            while done >= mark:
                resident = resident_bytes()
                self._resident += [] if resident is None else [{"tokens": mark, "bytes": resident}]
                mark *= 2
            while distances and done >= distances[0]:
                self.model.settle()
                self._ask_at(distances.pop(0))

        self.model.read(self.planted.ids, between, memory=memory)
        client.update_bank(self.bank, metadata={_READ: True})

    def _ask_at(self, tokens: int) -> None:
        """Ask for every fact in every form behind every local text, where so many tokens have been read."""
        memory = open_memory(self.model, self.bank, count=False)
        memory.filter = kvbank.Filter(start_before=tokens)  # the bank may hold more, of an earlier run
        for local in self.plan.local:
            for form in self.plan.ask:
                key = f"{tokens} tokens, local {local}, {form}"
                counts = self.journal.get(key)
                if counts is None:
                    counts = self._counts(memory, tokens, local, form)
                    self.journal.put(key, counts)
                self._rows += [{"tokens": tokens, "local": local, "form": form, **row} for row in counts]

    def _counts(self, memory: Memory, tokens: int, local: str, form: str) -> list[dict[str, Any]]:
        """Return rows of counts by wording and way, those of all wordings last."""
        first = self.planted.ids[: self.model.sinks] if self.plan.stream else []
        asker = Asker(self.model, memory, self._local_text(local, form), tokens, first)
        shares: dict[tuple[str, str], Share] = {}
        for index, planted in enumerate(self.planted.facts):
            self.progress(f"{tokens:,} tokens, local {local}, {form}", index + 1, len(self.planted.facts))
            asked = asker.ask(planted.fact, planted.answer, form)
            results: dict[str, bool | None] = {**asked.right, FOUND: asked.found}
            for way, right in results.items():
                for wording in (planted.fact.wording, "all"):
                    if right is not None:
                        own = shares.get((wording, way), Share(0, 0))
                        shares[wording, way] = own + Share(int(right), 1)
        ordered = [(wording, way) for wording in (*self._wordings, "all") for way in (*WAYS, FOUND)]
        return [{"wording": key[0], "way": key[1], **shares[key].document()} for key in ordered if key in shares]

    def _local_text(self, local: str, form: str) -> list[int]:
        """Return the tokens of a local text, which fits into the window with the longest question.

        Raises InputError for one that does not.
        """
        tokenizer = self.model.tokenizer
        longest = max(
            (
                encode_text(tokenizer, f"\n{own.fact.beginning} {own.fact.asked('question')}")
                for own in self.planted.facts
            ),
            key=len,
        )
        room = room_for_local(self.model, longest, form)
        if local != FULL and int(local) > room:
            raise InputError(f"{local} local tokens do not fit before a question: at most {room} do")
        return self.planted.filler[: room if local == FULL else int(local)]

    def _pressure(self) -> dict[str, Any]:
        return measure_pressure(
            self.model,
            self.planted,
            self.bank,
            kvbank.Capacity(tokens=self.plan.capacity),
            partial(self.progress, "under pressure"),
        )
