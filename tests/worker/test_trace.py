"""The trace of an answer: its masses are the weights of the model's own attention, and it changes no answer."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvbank
from model_worker.attachment.attachment import Attachment
from model_worker.errors import InputError
from model_worker.model import MemoryModel
from model_worker.remember.memory import Memory
from model_worker.window.cache import MemoryCache
from model_worker.window.recalled import Attended
from model_worker.window.trace import Trace
from model_worker.window.trace_table import age, origin
from tests.support.diagonal import rotated
from tests.worker import zoo
from tests.worker.tiny import ListMemory, attached, bank, tokenizer, tokens, worst

Models = Callable[[str], PreTrainedModel]
CHUNK = 4
TEXT = "w3 w80 w5 w6 w40 w41 w42 w43 w7 w8 w9 w10 w11 w12 w13 w14 w15 w16 w17 w18"


def fed(net: PreTrainedModel, pieces: list[Tensor], cache: MemoryCache, **options: Any) -> list[Any]:
    """Feed the pieces one after the other, and return what the model returns for each."""
    with torch.no_grad():
        return [net(piece, past_key_values=cache, **options) for piece in pieces]


def parts(weights: Tensor, sizes: list[int]) -> Tensor:
    """Return what each part of the keys receives, `[queries, parts]`, of eager weights `[1, H, Q, L]`."""
    return torch.stack([part.sum(-1) for part in weights.mean(1)[0].split(sizes, -1)], -1)


def sums(trace: Trace) -> list[float]:
    """Return for each layer what all masses of the trace sum to."""
    return [sum(masses) for masses in zip(trace.window, trace.sinks, *(c.mass for c in trace.chunks), strict=True)]


CASES = {
    "per_layer": ("llama_gqa", {"positions": "continual"}, 0, "score"),
    "heads of their own": ("llama_mha", {"positions": "original"}, 1, "time"),
    "memlong": ("llama_gqa", {"mode": "memlong", "memory_layers": [1], "retrieval_layers": [1, 3]}, 0, "score"),
    "gates": ("llama_gqa", {"mode": "memlong", "gates": {3: torch.tensor([0.2, 0.4, 0.6, 0.8])}}, 1, "score"),
    "memlong, recent": ("qwen3", {"mode": "memlong", "positions": "near:6"}, 2, "time"),
    "some layers": ("gemma", {"memory_layers": [0, 2]}, 1, "score"),
}


@pytest.mark.parametrize("case", rotated([*CASES], 1, every=2))
def test_masses_are_the_weights_of_eager_attention(client: kvbank.Client, model: Models, case: str) -> None:
    """Compare the masses under sdpa with what eager attention itself gives to the keys of each part."""
    name, options, recent, order = CASES[case]
    net, filler, question = model(name), tokens(24, seed=3), tokens(1, seed=4)

    def run(attachment: Attachment, **asked: Any) -> tuple[list[Any], list[list[Attended]], Trace]:
        memory = Memory(attachment, client, bank(), tokenizer(), chunk=CHUNK, top_k=2, recent=recent, order=order)
        memory.open()
        cache = MemoryCache(attachment, memory, window=8, sinks=2)
        fed(net, list(filler.split(CHUNK, 1)), cache)
        prompt, outputs, standing = torch.cat([filler[:, 2:5], question], 1), [], []
        with cache.trace(tokenizer()) as recorder:
            for piece in (prompt, question, question + 1, question + 2):
                outputs += fed(net, [piece], cache, **asked)
                standing.append(cache.recalled.chunks[0])
        return outputs, standing, recorder.trace()

    with attached(net, **options) as attachment:
        fast, _, trace = run(attachment)
    with attached(net, "eager", **options) as attachment:
        slow, standing, _ = run(attachment, output_attentions=True)
        plan = attachment.plan
    assert trace.layers == plan.retrieval_layers
    assert worst(fast[-1].logits, slow[-1].logits) <= 1e-5
    for at, layer in enumerate(plan.retrieval_layers):
        seen: list[dict[Any, Tensor]] = []
        for output, chunks in zip(slow, standing, strict=True):
            weights, before = output.attentions[layer], [2, *(own.tokens[plan.source(layer)] for own in chunks)]
            names = ["sinks", *(own.start for own in chunks), "window"]
            masses = parts(weights, [*before, weights.shape[-1] - sum(before)])
            seen.append(dict(zip(names, masses.T, strict=True)))
        assert len(seen[0]["window"]) == 4
        for name in {name for masses in seen for name in masses}:
            zero = torch.zeros(1)
            answer = [seen[0].get(name, zero)[-1:], *(masses.get(name, zero) for masses in seen[1:])]
            by_start = {chunk.start: chunk.mass[at] for chunk in trace.chunks}
            mass = {"sinks": trace.sinks[at], "window": trace.window[at], **by_start}[name]
            assert mass == pytest.approx(float(torch.cat(answer).mean()), abs=1e-5)
        step = trace.steps[0]
        found = [step.sinks[at], *(chunk.mass[at] for chunk in step.chunks), step.window[at]]
        assert found == pytest.approx([float(mass.mean()) for mass in seen[0].values()], abs=1e-5)
    assert (trace.steps[0].kind, trace.steps[0].tokens) == ("prompt", 4)
    assert sum(step.tokens for step in trace.steps if step.kind == "answer") == 3
    assert trace.tokens == 4
    assert sums(trace) == pytest.approx([1.0] * len(trace.layers), abs=1e-6)
    assert [chunk.total for chunk in trace.chunks] == sorted((c.total for c in trace.chunks), reverse=True)
    assert sum(chunk.recent for chunk in trace.steps[1].chunks) == recent


def test_a_trace_changes_no_bit_and_leaves_nothing_behind(model: Models) -> None:
    net = model("llama_gqa")
    ids = tokens(30)
    pieces = [*ids[:, :20].split(CHUNK, 1), *ids[:, 20:].split(1, 1)]
    with attached(net) as attachment:
        plain = fed(net, pieces, MemoryCache(attachment, ListMemory(CHUNK), window=8))
        cache = MemoryCache(attachment, ListMemory(CHUNK), window=8)
        with cache.trace(tokenizer()):
            traced = fed(net, pieces, cache)
        assert cache.recorder is None
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(plain, traced, strict=True))


def test_under_a_local_rule_it_changes_rounding_alone(client: kvbank.Client, model: Models) -> None:
    net, ids = model("llama_gqa"), tokens(24)[0].tolist()
    options: Any = {"chunk": CHUNK, "window": 16, "local": "tova:m=6", "sinks": 2}
    with MemoryModel(net, tokenizer(), memory=client, bank=bank(), **options) as worker:
        plain = worker.generate(ids, max_new_tokens=8, do_sample=False)
        cache = worker.cache(worker.with_bank(bank()))
        with worker.trace(cache) as recorder:
            assert worker.generate(ids, cache=cache, max_new_tokens=8, do_sample=False) == plain
        trace = recorder.trace()
    assert sums(trace) == pytest.approx([1.0] * 4, abs=1e-6)
    assert min(trace.sinks) > 0
    assert trace.chunks


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_parameters_that_are_sinks_and_soft_caps_count(family: str) -> None:
    """Compare with eager attention for a family whose own sinks take a share that no key has, and one of soft caps."""
    net = zoo.build(family)
    with attached(net, "eager") as attachment:
        cache = MemoryCache(attachment, ListMemory(CHUNK), window=8, sinks=0)
        fed(net, list(tokens(12).split(CHUNK, 1)), cache)
        with cache.trace(tokenizer()) as recorder:
            (output,) = fed(net, [tokens(1, seed=5)], cache, output_attentions=True)
        (step,) = recorder.trace().steps
        for layer, weights in enumerate(output.attentions):
            before = [own.tokens[layer] for own in cache.recalled.chunks[0]]
            expected = parts(weights, [*before, weights.shape[-1] - sum(before)])[0].tolist()
            masses = [*(chunk.mass[layer] for chunk in step.chunks), step.window[layer]]
            assert masses == pytest.approx(expected, abs=1e-5)
            assert step.sinks[layer] == pytest.approx(1 - sum(expected), abs=1e-5)
    assert (min(step.sinks) > 1e-3) == (family == "gpt_oss")


@pytest.fixture
def worker(client: kvbank.Client, model: Models) -> Iterator[MemoryModel]:
    options: Any = {"chunk": CHUNK, "window": 8, "top_k": 2, "metadata": {"source": "book"}, "sinks": 0, "cadence": 4}
    options |= {"min_share": 0.0}
    with MemoryModel(model("llama_gqa"), tokenizer(), memory=client, bank=bank(), **options) as worker:
        worker.read(TEXT)
        yield worker


def test_it_says_what_was_recalled_by_which_query(worker: MemoryModel) -> None:
    """Scores, texts, counts and times are those of the bank, and steps have the queries in their order."""
    began = datetime.now(UTC) - timedelta(minutes=1)
    cache = worker.cache()
    with worker.trace(cache) as recorder:
        worker.generate("w20 w21 w3 w80 w5", cache=cache, max_new_tokens=9, do_sample=False, eos_token_id=None)
    trace = recorder.trace()
    assert [step.kind for step in trace.steps] == ["prompt", "prompt", *["answer"] * (len(trace.steps) - 2)]
    assert trace.steps[0].query == "w20"
    assert trace.steps[1].query == "w21 w3 w80 w5"
    assert trace.steps[1].query_ids == (21, 3, 80, 5)
    assert len({step.query for step in trace.steps}) == 3  # after `cadence` tokens an answer asks on its own
    assert [step.begin for step in trace.steps[:3]] == [0, 1, 5]
    assert sum(step.tokens for step in trace.steps) == 5 + 8
    assert trace.tokens == 1 + 8
    assert trace.offset == 5
    bank_chunks = {chunk.chunk_id: chunk for chunk in worker.client.list_chunks(worker.memory.bank)}
    found = trace.steps[1].chunks[-1]  # the best match stands last
    best = trace.chunks[found.chunk]
    assert (best.text, best.start, best.tokens) == ("w3 w80 w5 w6", 0, 4)
    assert best.bank == worker.memory.bank
    assert found.score is not None
    assert found.score == max(chunk.score or 0.0 for chunk in trace.steps[1].chunks)
    for chunk in trace.chunks:
        assert chunk.text == bank_chunks[chunk.chunk_id].text
        assert chunk.metadata == {"source": "book"}
        assert chunk.created == bank_chunks[chunk.chunk_id].create_time
        assert chunk.created > began
        assert 0 <= (chunk.retrievals or 0) <= bank_chunks[chunk.chunk_id].retrieval_count
        places = [i for i, step in enumerate(trace.steps) for own in step.chunks if trace.chunks[own.chunk] is chunk]
        assert chunk.steps == tuple(places)
        assert chunk.share == pytest.approx(chunk.total / 4)
    document = json.loads(json.dumps(trace.to_json(), allow_nan=False))
    assert document["chunks"][found.chunk]["text"] == "w3 w80 w5 w6"
    assert document["steps"][1]["query"] == "w21 w3 w80 w5"
    assert document["chunks"][0]["share"] == pytest.approx(trace.chunks[0].share)


def test_one_in_some_tokens_may_stand_for_the_others(worker: MemoryModel) -> None:
    """Look at each token, and at one in four: that is the first of each step, as long as a step has no more."""
    traces = []
    for every in (1, 4):
        cache = worker.cache(worker.with_bank(worker.memory.bank, cadence=4, count=False))
        with worker.trace(cache, every=every) as recorder:
            text = worker.generate("w3 w80 w5", cache=cache, max_new_tokens=6, do_sample=False, eos_token_id=None)
        traces.append((text, recorder.trace()))
    (text, whole), (same, some) = traces
    assert text == same
    assert (some.tokens, some.offset, len(some.steps)) == (whole.tokens, whole.offset, len(whole.steps))
    assert [(step.tokens, step.query) for step in some.steps] == [(step.tokens, step.query) for step in whole.steps]
    assert sums(some) == pytest.approx([1.0] * 4, abs=1e-6)
    one = next(at for at, step in enumerate(whole.steps) if step.kind == "answer" and step.tokens == 1)
    assert some.steps[one].window == pytest.approx(whole.steps[one].window, abs=1e-6)
    longer = next(at for at, step in enumerate(whole.steps) if step.kind == "answer" and step.tokens > 1)
    assert some.steps[longer].window != pytest.approx(whole.steps[longer].window, abs=1e-6)


def test_the_table_has_the_best_chunks(worker: MemoryModel) -> None:
    cache = worker.cache()
    with worker.trace(cache) as recorder:
        worker.generate("w3 w80 w41", cache=cache, max_new_tokens=2, do_sample=False)
    lines = recorder.trace().table(chunks=1, width=60).splitlines()
    assert lines[0].split() == ["mass", "score", "from", "age", "text"]
    assert "book" in lines[1]
    assert lines[2].startswith("1 more chunk ")
    assert lines[-1] == "asked for: w3 w80 w41"
    assert max(map(len, lines)) <= 60


def test_origin_and_age_in_a_few_words() -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    assert origin({"turn": 3, "role": "user", "session": "sea"}, 7) == "turn 3, user"
    assert origin({"source": "a\nbook\x1b"}, 7) == "a book\\x1b"
    assert origin({}, 1200) == "token 1,200"
    ages = [age(now - timedelta(seconds=seconds), now) for seconds in (-5, 0, 59, 60, 7200, 86400, 172800)]
    assert ages == ["0 s", "0 s", "59 s", "1 min", "2 h", "1 day", "2 days"]
    assert age(None, now) == "-"


def test_chunks_that_are_not_found_by_a_search(client: kvbank.Client, model: Models) -> None:
    """Recent chunks have no score, and those of a restored window no name; both have their mass."""
    net = model("llama_gqa")
    with attached(net) as attachment:
        memory = Memory(attachment, client, bank(), tokenizer(), chunk=CHUNK, top_k=1, recent=1)
        memory.open()
        cache = MemoryCache(attachment, memory, window=8, sinks=0)
        fed(net, list(tokens(20).split(CHUNK, 1)), cache)
        again = MemoryCache(attachment, memory, window=8, sinks=0, start=20 - cache.physical)
        again.restore({name: tensor.clone() for name, tensor in cache.state().items()})
        memory.link.pause_for(1000)  # the service does not answer
        with cache.trace(tokenizer()) as named, again.trace(tokenizer()) as restored:
            for each in (cache, again):
                fed(net, [tokens(4, seed=9)], each)
    trace, other = named.trace(), restored.trace()
    (step,) = trace.steps
    assert step.answered is False
    recent, found = (next(c for c in step.chunks if c.recent is is_recent) for is_recent in (True, False))
    assert recent.score is None
    assert trace.chunks[recent.chunk].text == tokenizer().decode(tokens(20)[0, 12:16])
    assert "a recall was not answered" in trace.table()
    (unknown,) = (chunk for chunk in other.chunks if chunk.start < 0)
    assert (unknown.text, unknown.chunk_id) == ("", 0)
    assert other.steps[0].chunks[0].mass == pytest.approx(found.mass, abs=1e-5)
    assert "before the restart" in other.table()


def test_what_is_refused(client: kvbank.Client, worker: MemoryModel) -> None:
    cache = worker.cache()
    with worker.trace(cache) as recorder:
        with pytest.raises(InputError, match="traced already"), worker.trace(cache):
            pass
        with pytest.raises(InputError, match="no token came in"):
            recorder.trace()
        with pytest.raises(InputError, match="of one prompt, and this cache follows 2"):
            worker.generate(["w3", "w4"], cache=cache, max_new_tokens=1)
    with pytest.raises(InputError, match="cache is a MemoryCache"):
        worker.trace(None)  # type: ignore[arg-type]
