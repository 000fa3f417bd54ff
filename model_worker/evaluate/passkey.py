"""A passkey is a fact in the middle of a long text that is asked for at the end; here it is measured who still tells
it.

The text is filler with one statement of `evaluate.facts` in it, at evenly spread depths; or, with `noise`, the task of
HOMER's paper: a few sentences over and over, with the statement and its repetition in one place. An answer counts when
greedy decoding says the number to the last digit and no digit more. The same prompt, of multiples of the trained
length, is read in several ways:

* `plain, all tokens`: one forward at positions the model was not trained for.
* `plain, last tokens`: the most recent tokens that fit into the trained length.
* `homer, paper` and `homer, balanced`: whole prompts as published, calibrated or not.
* `homer, balanced, tuned`: with the deviations of `compress_prompt` that are asked for (merges, pool, again).

Each answer is noted in a journal as it comes, since one may take minutes.
"""

import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import cycle, islice
from typing import Any

from transformers import DynamicCache

from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.errors import InputError
from model_worker.evaluate.facts import Fact, make_facts
from model_worker.evaluate.greedy import answer
from model_worker.evaluate.interval import Share
from model_worker.evaluate.journal import Journal
from model_worker.homer.bias import NONE, Bias
from model_worker.homer.calibrate import calibrate
from model_worker.homer.prompt import compress_prompt
from model_worker.user_text import encode_text, readable

_ANSWER = 8  # new tokens
_SEGMENTS = 40  # of a calibration, at most
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Tuning:
    """Parameters of `compress_prompt` for the tuned way; `size` counts for all ways of HOMER.

    Raises InputError for an even pool.
    """

    size: int | None = None
    leaf: int | None = None
    warmup: int | None = None
    merges: int | None = None
    pool: int = 1
    again: bool = False

    def __post_init__(self) -> None:
        if self.pool < 1 or self.pool % 2 == 0:
            raise InputError(f"pool={self.pool} has to be an odd number")


@dataclass(frozen=True, slots=True)
class _Form:
    """What a prompt says beside its filler: templates with {name} and {number}."""

    instruction: str
    statement: str
    question: str


_PLAIN = _Form("", " The number of {name} is {number}.", " The number of {name} is")
# As in the task that HOMER's paper has (Mohtashami and Jaggi, arXiv 2305.16300), in other words.
_NOISY = _Form(
    "There is an important number in a lot of text. Find it and remember it.",
    " The number of {name} is {number}. Remember it. {number} is the number of {name}.",
    " What is the number of {name}? The number of {name} is",
)
_NOISE = " The sun is warm. The river is wide. The hills are far away. We walk on. Then we walk back."


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked, and by which ways.

    lengths: of prompts, in tokens. samples: prompts of each length. trained: tokens that count as the length that the
    model was trained for; None takes the model's own. ways: their names, or beginnings of several; all without any.
    noise: the filler is a few sentences over and over, an instruction stands in front, and the fact is said twice.
    """

    lengths: Sequence[int]
    samples: int = 20
    seed: int = 0
    tuning: Tuning = field(default_factory=Tuning)
    trained: int | None = None
    ways: Sequence[str] = ()
    noise: bool = False


@dataclass(frozen=True, slots=True)
class Score:
    """The numbers told of those asked for, by one way at one length in tokens; or why the length cannot be read so.

    seconds: of an answer, mean over those that were given.
    """

    way: str
    length: int
    told: Share
    seconds: float | None
    refused: str | None = None

    def document(self) -> dict[str, Any]:
        """Return the score as plain values."""
        found = {"way": self.way, "length": self.length, **self.told.document()}
        return {**found, "seconds": self.seconds, "refused": self.refused}


@dataclass(frozen=True, slots=True)
class _Prompt:
    """One prompt in token ids, and the fact that it asks for.

    prefix: BOS, where the tokenizer has one. context: filler with the statement, whose place is `depth` between 0 and
    1. suffix: the question.
    """

    prefix: list[int]
    context: list[int]
    suffix: list[int]
    fact: Fact
    depth: float

    @property
    def ids(self) -> list[int]:
        return self.prefix + self.context + self.suffix


def measure_passkeys(
    model: Any,
    tokenizer: Any,
    filler: str,
    plan: Plan,
    journal: Journal | None = None,
    progress: Progress = lambda *_: None,
) -> list[Score]:
    """Measure every way at every length. filler: text of which each prompt takes a part of its own.

    journal: answers of an earlier run, which are not asked for again. progress: called with (stage, done, in all).
    Raises InputError for filler that is too short, for a length without room for a statement and its question, and for
    a way that is not there.
    """
    attachment = attach(model, tokenizer, mode="per_layer")
    try:
        return _Run(attachment, filler, plan, journal or Journal(None, {}), progress).scores()
    finally:
        attachment.detach()


class _Run:
    """One run over an attached model."""

    def __init__(self, attachment: Attachment, filler: str, plan: Plan, journal: Journal, progress: Progress) -> None:
        self.attachment, self.plan, self.journal, self.progress = attachment, plan, journal, progress
        self.tokenizer: Any = attachment.tokenizer
        ids = encode_text(self.tokenizer, readable(filler))
        first = len(ids) // 4
        self._calibrating, self._filler = ids[:first], ids[first:]
        if plan.noise:
            noise = encode_text(self.tokenizer, _NOISE)
            self._filler = noise
        elif len(self._filler) < max(plan.lengths) + plan.samples:
            raise InputError(f"{len(ids)} tokens of filler are too few for prompts of {max(plan.lengths)}")
        self.trained = plan.trained or attachment.trained_length or 4096
        every = self._ways()
        meant = {way: [way] if way in every else [name for name in every if name.startswith(way)] for way in plan.ways}
        if unknown := [way for way, names in meant.items() if not names]:
            raise InputError(f"there is no way {unknown[0]!r}; there are: {'; '.join(every)}")
        chosen = {name for names in meant.values() for name in names} or every.keys()
        self.ways = {name: way for name, way in every.items() if name in chosen}

    def scores(self) -> list[Score]:
        """Ask in every way at every length what the journal does not know, and return the scores."""
        lengths = list(dict.fromkeys(self.plan.lengths))
        asked = len(lengths) * self.plan.samples * len(self.ways)
        done, found = 0, []
        for length in lengths:
            parts: dict[str, list[Mapping[str, Any]]] = {way: [] for way in self.ways}
            prompts = _prompts(self.tokenizer, self._filler, length, self.plan)
            for index, prompt in enumerate(prompts, start=1):
                for way, own in parts.items():
                    self.progress("answers", done, asked)
                    done += 1
                    if not own or "refused" not in own[-1]:
                        own.append(self._noted(f"{length} tokens, prompt {index}, {way}", way, prompt))
            found += [self._score(way, length, own) for way, own in parts.items()]
        self.progress("answers", asked, asked)
        return found

    def _noted(self, key: str, way: str, prompt: "_Prompt") -> Mapping[str, Any]:
        """Return what the journal says of an answer; where it says nothing, ask and note."""
        part: Mapping[str, Any] | None = self.journal.get(key)
        if part is None:
            try:
                if way.endswith("calibrated"):
                    _ = self._table  # made before the time is taken
                began = time.perf_counter()
                text = str(self.tokenizer.decode(self.ways[way](prompt)))
                told = {"answer": text, "number": prompt.fact.number, "told": tells(text, prompt.fact.number)}
                part = {**told, "depth": prompt.depth, "seconds": time.perf_counter() - began}
            except InputError as error:
                part = {"refused": str(error)}
            self.journal.put(key, part)
        return part

    def _score(self, way: str, length: int, parts: Sequence[Mapping[str, Any]]) -> Score:
        if refused := next((part["refused"] for part in parts if "refused" in part), None):
            return Score(way, length, Share(0, self.plan.samples), None, refused)
        seconds = sum(part["seconds"] for part in parts) / len(parts)
        return Score(way, length, Share(sum(part["told"] for part in parts), len(parts)), seconds)

    # -- ways -------------------------------------------------------------------------------------------------------

    def _ways(self) -> dict[str, "_Way"]:
        """Return what each way does with a prompt, by name."""
        ways: dict[str, _Way] = {
            "plain, all tokens": lambda prompt: self._plain(prompt.ids),
            "plain, last tokens": self._last,
        }
        for mode in ("paper", "balanced"):
            ways[f"homer, {mode}"] = self._homer(mode)
            ways[f"homer, {mode}, calibrated"] = self._homer(mode, calibrated=True)
        tuning = self.plan.tuning
        own = {name: value for name, value in asdict(tuning).items() if name != "size"}
        if tuning != Tuning(tuning.size):
            ways["homer, balanced, tuned"] = self._homer("balanced", **own)
            ways["homer, balanced, tuned, calibrated"] = self._homer("balanced", calibrated=True, **own)
            ways["the same, not asked again"] = self._homer("balanced", **{**own, "again": False})
        return ways

    def _plain(self, ids: Sequence[int]) -> list[int]:
        return answer(self.attachment.model, DynamicCache(), ids, _ANSWER, 0)

    def _last(self, prompt: "_Prompt") -> list[int]:
        room = self.trained - _ANSWER - len(prompt.prefix) - len(prompt.suffix)
        if room < 1:
            raise InputError(f"{self.trained} tokens have no room for text beside the question and its answer")
        return self._plain(prompt.prefix + prompt.context[-room:] + prompt.suffix)

    def _homer(self, mode: str, *, calibrated: bool = False, **more: Any) -> "_Way":
        size = self.plan.tuning.size or max(1, self.trained // 2)

        def told(prompt: _Prompt) -> list[int]:
            parts = prompt.prefix, prompt.context, prompt.suffix
            bias = self._table if calibrated else NONE
            made = compress_prompt(self.attachment, *parts, size=size, mode=mode, bias=bias, **more)
            return made.generate(_ANSWER, do_sample=False)

        return told

    @cached_property
    def _table(self) -> Bias:
        """Return a table that is calibrated on the first quarter of the filler, which no prompt has a part of."""
        distances = min(self.trained // 2, max(16, len(self._calibrating) // 4))

        def tell(done: int, total: int) -> None:
            self.progress("calibrating", done, total)

        found = calibrate(self.attachment, self._calibrating, distances=distances, segments=_SEGMENTS, progress=tell)
        return Bias(found.table, "calibrated")


def tells(answer: str, number: str) -> bool:
    """Return whether an answer begins with the number, to its last digit and with none behind it."""
    return re.match(rf"\s*{number}(?!\d)", answer) is not None


_Way = Callable[[_Prompt], list[int]]


def _prompts(tokenizer: Any, filler: list[int], length: int, plan: Plan) -> Iterator[_Prompt]:
    """Yield prompts of exactly `length` tokens, the statement at depth 0 to 1 in even steps.

    filler: what each prompt takes a part of; where it is noise it is repeated. The same arguments give the same
    prompts, whatever other lengths are asked for.
    """
    draw = random.Random(f"passkeys:{plan.seed}:{length}")
    form = _NOISY if plan.noise else _PLAIN
    filler = list(islice(cycle(filler), length + len(filler))) if plan.noise else filler

    def encode(template: str, fact: Fact) -> list[int]:
        written = template.format(name=fact.name, number=fact.number)
        return list(tokenizer.encode(written, add_special_tokens=False)) if written else []

    first = [tokenizer.bos_token_id] if getattr(tokenizer, "bos_token_id", None) is not None else []
    for index, fact in enumerate(make_facts(plan.seed, plan.samples)):
        parts = (form.instruction, form.statement, form.question)
        instruction, statement, suffix = (encode(template, fact) for template in parts)
        prefix = first + instruction
        room = length - len(prefix) - len(statement) - len(suffix)
        if room < 1:
            raise InputError(f"a prompt of {length} tokens has no room for text beside statement and question")
        begin = draw.randrange(len(filler) - room + 1)
        depth = (index + 0.5) / plan.samples
        text, at = filler[begin : begin + room], round(room * depth)
        yield _Prompt(prefix, text[:at] + statement + text[at:], suffix, fact, depth)
