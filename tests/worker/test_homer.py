"""HOMER around the numbers that tests/golden compares: what is refused, what is live at once, what is written."""

import json
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import kvbank
from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.attachment.loading import load_model
from model_worker.cli.homer import homer
from model_worker.compress import compressor
from model_worker.errors import InputError, UnsupportedModel
from model_worker.homer.bias import NONE, bias_key, load_bias, save_bias, user_folder
from model_worker.homer.calibrate import calibrate
from model_worker.homer.prompt import compress_prompt
from model_worker.homer.schedule import Node, Shape, plan
from model_worker.homer.tree import Step, Tokens, trees_of
from model_worker.model import MemoryModel
from model_worker.remember.forest import remember_forest
from model_worker.remember.memory import Memory
from model_worker.window.capture import Captured
from model_worker.window.encoding import encode
from tests.support.diagonal import diagonal
from tests.worker.tiny import BACKENDS, attached, bank, build, tokenizer, tokens, worst

Models = Callable[[str], PreTrainedModel]
FAMILIES = ["llama_mha", "llama_gqa", "llama_yarn", "mistral", "qwen2", "qwen3", "gemma"]


def nodes(node: Node) -> Iterator[Node]:
    for child in node.children or ():
        yield from nodes(child)
    yield node


def test_balanced_trees_keep_what_they_may() -> None:
    """Exactly the target at the root, no node over its capacity, even leaves, every layer once on every path."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(2000):
        layers, prefix, suffix = draw(1, 12), draw(0, 5), draw(1, 5)
        affixes = prefix + suffix
        chunk, context = affixes + draw(1, 40), draw(1, 400)
        merges = (None, 1, 2)[draw(0, 2)]
        shape = Shape(
            chunk,
            affixes + draw(0, chunk - affixes),
            draw(0, layers - 1),
            affixes + draw(1, 40),
            merges=merges,
        )
        found = plan(shape, layers, prefix, context, suffix)
        root = found.root
        assert root.kept == min(shape.target, affixes + context)
        leaves = [n for n in nodes(root) if n.children is None]
        sizes = [end - begin for begin, end in (n.context for n in leaves)]
        assert sum(sizes) == context
        assert found.stride == max(sizes)
        assert 1 <= min(sizes) >= max(sizes) - 1
        for n in nodes(root):
            without = n.children is not None and (n.last - n.first).bit_length() <= found.without
            assert (n.begin == n.end) == without
            assert n.length <= shape.chunk or n.children is None
            for child in n.children or ():
                assert child.end == n.begin
                assert child.kept <= child.length
            if n.children:
                assert n.length == sum(c.kept for c in n.children) - affixes
        assert (leaves[0].begin, root.end) == (0, layers)
        per_leaf = (shape.leaf or shape.chunk) - affixes
        assert max(sizes) <= per_leaf or len(leaves) * 2 > context  # no bound but the tokens themselves
        if merges is not None:
            assert (len(leaves) - 1).bit_length() - found.without <= merges


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"suffix": 0}, "suffix has at least one"),
        ({"context": 0}, "no context"),
        ({"prefix": 12, "suffix": 4}, "no room beside 16"),
        ({"leaf": 5}, "a leaf of 5 tokens has no room"),
        ({"warmup": 8}, "warmup 8"),
        ({"target": 4}, "cannot hold the 5 affix"),
        ({"context": 200, "warmup": 6, "mode": "paper"}, "32 leaves need a layer for each of 6 heights, but 2"),
        ({"context": 9, "leaf": 7, "mode": "paper"}, "do not fill 8 leaves"),
        ({"mode": "fast"}, "paper"),
        ({"merges": 0}, "merges=0"),
        ({"merges": 1, "mode": "paper"}, "balanced trees only"),
    ],
)
def test_what_cannot_be_a_tree(changes: dict[str, int | str], reason: str) -> None:
    """Prompts like these crash, or silently give something else, in the authors' code."""
    values: dict[str, int | str | None] = {"chunk": 16, "target": 16, "warmup": 2, "leaf": None, "mode": "balanced"}
    lengths: dict[str, int] = {"prefix": 2, "context": 20, "suffix": 3}
    for name, value in changes.items():
        (lengths if name in lengths else values)[name] = value  # type: ignore[index]
    with pytest.raises(InputError, match=reason):
        plan(Shape(**values), 8, **lengths)  # type: ignore[arg-type]


@pytest.mark.parametrize(("family", "backend"), diagonal(FAMILIES, BACKENDS, every=2))
def test_one_leaf_is_a_plain_forward(model: Models, family: str, backend: str) -> None:
    net, ids = model(family), tokens(30)[0].tolist()
    with torch.no_grad(), attached(net, backend) as attachment:
        plain = net(torch.tensor([ids])).logits[0]
        prompt = compress_prompt(attachment, ids[:4], ids[4:25], ids[25:], size=64)
        assert prompt.positions.tolist() == prompt.origins.tolist() == list(range(30))
        assert worst(prompt.next_logits, plain[-1]) <= 1e-5
        chunk = encode(attachment, ids)
        for layer, own in chunk.layers.items():
            rotated = attachment.ropes[layer].rotate(own.keys[None], torch.arange(30)[None])
            assert worst(prompt.cache().layers[layer].keys, rotated) <= 1e-5
            assert worst(prompt.cache().layers[layer].values[0], own.values) <= 1e-5
        expected = net.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, 30:].tolist()
        assert prompt.generate(6, do_sample=False) == expected
        assert prompt.generate(1) == expected[:1]
        assert len(prompt.generate(5, do_sample=True)) == 5


def test_a_text_ends_where_its_first_token_says_so() -> None:
    net, ids = build("llama_gqa"), tokens(30)[0].tolist()
    assert net.generation_config is not None
    with torch.no_grad(), attached(net) as attachment:
        prompt = compress_prompt(attachment, ids[:4], ids[4:25], ids[25:], size=64)
        [first, *_, last] = whole = prompt.generate(6, do_sample=False)
        assert prompt.generate(6, do_sample=False, eos_token_id=first) == [first]
        assert prompt.generate(6, do_sample=False, eos_token_id=[0, first]) == [first]
        assert prompt.generate(6, do_sample=False, generation_config=GenerationConfig(eos_token_id=first)) == [first]
        assert prompt.generate(6, do_sample=False, eos_token_id=last) == whole
        net.generation_config.eos_token_id = first
        assert prompt.generate(6, do_sample=False) == [first]
        assert prompt.generate(6, do_sample=False, eos_token_id=None) == whole
        with pytest.raises(InputError, match="at least 1"):
            prompt.generate(0)


def test_the_prefix_runs_once_and_only_wanted_layers_travel(model: Models) -> None:
    net, ids = model("llama_gqa"), tokens(200)[0].tolist()
    rows: list[int] = []

    def watch(step: Step) -> None:
        assert set(step.left.keys) == {2} & set(range(step.node.end))

    with attached(net) as attachment:
        trees = trees_of(attachment)
        handle = net.base_model.layers[0].register_forward_hook(lambda m, a, out: rows.append(out.shape[1]))
        try:
            built = trees.build(Shape(20, 20, 0), ids[:6], ids[6:190], ids[190:], wanted=[2], watch=watch)
        finally:
            handle.remove()
    leaves = [n for n in nodes(built.plan.root) if n.children is None]
    assert len(leaves) == 64
    assert built.plan.without == 3  # six heights, three of four layers left for them
    assert rows == [6, *(n.length - 6 for n in leaves)]


@pytest.mark.slow
def test_peak_memory_grows_with_the_logarithm_of_the_length() -> None:
    """Finished left halves wait, at most one per height; a + b log2(length) fits what is live better than a line."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    torch.manual_seed(0)
    lengths = [56 << height for height in range(1, 7)]
    with attached(LlamaForCausalLM(config).eval()) as attachment:
        peaks = [live_at_peak(attachment, length) for length in lengths]
    print("live K-V bytes at the peak, by length:", dict(zip(lengths, peaks, strict=True)))
    errors = [residual(x, peaks) for x in ([math.log2(n) for n in lengths], [float(n) for n in lengths])]
    assert errors[0] < 0.5 * errors[1]
    assert peaks[-1] < 3 * peaks[0]  # for 32 times the length


def live_at_peak(attachment: Attachment, length: int) -> float:
    """Return the most bytes of K-V that finished nodes hold at once."""
    finished: list[weakref.ref[Tokens]] = []
    live: list[int] = []

    def watch(step: Step) -> None:
        finished.append(weakref.ref(step.left))
        waiting = [found for ref in finished if (found := ref()) is not None]
        assert len(waiting) <= step.node.last.bit_length() + 1
        live.append(sum(x.nbytes for t in waiting for x in (*t.keys.values(), *t.values.values())))

    ids = tokens(length)[0].tolist()
    trees_of(attachment).build(Shape(64, 64, 1), ids[:4], ids, ids[-4:], watch=watch)
    assert len(finished) == 2 * (length // 56) - 1
    return float(max(live))


def residual(x: list[float], y: list[float]) -> float:
    """Sum of squares that the best line through `(x, y)` leaves."""
    design = torch.stack([torch.ones(len(x)), torch.tensor(x)], dim=1).double()
    target = torch.tensor(y, dtype=torch.float64)[:, None]
    return float((design @ torch.linalg.lstsq(design, target).solution - target).square().sum())


def test_models_that_are_refused(model: Models) -> None:
    """Models are not refused by name: what is run layer by layer has to be what the model does."""
    with attached(model("gpt_neox")) as attachment, pytest.raises(UnsupportedModel, match="layer by layer"):
        trees_of(attachment)
    net = build("llama_gqa")
    with attached(net) as attachment:
        compress_prompt(attachment, [], [5, 6], [7], size=64)
    net.base_model.layers[1].register_forward_pre_hook(lambda m, args: (args[0] * 1.5, *args[1:]))
    own = net.base_model.forward

    def scaled_between(*args: object, **kwargs: object) -> object:  # something that the decoder does around its layers
        out = own(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state * 1.3 + 0.1
        return out

    net.base_model.forward = scaled_between
    with attached(net) as attachment, pytest.raises(UnsupportedModel, match="differs from itself"):
        trees_of(attachment)
    dynamic = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=97,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )
    with attached(LlamaForCausalLM(dynamic).eval()) as attachment, pytest.raises(UnsupportedModel, match="dynamic"):
        trees_of(attachment)
    with attached(model("mistral_sliding")) as attachment, pytest.raises(InputError, match="sliding window of 16"):
        compress_prompt(attachment, [], tokens(40)[0].tolist(), [5], size=64)
    with attached(model("llama_gqa")) as attachment, pytest.raises(InputError, match="trained for 256"):
        compress_prompt(attachment, [], tokens(300)[0].tolist(), [5], size=512)


def test_a_long_prompt(model: Models) -> None:
    """Prompts of many times the size end in exactly that size, and decoding goes on behind it."""
    net, ids = model("qwen3"), tokens(900)[0].tolist()
    with torch.no_grad(), attached(net) as attachment:
        for mode, size in (("balanced", 65), ("paper", 140)):
            prompt = compress_prompt(attachment, ids[:5], ids[5:890], ids[890:], size=size, warmup=0, mode=mode)
            assert len(prompt) == size - (mode == "paper")  # the paper halves an odd capacity downwards
            assert prompt.last_position < size + attachment.trained_length // 2
            assert prompt.origins.tolist() == sorted(set(prompt.origins.tolist()))
            assert prompt.origins[:5].tolist() == [0, 1, 2, 3, 4]
            assert prompt.origins[-10:].tolist() == list(range(890, 900))
            assert len(prompt.generate(4, do_sample=False)) == 4


def test_heights_without_layers_drop_by_what_the_leaves_measured(model: Models) -> None:
    """Tokens that stay are the best of all leaves, by a significance written out here; pooled, their neighbours come
    with them."""
    net, ids = model("llama_gqa"), tokens(70, seed=4)[0].tolist()
    prefix, context, suffix = ids[:2], ids[2:66], ids[66:]
    with torch.no_grad(), attached(net) as attachment:
        trees = trees_of(attachment)
        for pool in (1, 5):
            # four leaves of 16 run layers 0 and 1; a capacity of 32 drops nothing before the heights meet
            found = trees.build(Shape(38, 22, 2, 22, merges=1), prefix, context, suffix, pool=pool)
            assert found.plan.without == 1
            scores = []
            for at in range(0, 64, 16):
                leaf = prefix + context[at : at + 16] + suffix
                own = encode(attachment, leaf, needs_queries=True).layers[2]
                rope, positions = attachment.ropes[2], torch.arange(len(leaf))[None]
                keys, queries = (rope.rotate(x[None], positions)[0] for x in (own.keys, own.queries))
                logit = (queries[:, -1:] @ keys.repeat_interleave(2, 0).transpose(1, 2))[:, 0].amax(0)[2:18]
                padded = torch.nn.functional.pad(logit, (pool // 2,) * 2, value=-torch.inf)
                scores.append(padded.unfold(0, pool, 1).amax(-1))
            entered = [  # each pair of leaves is cut to 16 context tokens without a layer between, later ones at a tie
                32 * pair + int(i)
                for pair, of in enumerate((torch.cat(scores[:2]), torch.cat(scores[2:])))
                for i in torch.sort(of, stable=True).indices[16:]
            ]
            kept = [int(i) - 2 for i in found.tokens.origins[:-4]]
            assert set(kept) <= set(entered)
            assert len(kept) == 16


def test_asking_again_is_a_forward_of_the_suffix(model: Models) -> None:
    """Over the tokens that were left, at their positions, as a plain forward with a cache computes it."""
    net, ids = model("qwen3"), tokens(120)[0].tolist()
    parts = ids[:3], ids[3:110], ids[110:]
    with torch.no_grad(), attached(net) as attachment:
        options = {"size": 40, "warmup": 0}
        first, again = (compress_prompt(attachment, *parts, **options, again=x) for x in (False, True))  # type: ignore[arg-type]
        assert torch.equal(first.positions, again.positions)
        cache = first.cache()
        for held in cache.layers:
            held.keys, held.values = held.keys[:, :, :-10], held.values[:, :, :-10]
        logits = net(torch.tensor([parts[2]]), position_ids=first.positions[None, -10:], past_key_values=cache).logits
        assert worst(again.next_logits, logits[0, -1]) <= 1e-6
        for mine, theirs in zip(again.cache().layers, cache.layers, strict=True):
            assert worst(mine.keys, theirs.keys) <= 1e-6
            assert worst(mine.values, theirs.values) <= 1e-6
        assert worst(first.next_logits, again.next_logits) > 1e-3
        assert len(again.generate(3, do_sample=False)) == 3
        whole = compress_prompt(attachment, *parts, size=200, again=True)  # one leaf: asking again changes nothing
        plain = net(torch.tensor([ids])).logits[0, -1]
        assert worst(whole.next_logits, plain) <= 1e-5
        with pytest.raises(InputError, match="ask again"):
            compress_prompt(attachment, *parts, **options, mode="paper", again=True)  # type: ignore[arg-type]
        for pool, mode in ((2, "balanced"), (0, "balanced"), (3, "paper")):
            with pytest.raises(InputError, match="odd"):
                compress_prompt(attachment, *parts, size=80, warmup=0, pool=pool, mode=mode)


def test_forest_roots_are_written_as_they_finish(client: kvbank.Client) -> None:
    ids = tokens(150)[0].tolist()
    with attached(build("llama_gqa"), tokenizer=tokenizer()) as attachment:
        memory = Memory(
            attachment, client, bank(), tokenizer(), chunk=40, compressor="homer:m=12,leaf=8", top_k=9, strict=True
        )
        memory.open()
        for count, done in enumerate(remember_forest(memory, ids, 40, start=1000), start=1):
            stored = list(client.list_chunks(memory.bank))
            assert len(stored) == count
            assert sum(c.original_length for c in stored) == done
        assert [(c.start, c.original_length, c.stored_length) for c in stored] == [
            (1000, 40, 12),
            (1040, 40, 12),
            (1080, 40, 12),
            (1120, 30, 12),
        ]
        [found] = memory.recall([ids])  # type: ignore[misc]
        [second] = [chunk for chunk in found if chunk.start == 1040]
        payload = memory.compressor.compress(encode(attachment, ids[40:80]), attachment)
        assert torch.equal(second.layers[3][0], payload.layers[3][0])
        memory.compressor = compressor("tova:m=3")
        with pytest.raises(InputError, match="homer"):
            next(remember_forest(memory, ids, 40))


def test_reading_with_a_compressor_that_runs_the_model(client: kvbank.Client) -> None:
    """`read` does not run the model twice: what the compressor makes is what one tree a chunk makes."""
    text = tokens(90)[0].tolist()
    for spec in ("homer:m=8,leaf=8", "tova:m=8,block=4"):
        net, calls = build("llama_gqa"), []
        with MemoryModel(net, tokenizer(), memory=client, bank=bank(), chunk=30, window=60, compressor=spec) as chat:
            net.base_model.register_forward_hook(lambda m, a, out, c=calls: c.append(1))
            chat.read(text)
            assert len(calls) <= (1 if spec[:5] == "homer" else 3 * 8)  # the self-test; 8 blocks a chunk
            stored = list(client.list_chunks(chat.memory.bank))
            assert [(c.start, c.original_length, c.stored_length) for c in stored] == [(s, 30, 8) for s in (0, 30, 60)]
            assert {c.producer.context for c in stored if c.producer} == {"isolated"}
            assert chat.memory.stats.bytes_after * 30 == chat.memory.stats.bytes_before * 8


@pytest.fixture
def data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_table_belongs_to_one_model_and_scaling(model: Models, data_home: Path) -> None:
    ids = tokens(60)[0].tolist()
    with attached(model("llama_gqa")) as attachment:
        made = compressor("homer:m=8,leaf=8")
        plain = made.compress(encode(attachment, ids), attachment)
        assert load_bias(attachment, "auto") == load_bias(attachment, "none") == NONE
        steep = torch.arange(256.0).expand(4, -1) * 100  # near tokens win by far
        path = save_bias(attachment, steep, {"name": "test"})
        assert path.parent == user_folder()
        assert str(path).startswith(str(data_home))
        found = load_bias(attachment, "auto")
        assert found.table is not None
        assert torch.equal(found.table, steep)
        biased = made.compress(encode(attachment, ids), attachment)
        assert biased.version == f"1+bias.{found.id}" != plain.version
        assert biased.layers[0][2].tolist() != plain.layers[0][2].tolist()
        without = compressor("homer:m=8,leaf=8,bias=none").compress(encode(attachment, ids), attachment)
        assert without.layers[0][2].tolist() == plain.layers[0][2].tolist()
        key = bias_key(attachment)
    for other in ("llama_mha", "llama_yarn"):
        with attached(model(other)) as attachment:
            assert bias_key(attachment) != key
            assert load_bias(attachment, "auto") == NONE
            with pytest.raises(InputError, match=key):
                load_bias(attachment, str(path))
            with pytest.raises(InputError, match="no bias table"):
                load_bias(attachment, str(data_home / "nothing"))


def test_calibration_is_the_mean_by_distance(model: Models) -> None:
    """Against logits written out; smoothed over nine distances; the same text gives the same table."""
    distances, sinks = 40, 4
    ids = tokens(3 * 44 + 7, seed=9)[0].tolist()
    with attached(model("llama_gqa")) as attachment:
        found = calibrate(attachment, ids, distances=distances, enough=0.0)
        assert found.segments == 3
        assert found.table.shape == (4, distances)
        assert 0 < found.error < 1
        for layer in range(4):
            values: list[list[float]] = [[] for _ in range(distances)]
            for at in (0, 44, 88):
                own = encode(attachment, ids[at : at + 44], needs_queries=True).layers[layer]
                rope, positions = attachment.ropes[layer], torch.arange(44)[None]
                keys, queries = (rope.rotate(x[None], positions)[0] for x in (own.keys, own.queries))
                scores = queries @ keys.repeat_interleave(2, 0).transpose(1, 2) * attachment.reports[layer].scaling
                for end in range(22, 44):
                    for token in range(sinks, end + 1):
                        if end - token < distances:
                            values[end - token].append(float(scores[:, end, token].max()))
            mean = torch.tensor([sum(v) / len(v) for v in values])
            padded = torch.cat([mean[1:2].expand(4), mean[1:], mean[-1:].expand(4)])
            assert worst(found.table[layer], torch.cat([mean[:1], padded.unfold(0, 9, 1).mean(1)])) <= 1e-4
        assert calibrate(attachment, ids, distances=distances, enough=10.0).segments == 2
        with pytest.raises(InputError, match="less than one segment"):
            calibrate(attachment, ids[:20], distances=distances)


def test_what_cannot_be_read_or_written_is_told_before_the_model_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for options, words in (
        (["--text", tmp_path / "none.txt"], "cannot read"),
        (["--text", tmp_path / "latin.txt"], "cannot read"),
        (["--text", tmp_path], "cannot read"),
        (["--out", tmp_path], "cannot write"),
        (["--out", tmp_path / "latin.txt" / "table"], "cannot write"),
    ):
        given = ["calibrate", *options, "--model", tmp_path / "model"]
        done = CliRunner().invoke(homer, [str(argument) for argument in given])
        assert isinstance(done.exception, InputError)
        assert f"{words} {options[1]}" in str(done.exception)
        assert "\n" not in str(done.exception)


def test_rope_scaling(tmp_path: Path) -> None:
    """PI, NTK and YaRN multiply the trained length, are readers of their own, and carry trees beyond it."""
    net = build("llama_gqa", positions=64)
    net.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    digests, keys, ids = set(), set(), tokens(220)[0].tolist()
    for rope in (None, "linear:2", "ntk:2", "yarn:2"):
        loaded, words = load_model(str(tmp_path), rope=rope)
        assert loaded.config.max_position_embeddings == (64 if rope is None else 128)
        attachment = attach(loaded, words)
        prompt = compress_prompt(attachment, ids[:4], ids[4:210], ids[210:], warmup=0)
        assert len(prompt) == (32 if rope is None else 64)
        assert len(prompt.generate(3, do_sample=False)) == 3
        digests.add(attachment.reader.digest)
        keys.add(bias_key(attachment))
        if rope == "ntk:2":
            assert loaded.config.rope_parameters["rope_theta"] == pytest.approx(10000.0 * 2 ** (8 / 6))
    assert len(digests) == len(keys) == 4
    for wrong in ("dynamic:2", "yarn", "yarn:0.5"):
        with pytest.raises(InputError, match="write linear:F"):
            load_model(str(tmp_path), rope=wrong)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="not scaled further"):
        load_model(str(tmp_path), rope="yarn:2")


def test_affixes_fit_into_every_budget(model: Models) -> None:
    """Given or not, what is stored of them counts; the probe is not stored; the tail always is."""
    ids = tokens(60)[0].tolist()
    with attached(model("llama_gqa"), tokenizer=tokenizer()) as attachment:

        def offsets(options: str) -> list[int]:
            payload = compressor(f"homer:{options},leaf=10").compress(Captured(ids, 0, {}), attachment)
            return payload.layers[3][2].tolist()  # type: ignore[no-any-return]

        for options in ("m=16,suffix=16", "m=16,suffix=1", "m=16,prefix=15", "m=16,prefix=3,suffix=4", "m=16,width=3"):
            assert len(offsets(options)) == 16
        assert offsets("m=16,suffix=16") == list(range(44, 60))
        assert offsets("m=16,prefix=15") == [*range(15), 59]
        assert offsets("m=16,prefix=3,suffix=4")[:3] == [0, 1, 2]
        assert offsets("m=16,prefix=3,suffix=4")[-4:] == [56, 57, 58, 59]
        probed = offsets("m=16,affix=probe,prefix=2")
        assert probed[:2] == [0, 1]
        assert len(probed) == 16
        assert len(offsets("m=16,mode=paper,warmup=0")) <= 16
    with attached(model("llama_gqa")) as attachment, pytest.raises(InputError, match="tokenizer"):
        compressor("homer:m=16,affix=probe").compress(Captured(ids, 0, {}), attachment)
