"""The runs of tokens that a recorder noted become a trace here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import torch
from torch import Tensor

from model_worker.window.recalled import Attended
from model_worker.window.trace import Mass, Step, StepChunk, Trace, TracedChunk

# Places of a mass while it is summed; behind them stand the chunks, in the order of attention.
SINKS, WINDOW, CHUNKS = 0, 1, 2
Key = int | tuple[int, tuple[int, ...]]  # a chunk's id, or its passage where no bank has named it


@dataclass(slots=True)
class Run:
    """A run of tokens that attend to the same chunks.

    prompt: whether they are read and not written. query, answered: of the recall before them. listed: the chunks of all
    rows, the very object that the window holds. begin, tokens: how many tokens came in before the run, and in it. sums,
    last: by layer, the masses of sinks, window and chunks, `[2 + n]`, summed over the tokens that were looked at, and
    of the last of these. counts: by layer, how many these were.
    """

    prompt: bool
    query: tuple[int, ...]
    answered: bool | None
    listed: list[list[Attended]]
    begin: int
    tokens: int = 0
    sums: dict[int, Tensor] = field(default_factory=dict)
    last: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    @property
    def chunks(self) -> list[Attended]:
        """Return the chunks of the only row."""
        return self.listed[0] if self.listed else []

    @property
    def seen(self) -> int:
        """Return how many tokens were looked at."""
        return max(self.counts.values(), default=0)

    def note(self, layer: int, rows: Tensor) -> None:
        """Add the masses of some tokens in one layer, `[tokens, 2 + n]`."""
        if len(rows):
            self.counts[layer] = self.counts.get(layer, 0) + len(rows)
            before = self.sums.get(layer)
            self.sums[layer] = rows.sum(0) if before is None else before + rows.sum(0)
            self.last[layer] = rows[-1]


def trace_of(runs: Sequence[Run], layers: Sequence[int], offset: int, decode: Callable[[Sequence[int]], str]) -> Trace:
    """Return the trace of some runs, of which the last ones, behind all prompts, are the answer.

    layers, offset: see `Trace`. decode: gives the text of token ids.
    """
    prompts = [index for index, run in enumerate(runs) if run.prompt]
    end = prompts[-1] if prompts else -1  # its last token says the first one of the answer
    keys, count = _Keys(runs), 0
    whole = torch.zeros(len(layers), CHUNKS + len(keys.found), dtype=torch.float64)
    for index, run in enumerate(runs):
        if index >= end:
            count += 1 if index == end else run.tokens
            masses = _stacked(run.last, layers) if index == end else run.tokens * _shares(run, layers)
            whole[:, :CHUNKS] += masses[:, :CHUNKS]
            for place, key in enumerate(keys.of(run), CHUNKS):
                whole[:, CHUNKS + keys.place[key]] += masses[:, place]
    whole = _with_rest(whole / count)
    order = sorted(range(len(keys.found)), key=lambda place: -float(whole[:, CHUNKS + place].sum()))
    rank = {keys.found[place]: at for at, place in enumerate(order)}
    return Trace(
        layers=tuple(layers),
        steps=tuple(
            _step(run, layers, [rank[key] for key in keys.of(run)], i <= end, decode) for i, run in enumerate(runs)
        ),
        chunks=tuple(_chunk(keys, place, runs, _mass(whole, CHUNKS + place), decode) for place in order),
        window=_mass(whole, WINDOW),
        sinks=_mass(whole, SINKS),
        tokens=count,
        offset=offset,
        time=datetime.now(UTC),
    )


class _Keys:
    """The names of the chunks in some runs. found: all of them. place: of each name in `found`.

    A chunk that stood there as a recent one, before its bank had named it, has the name that it got later.
    """

    def __init__(self, runs: Sequence[Run]):
        self._ids = {chunk.passage: chunk.chunk_id for run in runs for chunk in run.chunks if chunk.chunk_id}
        self.found = list(dict.fromkeys(key for run in runs for key in self.of(run)))
        self.place = {key: place for place, key in enumerate(self.found)}

    def of(self, run: Run) -> list[Key]:
        """Return the names of the chunks of one run, in its order."""
        return [chunk.chunk_id or self._ids.get(chunk.passage) or chunk.passage for chunk in run.chunks]


def _step(
    run: Run, layers: Sequence[int], ranks: Sequence[int], read: bool, decode: Callable[[Sequence[int]], str]
) -> Step:
    """Return a run as a step. ranks: the places of its chunks in the trace. read: whether it belongs to the prompt."""
    masses = _shares(run, layers)
    chunks = [
        StepChunk(
            rank, None if chunk.provenance is None else chunk.provenance.score, chunk.recent, _mass(masses, place)
        )
        for place, (rank, chunk) in enumerate(zip(ranks, run.chunks, strict=True), CHUNKS)
    ]
    return Step(
        kind="prompt" if read else "answer",
        query=decode(run.query) if run.query else "",
        query_ids=run.query,
        answered=run.answered,
        begin=run.begin,
        tokens=run.tokens,
        chunks=tuple(chunks),
        window=_mass(masses, WINDOW),
        sinks=_mass(masses, SINKS),
    )


def _chunk(
    keys: _Keys, place: int, runs: Sequence[Run], mass: Mass, decode: Callable[[Sequence[int]], str]
) -> TracedChunk:
    """Return what is known of a chunk, of which the bank said most when it gave the chunk last."""
    key = keys.found[place]
    steps = [index for index, run in enumerate(runs) if key in keys.of(run)]
    seen = [runs[index].chunks[keys.of(runs[index]).index(key)] for index in steps]
    told = [chunk.provenance for chunk in seen if chunk.provenance is not None]
    best = max(seen, key=lambda chunk: chunk.chunk_id)
    known = told[-1] if told else None
    return TracedChunk(
        chunk_id=best.chunk_id,
        bank="" if known is None else known.bank,
        start=best.start,
        tokens=len(best.token_ids),
        text=known.text if known is not None else decode(best.token_ids) if best.token_ids else "",
        metadata={} if known is None else known.metadata,
        created=None if known is None else known.created,
        retrievals=None if known is None else known.retrievals,
        score=max((each.score for each in told), default=None),
        steps=tuple(steps),
        mass=mass,
    )


def _stacked(masses: dict[int, Tensor], layers: Sequence[int]) -> Tensor:
    """Return the masses of all layers, `[layers, 2 + n]`, in float64 on the CPU."""
    return torch.stack([masses[layer] for layer in layers]).cpu().double()


def _shares(run: Run, layers: Sequence[int]) -> Tensor:
    """Return the masses of a run, `[layers, 2 + n]`, mean over the tokens that were looked at."""
    return _with_rest(_stacked(run.sums, layers) / run.seen)


def _with_rest(masses: Tensor) -> Tensor:
    """Give the rest of 1 to the sinks, with what a model gives to sinks that are parameters."""
    masses[:, SINKS] = (1 - masses[:, WINDOW:].sum(1)).clamp(min=0)
    return masses


def _mass(masses: Tensor, place: int) -> Mass:
    return tuple(masses[:, place].tolist())
