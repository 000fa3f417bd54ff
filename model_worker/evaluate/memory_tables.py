"""The tables of the evaluations of a memory, made of the same documents that `--json` prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from model_worker.evaluate.plain_table import PlainTable, plus_minus, share_cell

_Document = Mapping[str, Any]


def cost_line(found: _Document) -> str:
    """Return what an evaluation cost, in one line."""
    cost = found["cost"]
    return f"cost: {cost['seconds']:,.0f} s, {cost['tokens']:,} tokens fed, {cost['stored'] / 1e6:,.1f} MB stored"


def perplexity_tables(found: _Document) -> list[PlainTable]:
    """Return the tables of `kvbank eval ppl`."""
    documents = found["documents"]
    scored = sum(own["scored"] for own in documents)
    title = f"{found['model']}: loss of {scored:,} tokens of {len(documents)} documents, window {found['window']}"
    rows = [
        (
            row["memory"],
            f"{row['nats']:.4f}",
            f"{row['perplexity']:.2f}",
            plus_minus(row.get("gain"), row.get("width_blocks")),
            plus_minus(row.get("gain"), row.get("width_documents")),
        )
        for row in found["gains"]
    ]
    columns = ["memory", "nats", "perplexity", "gain, over blocks", "gain, over documents"]
    caption = "nats per token; gain: loss without a memory less loss with it, paired; ± half the 95 % interval"
    tables = [PlainTable(title, columns, rows, caption), _by_document(documents)]
    if found["distance"]:
        tables.append(_by_distance(found["distance"]))
    if found.get("memlong"):
        tables.append(_protocol(found["memlong"]))
    return tables


def _by_document(documents: Sequence[_Document]) -> PlainTable:
    memories = [own["memory"] for own in documents[0]["gains"]]
    rows = []
    for document in documents:
        own = {each["memory"]: each for each in document["gains"]}
        cells = [plus_minus(own[name]["gain"], own[name]["width_blocks"]) if name in own else "-" for name in memories]
        rows.append((document["text"], f"{document['history']:,}", f"{document['nats']:.4f}", *cells))
    columns = ["document", "read before", "nats without", *memories]
    return PlainTable("Gain by document, nats per token", columns, rows, "± half the 95 % interval over blocks")


def _by_distance(found: Sequence[_Document]) -> PlainTable:
    memories = list(dict.fromkeys(row["memory"] for row in found))
    seen = list(dict.fromkeys(row["seen"] for row in found))
    own = {(row["seen"], row["memory"]): row for row in found}
    words = {row["seen"]: row["words"] for row in found}
    rows = [
        (
            name,
            f"{words[name]:,}",
            *(
                plus_minus(own[name, memory]["gain"], own[name, memory]["width"]) if (name, memory) in own else "-"
                for memory in memories
            ),
        )
        for name in seen
    ]
    columns = ["tokens since the word was seen", "words", *memories]
    return PlainTable("Gain on rare words, nats per word", columns, rows, "± half the 95 % interval over words")


def _protocol(found: Sequence[_Document]) -> PlainTable:
    rows = [
        (
            row["scored"],
            str(row["windows"]),
            f"{row['nats']:.4f}",
            f"{row['perplexity']:.2f}",
            plus_minus(row.get("gain"), row.get("width")),
        )
        for row in found
    ]
    columns = ["scored", "windows", "nats", "perplexity", "gain"]
    caption = (
        "not comparable with the tables above: the scored tokens choose their memory, and the memory is never emptied"
    )
    return PlainTable("MemLong's own protocol", columns, rows, caption)


def facts_tables(found: _Document) -> list[PlainTable]:
    """Return the tables of `kvbank eval facts`."""
    rows = found["answers"]
    places = list(dict.fromkeys((row["tokens"], row["local"], row["form"]) for row in rows))
    wordings, ways = (list(dict.fromkeys(row[name] for row in rows)) for name in ("wording", "way"))
    own = {(row["tokens"], row["local"], row["form"], row["wording"], row["way"]): row for row in rows}
    lines = [
        (
            f"{tokens:,}",
            local,
            form,
            wording,
            *(share_cell(own.get((tokens, local, form, wording, way))) for way in ways),
        )
        for tokens, local, form in places
        for wording in wordings
    ]
    asked = max(row["asked"] for row in rows)
    title = f"{found['model']}: facts told, of {asked} at each place, window {found['window']}"
    caption = "right of asked, with Wilson's 95 % interval; re-reading reads the same hits as text before the question"
    tables = [PlainTable(title, ["tokens read", "local text", "form", "wording", *ways], lines, caption)]
    if found["resident"]:
        tables.append(_resident(found["resident"]))
    if found["pressure"]:
        tables.append(_pressure(found["pressure"]))
    return tables


def _resident(found: Sequence[_Document]) -> PlainTable:
    first = found[0]["bytes"]
    rows = [(f"{own['tokens']:,}", f"{own['bytes'] / (1 << 20):,.0f}", f"{own['bytes'] / first:.3f}") for own in found]
    return PlainTable("Memory of the worker while it reads", ["tokens read", "MiB", "x the first"], rows)


def _pressure(found: _Document) -> PlainTable:
    rows = [(own["group"], share_cell(own["stays"]), share_cell(own["recalled"])) for own in found["facts"]]
    title = f"Under pressure: a bank of {found['capacity']:,} tokens, policy {found['policy']}"
    caption = f"{found['written']:,} chunks written, {found['evicted']:,} evicted"
    return PlainTable(title, ["facts", "still in the bank", "recalled"], rows, caption)


def first_token_tables(found: _Document) -> list[PlainTable]:
    """Return the table of `kvbank eval ttft`."""
    rows = [
        (
            f"{row['history']:,}",
            row["way"],
            f"{row['tokens']:,}",
            f"{1000 * row['seconds']:,.0f} ± {1000 * row['width']:,.0f}",
            f"{row['ratio']:.2f} ± {row['ratio_width']:.2f}",
            "-" if row["peak"] is None else f"{row['peak'] / (1 << 20):,.0f}",
        )
        for row in found["rows"]
    ]
    title = (
        f"{found['model']}: first token of an answer, {found['hits']} hits of {found['chunk']} tokens, question of "
        f"{found['question']}"
    )
    least, most = (pick(row["rounds"] for row in found["rows"]) for pick in (min, max))
    rounds = f"{least}" if least == most else f"{least} to {most}"
    caption = (
        "fed: tokens before the first of the answer; x: re-reading the hits over it; medians of "
        f"{rounds} interleaved rounds with half their 95 % interval; threads: {found['threads']}, load average "
        f"{found['load']:.1f}"
    )
    tables = [PlainTable(title, ["history", "way", "fed", "ms", "x", "peak MiB"], rows, caption)]
    return [*tables, _session_table(found)] if found.get("sessions") else tables


def _session_table(found: _Document) -> PlainTable:
    rows = [
        (
            f"{row['history']:,}",
            "-" if row["faster"] is None else f"{row['faster']:.1f} ± {row['faster_width']:.1f}",
            f"{row['chunks']:,}",
            f"{row['chunk_bytes'] / (1 << 20):,.1f}",
            f"{row['window_bytes'] / (1 << 20):,.1f}",
        )
        for row in found["sessions"]
    ]
    caption = "faster: the time of re-reading all over that of the session, whose window comes from the service"
    columns = ["history", "faster", "chunks", "MiB of them", "MiB of the window"]
    return PlainTable(f"{found['model']}: a session that a worker goes on with", columns, rows, caption)


def session_tables(found: _Document) -> list[PlainTable]:
    """Return the table of `kvbank eval session`."""
    rows = [
        (
            row["way"],
            f"{row['read_seconds']:,.1f}",
            f"{1000 * row['answer_seconds']:,.0f}",
            f"{row['seconds']:,.1f}",
            f"{row['fed']:,}",
            f"{row['kept'] / (1 << 20):,.1f}",
            "-" if row["peak"] is None else f"{row['peak'] / (1 << 20):,.0f}",
        )
        for row in found["rows"]
    ]
    title = (
        f"{found['model']}: {found['tokens']:,} tokens read and {found['questions']:,} questions, {found['hits']} hits "
        f"of {found['chunk']} tokens"
    )
    caption = (
        "an answer: the median; kept: K-V and embeddings in the service, texts and embeddings, K-V in the process; "
        f"peak: of the worker, above the model; threads: {found['threads']}, load average {found['load']:.1f}"
    )
    columns = ["way", "reading, s", "an answer, ms", "all, s", "tokens fed", "kept, MiB", "peak MiB"]
    return [PlainTable(title, columns, rows, caption)]
