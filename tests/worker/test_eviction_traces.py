"""`kvbank eval eviction` replays what a service has recorded."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

import kvbank
from kvbank.files import traces
from kvbank.files.traces import Begun, Dropped, Event, Gone, Lost, Retrieved, Wrote
from memory_service.api.embedded import LocalServer
from model_worker.cli.commands import evaluation
from model_worker.errors import InputError
from model_worker.evaluate.eviction import policy
from model_worker.evaluate.eviction.measuring import SHIPPED, Plan, measure
from model_worker.evaluate.eviction.recorded import dialogues, facts, novel, recording
from model_worker.evaluate.eviction.replay import replay
from model_worker.evaluate.eviction.trace import Remove, Retrieve, Trace, Write, read_traces
from model_worker.text_files import reference_text


def put(path: Path, *events: Event) -> Path:
    path.write_bytes(b"".join(map(traces.line, events)))
    return path


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(evaluation, ["eviction", *map(str, arguments)])


def test_a_trace_has_the_steps_of_each_bank(tmp_path: Path) -> None:
    path = put(
        tmp_path / "mine.jsonl",
        Begun(1, "s"),
        *(Wrote(2, "b", chunk, 64, 999) for chunk in (4, 5, 6, 7)),
        Wrote(3, "quiet", 8, 64, 999),
        Wrote(3, "c", 9, 64, 999),
        Retrieved(4, "b", ((6, 4), (6, 1))),  # 1 was there before
        Retrieved(4, "c", ((9,),)),
        Gone(5, "b", (4,), "evicted"),
        Gone(5, "b", (5,), "expired"),
        Retrieved(5, "b", ((5,),)),  # was under way when the chunk was removed
        Lost(6, 3),
        Begun(7, "s"),
        Retrieved(8, "b", ((7,),)),
        Dropped(9, "b"),
        Begun(10, "another store"),
        Wrote(11, "c", 9, 64, 999),  # the same id, and another chunk
        Retrieved(12, "c", ((9, 9),)),
    )
    b, c, later = read_traces(path)
    assert b.name == "mine: b"
    assert b.steps == [
        *(Write(chunk) for chunk in (4, 5, 6, 7)),
        *(Retrieve((4, 6, 6)), Remove((5,)), Retrieve((7,)), Remove((4, 6, 7))),
    ]
    assert (b.written, b.most, b.asked, b.evicted, b.unknown, b.lost) == (4, 4, 4, 1, 1, 3)
    assert (c.name, c.steps) == ("mine: c", [Write(9), Retrieve((9,))])
    assert (later.name, later.steps) == ("mine: c (2)", [Write(9), Retrieve((9, 9))])


def test_what_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    alone = put(tmp_path / "alone.jsonl", Begun(1, "s"), Wrote(2, "b", 1, 64, 999))
    twice = put(tmp_path / "twice.jsonl", Begun(1, "s"), *[Wrote(2, "b", 1, 64, 999)] * 2)
    for path, why in (
        (alone, "no bank"),
        (twice, "twice"),
        (tmp_path / "none.jsonl", "cannot read"),
        (tmp_path, "no file"),
    ):
        with pytest.raises(InputError, match=why):
            read_traces(path)
        assert run("--trace", path).exit_code == 1


def test_what_a_service_records_of_an_unbounded_bank_is_replayed_as_a_bounded_one(tmp_path: Path) -> None:
    """Test it with an axis for each chunk, so that a query finds the chunk that it asks for, or nothing."""
    random, axes = np.random.default_rng(1), np.eye(40, dtype=np.float32)
    path, hits = tmp_path / "run.jsonl", 0
    with (
        LocalServer(tmp_path / "data", durability="os", record=str(path)) as server,
        kvbank.connect(server.address) as client,
    ):
        for bank, capacity in (("whole", None), ("small", kvbank.Capacity(chunks=10))):
            client.create_bank(bank, kv=None, embedding=kvbank.EmbeddingSpec("e", 40), capacity=capacity)
        for written in range(len(axes)):
            for bank in ("whole", "small"):
                client.write(bank, kvbank.NewChunk(axes[written]), embedder_digest="e", reader_digest="")
            wanted = axes[random.integers(0, written + 1, 3)]
            for bank in ("whole", "small"):
                found = client.retrieve(bank, wanted, top_k=1, min_score=0.5, embedder_digest="e", reader_digest="")
                hits += sum(map(len, found.queries)) if bank == "small" else 0
    packed = tmp_path / "run.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    ended = run("--trace", packed, "--capacity", 0.25, "--policy", "frequency", "--json")
    rows = {(row["trace"], row["policy"]): row for row in json.loads(ended.stdout)["rows"]}
    whole = rows["run: whole", "frequency"]
    assert (whole["chunks"], whole["hits"]) == (10, hits)
    assert whole["rate"] == hits / 120 < rows["run: whole", "bound"]["rate"]
    small = next(own for own in json.loads(ended.stdout)["traces"] if own["name"] == "run: small")
    assert small["evicted"] > 0


def kept(name: str, hot: int) -> Trace:
    """Make a trace in which `hot` chunks are asked for after each of twenty others."""
    steps: list[Any] = [Write(chunk) for chunk in range(hot)]
    for chunk in range(hot, hot + 20):
        steps += [Write(chunk), Retrieve(tuple(range(hot)))]
    return Trace(name, steps)


def test_rates_are_means_over_traces_by_kind_with_paired_differences_to_lru() -> None:
    traces_ = [kept("a-1", 2), kept("a-2", 5), kept("b-1", 9)]
    policies = ("frequency:target=90", "lru", "lru:target=90")
    found = measure(traces_, Plan((0.25,), policies), lambda *_: None)
    rows = {(row["trace"], row["policy"]): row["rate"] for row in found["rows"]}
    rates = {(rate["policy"], rate["kind"]): rate for rate in found["rates"]}
    own, other = "frequency:target=90", "lru:target=90"
    assert rates[own, "a"]["mean"] == pytest.approx((rows["a-1", own] + rows["a-2", own]) / 2)
    assert rates["lru", "b"]["width"] is None
    assert rates["bound", "all"]["mean"] >= rates["lru", "all"]["mean"]
    pairs = {(pair["policy"], pair["than"], pair["kind"]): pair for pair in found["pairs"]}
    assert {key[:2] for key in pairs} == {(own, other), (own, "lru"), (other, "lru")}
    above = [rows[name, own] - rows[name, other] for name in ("a-1", "a-2", "b-1")]
    assert pairs[own, other, "all"]["mean"] == pytest.approx(sum(above) / 3)
    assert pairs[own, other, "b"]["mean"] == pytest.approx(above[2])
    assert any(above)


@pytest.mark.slow
def test_the_command_shows_tables_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "eviction.svg"
    ended = run("--capacity", 0.5, "--policy", "lru", "--policy", "frequency", "--plot", picture)
    assert ended.exit_code == 0
    assert "capacity 50 % of the chunks" in ended.stdout
    assert "bound" in ended.stdout
    assert "<svg" in picture.read_text()
    without = run("--trace", SHIPPED / "chat-1.jsonl.gz", "--capacity", 0.5, "--no-bound")
    assert without.exit_code == 0
    assert "bound" not in without.stdout
    assert run("--policy", "mru").exit_code == 1
    assert run("--capacity", 0).exit_code == 2


def test_the_traces_that_ship_have_numbers_alone_and_are_small() -> None:
    paths = sorted(SHIPPED.glob("*.gz"))
    assert sum(path.stat().st_size for path in paths) < 200_000
    for path in paths:
        [trace] = read_traces(path)
        assert (trace.evicted, trace.unknown, trace.lost) == (0, 0, 0)
        assert trace.asked > trace.written / 3
    assert len({path.name.partition("-")[0] for path in paths}) >= 4


@pytest.mark.slow
def test_a_run_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "facts-a.jsonl.gz"
    with recording(path) as (model, memory):
        facts(reference_text()[:60_000], 1600, 0, each=1)(model, memory)
    [trace] = read_traces(path)
    assert trace.name == "facts-a"
    assert trace.written >= 20
    # Not each question finds a chunk: the model leaves out those below its least score.
    assert trace.asked >= 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "own"), [("frequency", kvbank.Policy()), ("lru:target=90", kvbank.Policy("lru", target=90))]
)
def test_a_bank_that_finds_the_next_best_holds_about_what_the_replay_says(
    tmp_path: Path, spec: str, own: kvbank.Policy
) -> None:
    """Test that it makes little difference that a replay neither finds nor counts other chunks for those that are
    gone: the same text is read with a bank of a quarter of the chunks."""
    run, whole, small = novel(reference_text(), 8000), tmp_path / "novel-whole.gz", tmp_path / "novel-small.gz"
    with recording(whole) as (model, memory):
        run(model, memory)
    [trace] = read_traces(whole)
    capacity = trace.most // 4
    with recording(small, kvbank.Capacity(chunks=capacity), own) as (model, memory):
        run(model, memory)
    held: list[set[int]] = [set()]  # after each write; chunks by their order
    order: dict[int, int] = {}
    for event in traces.read(small):
        if isinstance(event, Wrote):
            order[event.chunk] = len(order)
            held.append(held[-1] | {order[event.chunk]})
        elif isinstance(event, Gone):
            held[-1] = held[-1] - {order[chunk] for chunk in event.chunks}
    assert max(map(len, held)) == capacity
    written = {
        step.chunk: number for number, step in enumerate(each for each in trace.steps if isinstance(each, Write))
    }
    assert len(written) == len(order)
    hits = now = 0
    for step in trace.steps:
        if isinstance(step, Write):
            now += 1
        elif isinstance(step, Retrieve):
            hits += sum(written[chunk] in held[now] for chunk in step.chunks)
    assert hits / trace.asked == pytest.approx(replay(trace, policy(spec), capacity).hits / trace.asked, abs=0.05)


def test_dialogues_are_pairs_of_turns(tmp_path: Path) -> None:
    path = tmp_path / "talks.csv"
    path.write_text(
        'user 1 personas,user 2 personas,Best Generated Conversation\na,b,"User 1: Hi!\nUser 2: Ho!\nUser 1: Bye"\n'
    )
    assert dialogues(path) == [["User 1: Hi!\nUser 2: Ho!", "User 1: Bye"]]
