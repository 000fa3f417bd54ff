"""Why an answer came, as it is kept with its turn: what was recalled, by which queries, and how it was attended to.

Attention mass is the softmax weight that a layer's queries give to the keys of one part, mean over heads and tokens; a
mass has one number for each of `AnswerTrace.layers`. No text of a chunk is kept here, so that what is deleted from a
bank is not shown any more. Nothing here does I/O.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, Self

# The key in the metadata of a turn.
TRACE = "trace"
Mass = tuple[float, ...]
_DIGITS = 5


@dataclass(frozen=True, slots=True)
class AnswerStep:
    """A run of tokens that attended to the same chunks.

    kind: "prompt" (tokens were read) or "answer" (they were written). query: the text by which the chunks were asked
    for; "" where nothing was. answered: whether the memory answered; where it did not, the chunks are those of before.
    begin: tokens of the turn before it. tokens: of the run.
    """

    kind: str
    query: str
    answered: bool
    begin: int
    tokens: int


@dataclass(frozen=True, slots=True)
class AnswerChunk:
    """A chunk that the answer attended to.

    bank, chunk_id: of the chunk; "" and 0 for one that came from the window before its bank had named it. start: offset
    of its first token in its source; -1 where it is not known. tokens: how many it was made of. score: the best that a
    query gave it; None for one that was not searched for, but was among the last that left the window. steps: places in
    `AnswerTrace.steps` at which it stood there, first the one whose query gave that score. mass: what it received from
    the answer.
    """

    bank: str
    chunk_id: int
    start: int
    tokens: int
    score: float | None
    steps: tuple[int, ...]
    mass: Mass

    @property
    def share(self) -> float:
        """Return the mean of the mass over the layers, from 0 to 1."""
        return share(self.mass)

    @property
    def total(self) -> float:
        """Return the sum of the mass over the layers."""
        return sum(self.mass)


@dataclass(frozen=True, slots=True)
class AnswerTrace:
    """Why an answer came; `Turn.trace` is one.

    layers: those that may attend to memory, counted from 0. steps: in the order of time, those of the chunks that are
    kept. chunks: those with the most mass, the heaviest first. left_out: how many others there were; rest: their mass.
    window, sinks: what local tokens and the first tokens of the session received. tokens: over how many the masses are
    means. In each layer the masses of chunks, rest, window and sinks sum to 1.
    """

    layers: tuple[int, ...]
    steps: tuple[AnswerStep, ...]
    chunks: tuple[AnswerChunk, ...]
    left_out: int
    rest: Mass
    window: Mass
    sinks: Mass
    tokens: int

    @property
    def metadata(self) -> dict[str, str]:
        """Return the metadata of a turn that keep the trace."""
        return {TRACE: self.to_json()}

    def to_json(self) -> str:
        """Return the trace as a text for the metadata of its turn, with masses and scores of five decimals."""
        document = asdict(self)
        for part in (document, *document["chunks"]):
            rounded = {
                name: _rounded(part[name]) for name in ("rest", "window", "sinks", "mass", "score") if name in part
            }
            part.update(rounded)
        return json.dumps(document, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def of_json(cls, text: str) -> Self | None:
        """Return the trace that a text has; None for a text that is no trace, which any writer can keep there."""
        try:
            read = json.loads(text, parse_constant=_refuse)
            return cls(
                layers=tuple(map(int, read["layers"])),
                steps=tuple(map(_step, read["steps"])),
                chunks=tuple(_chunk(each, len(read["steps"])) for each in read["chunks"]),
                left_out=int(read["left_out"]),
                **{name: _mass(read[name]) for name in ("rest", "window", "sinks")},
                tokens=int(read["tokens"]),
            )
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return None


def share(mass: Mass) -> float:
    """Return the mean of a mass over the layers; 0 without layers."""
    return sum(mass) / len(mass) if mass else 0.0


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [round(each, _DIGITS) for each in value]
    return None if value is None else round(value, _DIGITS)


def _step(read: Any) -> AnswerStep:
    texts, whole = (str(read["kind"]), str(read["query"])), (int(read["begin"]), int(read["tokens"]))
    return AnswerStep(*texts, bool(read["answered"]), *whole)


def _chunk(read: Any, steps: int) -> AnswerChunk:
    """Return a chunk of a trace with so many steps. Raises ValueError for one of a step that is not there."""
    places = tuple(map(int, read["steps"]))
    if not all(0 <= place < steps for place in places):
        raise ValueError("there is no such step")
    score = None if read["score"] is None else float(read["score"])
    chunk_id, start, tokens = (int(read[name]) for name in ("chunk_id", "start", "tokens"))
    return AnswerChunk(str(read["bank"]), chunk_id, start, tokens, score, places, _mass(read["mass"]))


def _mass(read: Any) -> Mass:
    return tuple(map(float, read))


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of a trace")
