"""The demo tells the whole way through: a long text, a running service, a kill, a second worker.

Each of its six steps is a function: read with facts planted, ask while reading, kill and restart the service, ask again
from both workers, measure loss on the rest of the text, report. Every figure of the report is measured here.
"""

import argparse
import inspect
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch

import kvbank
from model_worker.attachment.loading import device_named, load_model
from model_worker.attachment.model_names import SHIPPED
from model_worker.demo.asking import answer, ask_beside, demo_facts
from model_worker.demo.settings import LEAST_TEXT, DemoSettings
from model_worker.errors import InputError, WorkerError
from model_worker.evaluate.asking import MEMORY, REREAD
from model_worker.evaluate.interval import interval
from model_worker.evaluate.service_process import ServiceProcess
from model_worker.evaluate.wordings import WordedFact
from model_worker.model import MemoryModel
from model_worker.remember.settings import CHUNK
from model_worker.text_files import read_text, reference_text

BANK, OTHER_BANK = "demo", "another-text"
# Bounds 10/90 would drop the oldest tenth however often it was asked for; see docs/eviction.md.
POLICY = kvbank.Policy("frequency", lower=0, upper=90, target=50)
_REST = 0.08  # share of the text that is kept for measuring loss
_EARLY = 0.12  # share of the text among whose sentences the facts are planted
_ROUNDS = 8  # how often each asked fact is asked for between two evictions
_OTHER_SEED_OFFSET = 1_000_003

Say = Callable[[str], None]


@dataclass(slots=True)
class DemoReport:
    """Every figure that the demo prints. Recall is (right, asked); losses are nats per token.

    read_again: the plain model reads the chunks that were found as text. full_window: the question stands behind a
    local text that fills the window. None: the model has no room for that.
    """

    model: str = ""
    text: str = ""
    seed: int = 0
    compressor: str = ""
    tokens_read: int = 0
    chunks_written: int = 0
    chunks_evicted: int = 0
    evicted_by_reason: dict[str, int] = field(default_factory=dict)
    bytes_per_token_before: float = 0.0
    bytes_per_token_after: float = 0.0
    read_seconds: float = 0.0
    retrieval_ms_p50: float = 0.0
    policy: str = ""
    asked: int = 0
    never_asked: int = 0
    asked_survived: int = 0
    never_asked_survived: int = 0
    with_memory: tuple[int, int] = (0, 0)
    read_again: tuple[int, int] | None = None
    full_window: tuple[int, int] | None = None
    full_window_read_again: tuple[int, int] | None = None
    without_memory: tuple[int, int] = (0, 0)
    other_memory: tuple[int, int] = (0, 0)
    after_kill: tuple[int, int] = (0, 0)
    second_worker: tuple[int, int] = (0, 0)
    rest_tokens: int = 0
    loss_with: float = 0.0
    loss_without: float = 0.0
    loss_drop: float = 0.0
    loss_drop_interval: tuple[float, float] = (0.0, 0.0)
    loss_blocks: int = 0


def run_demo(settings: DemoSettings, say: Say, progress: Callable[[str, int, int], None]) -> DemoReport:
    """Run the whole story and return its figures.

    say: called with one line for the reader. progress: called with (stage, done, in all). Raises InputError for a text
    that is too short, and WorkerError where the service or the second worker fails.
    """
    text = _text(settings)
    report = DemoReport(model=settings.model, text=_title(settings), seed=settings.seed, compressor=settings.compressor)
    report.policy = f"{POLICY.kind}, bounds {POLICY.lower}/{POLICY.upper}, target {POLICY.target} %"
    facts = demo_facts(settings.model, settings.seed, settings.facts)
    asked, never = facts[: settings.facts // 2], facts[settings.facts // 2 :]
    report.asked, report.never_asked = len(asked), len(never)
    read_part, rest = _split(text)
    # What is wrong with a text, or with so many facts, shows before a model is loaded.
    planted = plant(read_part, facts, random.Random(settings.seed))
    other = _other_text(settings, len(read_part))
    with _folder(settings) as data, ServiceProcess(data) as service:
        say(f"memory service {service.address}, data in {data}")
        with _worker(settings, service.address, len(text)) as model:
            holders = _read(model, planted, facts, asked, report, progress)
            survivors = _survey(model, holders, asked, never, report, say)
            _fill_other(model, other, progress)
            report.with_memory = recall(model, survivors)
            _ask_beside(model, survivors, model.ids(rest), report)
            report.without_memory = recall(model, asked, bank=None)
            report.other_memory = recall(model, asked, bank=OTHER_BANK)
            service.kill()
            say("the service was killed (SIGKILL)")
            service.start()
            say(f"it is back at {service.address}, from the same folder; a second worker starts")
            report.after_kill = recall(model, survivors)
            report.second_worker = _second_worker(settings, service.address, len(text), survivors)
            _measure_loss(model, rest, report, progress)
    return report


# -- the text ---------------------------------------------------------------------------------------------------------


def _text(settings: DemoSettings) -> str:
    text = reference_text() if settings.text is None else read_text(settings.text)
    text = text[: settings.characters]
    if not text.strip():
        raise InputError("the text is empty")
    if len(text) < LEAST_TEXT:
        raise InputError(f"the demo needs a text of at least {LEAST_TEXT:,} characters, this one has {len(text):,}")
    return text


def _title(settings: DemoSettings) -> str:
    return "Python language reference (pydoc_data.topics)" if settings.text is None else settings.text.name


def _split(text: str) -> tuple[str, str]:
    cut = text.find("\n", int(len(text) * (1 - _REST)))
    cut = cut if cut > 0 else int(len(text) * (1 - _REST))
    return text[:cut], text[cut:]


def plant(text: str, facts: Sequence[WordedFact], rng: random.Random) -> str:
    """Return `text` with the statements of `facts` as lines of their own, at random line ends of its early part.

    No two stand within 800 characters of each other, where the text has room for that. Raises InputError for too few
    sentences.
    """
    ends = [m.end() for m in re.finditer(r"[.\n]\s", text[: int(len(text) * _EARLY)])]
    slot = max(len(ends) // len(facts), 1)
    if len(ends) < len(facts):
        raise InputError("the early part of the text has too few sentences to plant so many facts in")
    places = [ends[i * slot + rng.randrange(max(slot // 2, 1))] for i in range(len(facts))]
    shuffled = rng.sample(list(facts), len(facts))
    pieces, last = [], 0
    for place, fact in zip(places, shuffled, strict=True):
        pieces += [text[last:place], f"\n{fact.statement}\n"]
        last = place
    return "".join(pieces) + text[last:]


# -- reading and asking -----------------------------------------------------------------------------------------------


def _worker(settings: DemoSettings, address: str, characters: int) -> MemoryModel:
    """Return a worker on a bank that holds about a quarter of the text."""
    if settings.model == SHIPPED:
        torch.set_num_threads(1)  # threads only wait for each other in a model this small
    place = device_named(settings.device)
    loaded = load_model(settings.model, device=place, dtype=settings.dtype, adapter=settings.adapter)
    chunk = (getattr(loaded[0].config, "kvbank", None) or {}).get("chunk", CHUNK)
    capacity = settings.capacity or max(characters * CHUNK // (600 * chunk), 60)
    return MemoryModel(
        *loaded,
        memory=address,
        bank=BANK,
        compressor=settings.compressor,
        capacity=kvbank.Capacity(chunks=capacity),
        policy=POLICY,
        store_dtype="bf16",
        strict=True,
        patience=60.0,
        **settings.model_settings(),
    )


def _read(
    model: MemoryModel,
    text: str,
    facts: Sequence[WordedFact],
    asked: Sequence[WordedFact],
    report: DemoReport,
    progress: Callable[[str, int, int], None],
) -> dict[str, int]:
    """Read `text`, asking for `asked` again and again once all facts stand in the bank.

    Return the id of the chunk that holds each fact, by the fact's name.
    """
    holders: dict[str, int] = {}
    ids = model.ids(text)
    last = max(text.index(fact.statement) + len(fact.statement) for fact in facts)
    next_round = len(model.ids(text[:last])) + model.chunk  # the chunk with the last fact is in the bank then
    bound = model.client.get_bank(BANK).capacity
    assert bound is not None
    assert bound.chunks is not None
    round_tokens = bound.chunks // 2 * model.chunk // _ROUNDS

    def between(done: int, total: int) -> None:
        nonlocal next_round
        progress("reading", done, total)
        if done < next_round or done >= total:
            return
        model.settle()
        if not holders:
            holders.update(_holders(model, facts))
        for fact in asked:
            answer(model, fact)
        next_round = done + round_tokens

    begin = time.perf_counter()
    model.read(ids, between)
    report.read_seconds = time.perf_counter() - begin
    stats = model.memory.stats
    report.tokens_read, report.chunks_written = stats.tokens, stats.written
    report.bytes_per_token_before = stats.bytes_before / stats.tokens
    report.bytes_per_token_after = stats.bytes_after / stats.tokens
    report.retrieval_ms_p50 = 1000 * median(stats.recall_seconds)
    return holders or _holders(model, facts)


def _holders(model: MemoryModel, facts: Sequence[WordedFact]) -> dict[str, int]:
    """Return the id of the chunk that holds the whole statement of each fact, by the fact's name."""
    found = {}
    for chunk in model.client.list_chunks(BANK):
        for fact in facts:
            if fact.statement in chunk.text:
                found[fact.name] = chunk.chunk_id
    return found


def recall(model: MemoryModel, facts: Sequence[WordedFact], bank: str | None = BANK) -> tuple[int, int]:
    """Return (right, asked), with the memory in `bank` or with none.

    These questions do not count for eviction.
    """
    memory = model.with_bank(bank, count=False) if bank else False
    return sum(answer(model, fact, memory) for fact in facts), len(facts)


def _ask_beside(model: MemoryModel, facts: Sequence[WordedFact], rest: list[int], report: DemoReport) -> None:
    """Ask for facts by memory and by reading the same chunks again, in an empty window and behind a full one.

    rest: tokens of the text behind what was read, with which the window is filled.
    """
    memory = model.with_bank(BANK, count=False)
    report.read_again = ask_beside(model, memory, facts, [], report.tokens_read)[REREAD]
    full = ask_beside(model, memory, facts, rest, report.tokens_read)
    report.full_window, report.full_window_read_again = full[MEMORY], full[REREAD]


def _survey(
    model: MemoryModel,
    holders: dict[str, int],
    asked: Sequence[WordedFact],
    never: Sequence[WordedFact],
    report: DemoReport,
    say: Say,
) -> list[WordedFact]:
    """Tell which chunks went, and why; return the asked facts that survived."""
    log = {e.chunk_id: e for e in model.client.list_evictions(BANK)}
    # Not the acknowledgements' count: most of an eviction goes on behind the write that began it.
    report.chunks_evicted, report.evicted_by_reason = len(log), dict(Counter(e.reason for e in log.values()))
    live = {chunk.chunk_id for chunk in model.client.list_chunks(BANK)}
    for fact in (*asked, *never):
        chunk_id = holders.get(fact.name)
        eviction = log.get(chunk_id) if chunk_id is not None else None
        if eviction is not None:
            which = "asked for" if fact in asked else "never asked for"
            say(
                f"went: chunk {chunk_id} with the {fact.wording} of {fact.name} ({which}), {eviction.reason}, "
                f"retrieved {eviction.retrieval_count} times"
            )
    survivors = [fact for fact in asked if holders.get(fact.name) in live]
    report.asked_survived = len(survivors)
    report.never_asked_survived = sum(holders.get(fact.name) in live for fact in never)
    return survivors


def _other_text(settings: DemoSettings, characters: int) -> str:
    """Return another text with other facts of the same form. characters: as many as are read; the other text has no
    more. Raises InputError for too many facts."""
    facts = demo_facts(settings.model, settings.seed + _OTHER_SEED_OFFSET, settings.facts)
    text = plant(inspect.getsource(argparse)[:characters], facts, random.Random(settings.seed))
    return text[: int(len(text) * _EARLY) + 4000]


def _fill_other(model: MemoryModel, text: str, progress: Callable[[str, int, int], None]) -> None:
    """Fill a bank with another text: a memory that does not know the answers."""
    other = model.with_bank(OTHER_BANK)
    model.read(text, lambda done, total: progress("another text", done, total), memory=other)


def _second_worker(
    settings: DemoSettings, address: str, characters: int, survivors: Sequence[WordedFact]
) -> tuple[int, int]:
    """Ask for the facts from a worker in a process of its own; return (right, asked)."""
    request = {
        "settings": settings.model_copy(update={"text": None, "data": None}).model_dump(mode="json"),
        "address": address,
        "characters": characters,
        "facts": [asdict(fact) for fact in survivors],
    }
    done = subprocess.run(
        [sys.executable, "-m", "model_worker.demo.story"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise WorkerError(f"the second worker failed: {reason}")
    right, of = json.loads(done.stdout)
    return right, of


def _serve_second_worker() -> None:
    request = json.load(sys.stdin)
    settings = DemoSettings(**request["settings"])
    with _worker(settings, request["address"], request["characters"]) as model:
        print(json.dumps(recall(model, [WordedFact(**fact) for fact in request["facts"]])))


# -- loss -------------------------------------------------------------------------------------------------------------


def _measure_loss(model: MemoryModel, rest: str, report: DemoReport, progress: Callable[[str, int, int], None]) -> None:
    """Measure the loss on the rest of the text, with and without memory, with the same local window.

    The memory is chosen by the past only.
    """
    ids = model.ids(rest)
    progress("loss", 0, 2)
    without = model.losses(ids, memory=None)
    progress("loss", 1, 2)
    past = model.with_bank(BANK, query="past")
    with_memory = model.losses(ids, memory=past)
    progress("loss", 2, 2)
    report.rest_tokens = len(ids)
    report.loss_with, report.loss_without = float(with_memory.nll.mean()), float(without.nll.mean())
    blocks = without.by_block() - with_memory.by_block()
    drop = interval(blocks)
    report.loss_drop, report.loss_drop_interval, report.loss_blocks = drop.mean, (drop.low, drop.high), len(blocks)


@contextmanager
def _folder(settings: DemoSettings) -> Iterator[Path]:
    if settings.data is None:
        with tempfile.TemporaryDirectory(prefix="kvbank-demo-") as folder:
            yield Path(folder)
        return
    if (settings.data / "store").exists():
        raise InputError(f"{settings.data} holds a store already; the demo wants a folder of its own")
    settings.data.mkdir(parents=True, exist_ok=True)
    yield settings.data


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _serve_second_worker()
