"""What is kept of a trace with its turn: the heaviest chunks by their names, and what they were asked for by.

This file owns two rules. What is kept is bounded, so that a turn stays small. And it says no words but those of its own
turn: chunks are named and not quoted, and a query that began before the turn is cut, so that nothing of a turn that is
forgotten stays in one behind it.
"""

from collections.abc import Callable, Sequence

import kvbank
from kvbank.console.output import printable
from model_worker.window.trace import Step, Trace

_CHUNKS, _STEPS, _QUERY_LETTERS = 16, 24, 160
# Chunks with a smaller share of the attention are left out: it would be shown as 0.0 %.
_LEAST_SHARE = 0.0005
# Letters of what is kept, of the 16,384 that the service takes.
_MOST = 12_000


def kept(trace: Trace, bank: str, decode: Callable[[Sequence[int]], str]) -> kvbank.AnswerTrace:
    """Return what is kept of the trace of a turn, which began with the turn.

    bank: of the session, which has the chunks that came from the window. decode: gives the text of token ids.
    """
    count = min(_CHUNKS, sum(chunk.share >= _LEAST_SHARE for chunk in trace.chunks))
    while True:
        made = _of_heaviest(trace, count, bank, decode)
        if not count or len(made.to_json()) <= _MOST:
            return made
        count //= 2


def _of_heaviest(trace: Trace, count: int, bank: str, decode: Callable[[Sequence[int]], str]) -> kvbank.AnswerTrace:
    """Return the trace with so many chunks."""
    chunks, others = trace.chunks[:count], trace.chunks[count:]
    places = sorted({place for chunk in chunks for place in chunk.steps})[:_STEPS] or [0]
    return kvbank.AnswerTrace(
        layers=trace.layers,
        steps=tuple(_step(trace.steps[place], decode) for place in places),
        chunks=tuple(_chunk(trace, rank, bank, places) for rank in range(count)),
        left_out=len(others),
        rest=tuple(sum(chunk.mass[at] for chunk in others) for at in range(len(trace.layers))),
        window=trace.window,
        sinks=trace.sinks,
        tokens=trace.tokens,
    )


def _step(step: Step, decode: Callable[[Sequence[int]], str]) -> kvbank.AnswerStep:
    """Return a step with the words of its query that are of the turn: the message, or the last ones before the step."""
    asked = step.query_ids if step.kind == "prompt" else step.query_ids[-step.begin :] if step.begin else ()
    query = printable(" ".join(decode(asked).split()))
    return kvbank.AnswerStep(step.kind, query[:_QUERY_LETTERS], step.answered is not False, step.begin, step.tokens)


def _chunk(trace: Trace, rank: int, bank: str, places: Sequence[int]) -> kvbank.AnswerChunk:
    """Return a chunk of a trace. rank: its place there. bank: of the session. places: of the steps that are kept."""
    chunk = trace.chunks[rank]
    score = {place: _score(trace.steps[place], rank) for place in chunk.steps if place in places}
    best = sorted(score, key=lambda place: (-score[place], place))
    return kvbank.AnswerChunk(
        bank=chunk.bank or (bank if chunk.chunk_id else ""),
        chunk_id=chunk.chunk_id,
        start=chunk.start,
        tokens=chunk.tokens,
        score=chunk.score,
        steps=tuple(places.index(place) for place in best),
        mass=chunk.mass,
    )


def _score(step: Step, rank: int) -> float:
    scores = [each.score for each in step.chunks if each.chunk == rank and each.score is not None]
    return max(scores, default=float("-inf"))
