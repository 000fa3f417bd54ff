"""What a conversation's memory holds, and what an answer took from it, as lines for people.

The module is light to import: no torch.
"""

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import kvbank
from kvbank.console.table import terminal_width
from model_worker.window.trace_table import age, counted, lines_of

if TYPE_CHECKING:
    from model_worker.session.session import Session
    from model_worker.window.recorder import Recorder

_WIDTH = 100  # of lines where there is no terminal
_SHOWN, _OFTEN = 5, 3
_SECONDS = 10.0  # that the service has to say what a bank holds


def why(recorder: "Recorder | None", chunks: str) -> str:
    """Return what the last answer attended to: the chunks with the most attention mass, and the queries.

    recorder: of the last answer; None where there is none yet. chunks: how many to show at most, as typed; empty for 5.
    """
    if chunks and not (chunks.isascii() and chunks.isdigit() and int(chunks)):
        return lines_of([], [f"/why takes how many chunks to show, such as /why {_SHOWN}, not {chunks!r}"], _WIDTH)
    if recorder is None:
        return "there is no answer yet"
    return recorder.trace().table(int(chunks or _SHOWN), terminal_width() or _WIDTH)


def bank_of(session: "Session") -> str:
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
