"""The trace of an answer says why it was given: what was recalled for it, and how much attention each part received.

Attention mass is the softmax weight that a layer's queries give to the keys of one part, mean over the query heads and
over tokens. A mass has one number for each layer of `Trace.layers`. In each of these layers the masses of all chunks,
of the window and of the sinks sum to 1. Attention is no proof of a cause: it tells that a chunk was read, and only an
answer without the chunk tells what hangs on it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from model_worker.window.trace_table import age, counted, lines_of, origin

Mass = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TracedChunk:
    """A chunk that stood before the window while the answer was written, or while its prompt was read.

    chunk_id, bank: of the chunk; 0 and empty where a chunk came from the window itself (one of the recent ones), and no
    bank has named it. start: offset of the chunk's first token in its source; -1 where it is not known. tokens: how
    many tokens the chunk was made of; 0 where that is not known. text: of the chunk. metadata: what was noted with the
    chunk, such as its source, turn and role. created: when the bank stored the chunk; None where no bank has named it.
    retrievals: how often the bank had counted the chunk as retrieved before; None likewise. score: the best that a
    query gave it; None for a chunk that was not searched for. steps: places in `Trace.steps` at which the chunk stood
    there. mass: what it received from the answer.
    """

    chunk_id: int
    bank: str
    start: int
    tokens: int
    text: str
    metadata: Mapping[str, str | int | float | bool]
    created: datetime | None
    retrievals: int | None
    score: float | None
    steps: tuple[int, ...]
    mass: Mass

    @property
    def share(self) -> float:
        """Return the mean of the chunk's mass over the layers, from 0 to 1."""
        return share(self.mass)

    @property
    def total(self) -> float:
        """Return the sum of the chunk's mass over the layers."""
        return sum(self.mass)


@dataclass(frozen=True, slots=True)
class StepChunk:
    """A chunk in one step.

    chunk: its place in `Trace.chunks`. score: what the step's query gave it; None for one that was not searched for.
    recent: whether it stood there as one of the last chunks that left the window. mass: mean over the step's tokens.
    """

    chunk: int
    score: float | None
    recent: bool
    mass: Mass


@dataclass(frozen=True, slots=True)
class Step:
    """A run of tokens that attended to the same chunks.

    kind: `prompt` (tokens were read) or `answer` (they were written). query, query_ids: the text and the token ids by
    which the chunks were asked for; empty where nothing had been asked for yet. answered: whether the memory answered;
    where it did not, the chunks are those of before; None where nothing was asked. begin: how many tokens had come in
    since the trace began. tokens: how many came in now. chunks: in the order of attention, the nearest to the window
    last. window, sinks: their masses.
    """

    kind: str
    query: str
    query_ids: tuple[int, ...]
    answered: bool | None
    begin: int
    tokens: int
    chunks: tuple[StepChunk, ...]
    window: Mass
    sinks: Mass


@dataclass(frozen=True, slots=True)
class Trace:
    """What an answer attended to.

    layers: those that may attend to memory, counted from 0; the others attend to window and sinks alone. steps: in the
    order of time. chunks: those of all steps, the one with the most mass first. window, sinks: the masses that local
    tokens and the first tokens of the stream received, the latter with what a model gives to sinks that are parameters.
    tokens: how many tokens the masses of the trace and of its chunks are means over: the prompt's last token, which
    says the first of the answer, and those of the answer that were fed. offset: of the answer's first token in its
    source, so that a chunk of the same source ended `offset - start - tokens` tokens before it. time: when the trace
    was made, in UTC.
    """

    layers: tuple[int, ...]
    steps: tuple[Step, ...]
    chunks: tuple[TracedChunk, ...]
    window: Mass
    sinks: Mass
    tokens: int
    offset: int
    time: datetime

    def to_json(self) -> dict[str, Any]:
        """Return the trace as values that JSON has: fields by name, times in ISO 8601; chunks have share and total."""
        document = asdict(self)
        document["time"] = self.time.isoformat()
        for made, chunk in zip(document["chunks"], self.chunks, strict=True):
            made |= {"metadata": dict(chunk.metadata), "share": chunk.share, "total": chunk.total}
            made["created"] = None if chunk.created is None else chunk.created.isoformat()
        return document

    def table(self, chunks: int = 10, width: int = 100) -> str:
        """Return a text of lines at most `width` characters wide: the best `chunks`, and below them all the rest."""
        rows = [
            (
                f"{chunk.share:.1%}",
                "-" if chunk.score is None else f"{chunk.score:.2f}",
                origin(chunk.metadata, chunk.start),
                age(chunk.created, self.time),
                chunk.text,
            )
            for chunk in self.chunks[:chunks]
        ]
        return lines_of(rows, [self._rest(chunks), *self._asked()], width)

    def _rest(self, shown: int) -> str:
        """Say where the mass went that the first `shown` chunks did not receive, and what it is a mean over."""
        others = self.chunks[shown:]
        parts = [f"{counted(len(others), 'more chunk')} {sum(c.share for c in others):.1%}"] if others else []
        parts += [f"window {share(self.window):.1%}", f"sinks {share(self.sinks):.1%}"]
        none = "" if self.chunks else "no chunk was attended to: "
        over = f"mean over {counted(self.tokens, 'token')} and {counted(len(self.layers), 'layer')}"
        return f"{none}{', '.join(parts)}; {over}"

    def _asked(self) -> list[str]:
        """Say what was asked for, each query once."""
        lines = [f"asked for: {query}" for query in dict.fromkeys(step.query for step in self.steps if step.query)]
        if any(step.answered is False for step in self.steps):
            lines.append("a recall was not answered; what had been recalled before was attended to")
        return lines


def share(mass: Mass) -> float:
    """Return the mean of a mass over the layers; 0 without layers."""
    return sum(mass) / len(mass) if mass else 0.0
