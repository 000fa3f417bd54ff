"""The traces that ship with the package were recorded here: real runs of kvbank-small on a service that records.

`python -m model_worker.evaluate.eviction.recorded --help` says what is read. Novels are read as MemLong reads, each
chunk with what it recalls. Other texts are read without recalling, and questions recall for themselves. The banks are
unbounded, so that everything that a run wants is there, and a trace says what a smaller bank would have lacked.
"""

import argparse
import csv
import gzip
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import kvbank
from model_worker.evaluate.banks import open_memory
from model_worker.evaluate.eviction.measuring import kind_of
from model_worker.evaluate.evidence.qmsum import meetings
from model_worker.evaluate.planting import plant
from model_worker.evaluate.service_process import ServiceProcess
from model_worker.evaluate.wordings import WORDINGS, worded_facts
from model_worker.model import MemoryModel
from model_worker.remember.memory import Memory
from model_worker.text_files import read_book
from model_worker.user_text import encode_text, readable

_RECALLING = ("novel", "shift")  # kinds of runs that recall for each chunk that they read
_FACTS_EACH = 6
_ASKED_EVERY = 128  # tokens that are read between two questions for facts
_POPULARITY = 1.0  # exponent of Zipf's law by which facts are asked for
Run = Callable[[MemoryModel, Memory], None]


@contextmanager
def recording(
    path: Path, capacity: kvbank.Capacity | None = None, policy: kvbank.Policy | None = None
) -> Iterator[tuple[MemoryModel, Memory]]:
    """Yield kvbank-small and its memory over an empty bank, whose service records to `path`, packed at the end.

    capacity, policy: those of the bank, which is unbounded by default.
    """
    with tempfile.TemporaryDirectory(prefix="kvbank-trace-") as folder:
        plain = Path(folder) / "trace.jsonl"
        with (
            ServiceProcess(Path(folder), record=plain) as service,
            kvbank.connect(service.address, tls=False) as client,
            MemoryModel.from_pretrained("kvbank-small", memory=client, bank="unused", strict=True) as model,
        ):
            bank = path.name.partition(".")[0]
            context: Literal["isolated", "window"] = "isolated" if kind_of(bank) in _RECALLING else "window"
            yield model, open_memory(model, bank, capacity=capacity, policy=policy, context=context)
        path.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))


def novel(text: str, tokens: int) -> Run:
    """Return a run that reads a text."""
    return lambda model, memory: _read(model, memory, encode_text(model.tokenizer, readable(text))[:tokens])


def shift(first: str, second: str, tokens: int) -> Run:
    """Return a run that reads a text, then another one as long, and then goes on with the first."""

    def run(model: MemoryModel, memory: Memory) -> None:
        one, other = (encode_text(model.tokenizer, readable(text)) for text in (first, second))
        part = 2 * tokens // 5
        for ids in (one[:part], other[:part], one[part : tokens - part]):
            _read(model, memory, ids)

    return run


def facts(text: str, tokens: int, seed: int, each: int = _FACTS_EACH) -> Run:
    """Return a run that reads a text with facts in its first half, and asks for those that it has read, again and
    again; some are asked for far more often than others. each: facts of each wording."""

    def run(model: MemoryModel, memory: Memory) -> None:
        made = worded_facts(seed, list(WORDINGS), each)
        planted = plant(model.tokenizer, text, made, tokens, tokens // 2, model.window, seed)
        draw = random.Random(f"kvbank-traces:{seed}")
        rank = {own.fact: at for at, own in enumerate(draw.sample(planted.facts, len(planted.facts)), 1)}
        for at in range(0, len(planted.ids), _ASKED_EVERY):
            _read(model, memory, planted.ids[at : at + _ASKED_EVERY])
            told = [own.fact for own in planted.facts if own.answer < at + _ASKED_EVERY]
            for fact in draw.choices(told, [rank[each] ** -_POPULARITY for each in told]) if told else ():
                memory.recall([encode_text(model.tokenizer, fact.question)])

    return run


def chat(turns: Sequence[str]) -> Run:
    """Return a run of a long chat: each turn recalls for what was said, and is then remembered."""

    def run(model: MemoryModel, memory: Memory) -> None:
        for turn in turns:
            said = encode_text(model.tokenizer, readable(turn))
            memory.recall([said])
            _read(model, memory, said)

    return run


def meeting_after_meeting(talks: Sequence[tuple[Sequence[str], Sequence[str]]], tokens: int) -> Run:
    """Return a run that reads the beginning of each meeting, of so many tokens, and then asks what is asked of it.

    talks: the turns and the questions of each meeting.
    """

    def run(model: MemoryModel, memory: Memory) -> None:
        for turns, questions in talks:
            _read(model, memory, encode_text(model.tokenizer, readable("\n".join(turns)))[:tokens])
            for question in questions:
                memory.recall([encode_text(model.tokenizer, readable(question))])

    return run


def _read(model: MemoryModel, memory: Memory, ids: Sequence[int]) -> None:
    if ids:
        model.read(ids, memory=memory)


def dialogues(path: Path) -> list[list[str]]:
    """Return the dialogues of a file of Synthetic-Persona-Chat, each as its pairs of neighbouring turns."""
    with path.open(encoding="utf-8", newline="") as file:
        talks = [row["Best Generated Conversation"].splitlines() for row in csv.DictReader(file)]
    return [["\n".join(talk[at : at + 2]) for at in range(0, len(talk), 2)] for talk in talks]


def runs(given: argparse.Namespace) -> Iterator[tuple[str, Run]]:
    """Yield the runs that the arguments ask for, with the names of their traces; the word before the first hyphen says
    of what kind a run is."""
    texts = {path.name.partition(".")[0]: read_book(path) for path in given.novel}
    names = list(texts)
    for at, name in enumerate(names):
        follower = names[(at + 1) % len(names)]
        yield f"novel-{name}", novel(texts[name], given.tokens)
        yield f"facts-{name}", facts(texts[name], given.tokens, at)
        if follower != name:
            yield f"shift-{name}", shift(texts[name], texts[follower], given.tokens)
    talks = dialogues(given.chats) if given.chats else []
    for number in range(given.each if talks else 0):
        pairs = [pair for talk in talks[number :: given.each] for pair in talk]
        yield f"chat-{number + 1}", chat(pairs[: given.tokens // 64])
    found = meetings(given.meetings) if given.meetings else []
    for number in range(given.each if found else 0):
        own = [(each.passages, [asked.text for asked in each.questions]) for each in found[number :: given.each]]
        yield f"meetings-{number + 1}", meeting_after_meeting(own[:8], given.tokens // 8)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m model_worker.evaluate.eviction.recorded", description=__doc__)
    parser.add_argument("folder", type=Path, help="Where the traces go, a NAME.jsonl.gz each.")
    parser.add_argument("--novel", type=Path, nargs="*", default=[], help="Texts, UTF-8 or .gz.")
    parser.add_argument("--chats", type=Path, help="A file of Synthetic-Persona-Chat (CSV).")
    parser.add_argument("--meetings", type=Path, help="A folder of QMSum's *.jsonl.")
    parser.add_argument("--each", type=int, default=3, help="Traces of chats, and of meetings.")
    parser.add_argument("--tokens", type=int, default=32_000, help="Tokens that a run reads, about.")
    return parser


if __name__ == "__main__":
    arguments = _arguments().parse_args()
    for trace, of_trace in runs(arguments):
        with recording(arguments.folder / f"{trace}.jsonl.gz") as (reading, into):
            of_trace(reading, into)
        print(trace)
