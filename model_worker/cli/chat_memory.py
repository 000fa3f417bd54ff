"""What a conversation's memory holds, and what an answer took from it, as lines for people."""

from datetime import UTC, datetime

import kvbank
from kvbank.console.table import terminal_width
from model_worker.session.explained import ExplainedChunk, explained
from model_worker.session.session import Session
from model_worker.window.trace import share
from model_worker.window.trace_table import age, counted, lines_of, origin

_WIDTH = 100  # of lines where there is no terminal
_SHOWN, _OFTEN = 5, 3
_SECONDS = 10.0  # that the service has to say what a bank holds


def why(session: Session, chunks: str) -> str:
    """Return what the last answer of a session attended to: the chunks with the most attention mass, and the queries.

    chunks: how many to show at most, as typed; empty for 5. A service that does not say is told of in place of that.
    """
    width = terminal_width() or _WIDTH
    if chunks and not (chunks.isascii() and chunks.isdigit() and int(chunks)):
        return lines_of([], [f"/why takes how many chunks to show, such as /why {_SHOWN}, not {chunks!r}"], width)
    turn = next((turn for turn in reversed(session.turns) if turn.status != "part"), None)
    if turn is None:
        return "there is no answer yet"
    if (trace := turn.trace) is None:
        return "nothing was noted of the last answer: it was forgotten, or another program wrote it"
    try:
        rows = explained(session.record.client, session.info, trace, timeout=_SECONDS)
    except kvbank.ServiceError as error:
        return lines_of([], [f"the bank cannot be looked at: {error}"], width)
    shown = int(chunks or _SHOWN)
    return lines_of([_row(each) for each in rows[:shown]], [_rest(trace, shown), *_asked(trace)], width)


def _row(each: ExplainedChunk) -> tuple[str, str, str, str, str]:
    """Return the cells of a chunk: its share, its score, where it comes from, its age and its text."""
    stored, traced = each.stored, each.traced
    return (
        f"{traced.share:.1%}",
        "-" if traced.score is None else f"{traced.score:.2f}",
        origin({} if stored is None else stored.metadata, traced.start),
        age(None if stored is None else stored.create_time, datetime.now(UTC)),
        "(no longer in the bank)" if stored is None else stored.text,
    )


def _rest(trace: kvbank.AnswerTrace, shown: int) -> str:
    """Say where the mass went that the first `shown` chunks did not receive, and what it is a mean over."""
    others, rest = trace.chunks[shown:], share(trace.rest)
    count, mass = len(others) + trace.left_out, sum(chunk.share for chunk in others) + rest
    parts = [f"{counted(count, 'more chunk')} {mass:.1%}"] if count else []
    parts += [f"window {share(trace.window):.1%}", f"sinks {share(trace.sinks):.1%}"]
    none = "" if trace.chunks or count else "no chunk was attended to: "
    over = f"mean over {counted(trace.tokens, 'token')} and {counted(len(trace.layers), 'layer')}"
    return f"{none}{', '.join(parts)}; {over}"


def _asked(trace: kvbank.AnswerTrace) -> list[str]:
    """Say what was asked for, each query once."""
    lines = [f"asked for: {query}" for query in dict.fromkeys(step.query for step in trace.steps if step.query)]
    if not all(step.answered for step in trace.steps):
        lines.append("a recall was not answered; what had been recalled before was attended to")
    return lines


def bank_of(session: Session) -> str:
    """Return what the bank of a session has of the session: how much, the newest chunk, and those retrieved most.

    A service that does not say is told of in place of that.
    """
    name, client, width = session.info.bank, session.record.client, terminal_width() or _WIDTH
    try:
        chunks = list(client.list_chunks(name, filter=session.info.filter, timeout=_SECONDS))
    except kvbank.ServiceError as error:
        return lines_of([], [f"the bank cannot be looked at: {error}"], width)
    now = datetime.now(UTC)
    tokens = sum(len(chunk.token_ids) for chunk in chunks)
    lines = [f"bank {name}: {counted(len(chunks), 'chunk')}, {counted(tokens, 'token')}"]
    if chunks:
        newest = max(chunks, key=lambda chunk: chunk.chunk_id)
        lines.append(f"newest, {age(newest.create_time, now)} ago: {newest.text}")
    often = sorted((chunk for chunk in chunks if chunk.retrieval_count), key=lambda chunk: -chunk.retrieval_count)
    lines += [f"retrieved {counted(chunk.retrieval_count, 'time')}: {chunk.text}" for chunk in often[:_OFTEN]]
    return lines_of([], lines, width)
