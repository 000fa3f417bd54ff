"""Compressors by name, and what every one of them promises (their numbers are checked in tests/golden)."""

import re
from collections.abc import Callable

import pytest
import torch
from tiny import ListMemory, attached, bank, build, tokenizer, tokens, worst
from torch import Tensor
from transformers import PreTrainedModel

import kvbank
from model_worker.attachment import Attachment
from model_worker.cache import MemoryCache, RecalledChunk
from model_worker.capture import Captured
from model_worker.compress import REGISTRY, Payload, compressor, usage
from model_worker.encoding import encode
from model_worker.errors import InputError
from model_worker.memory import Memory
from model_worker.selection import kept_positions

Models = Callable[[str], PreTrainedModel]
FAMILIES = ["llama_mha", "llama_gqa", "mistral", "qwen2", "qwen3", "gemma"]
DTYPES = [torch.float32, torch.bfloat16]
SIZE = 40
SELECTING = [  # the chunk's own K-V at the kept offsets
    "tova:m=N",
    "tova:m=N,observer=window:4",
    "tova:m=N,observer=all,heads=own",
    "h2o:m=N",
    "window:m=N",
    "sinks:m=N",
    "random:m=N,seed=3",
]
ENCODING = ["tova:m=N,block=8", "tova:m=N,block=3,heads=own", "homer:m=N,leaf=8", "homer:m=N,leaf=8,affix=probe"]


def test_all_methods_are_in_the_matrix() -> None:
    """But press, which is optional (test_press.py), and icae, whose adapter says how much it keeps
    (test_icae_compressor.py)."""
    elsewhere = {"none", "press", "icae"}
    assert {spec.partition(":")[0] for spec in SELECTING + ENCODING} == set(REGISTRY) - elsewhere


def compressed(attachment: Attachment, spec: str, ids: list[int]) -> tuple[Captured, Payload]:
    made = compressor(spec)
    chunk = encode(attachment, ids, needs_queries=made.needs_queries)
    return chunk, made.compress(chunk if not made.encodes else Captured(ids, 0, {}, "isolated"), attachment)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method(family: str, dtype: torch.dtype) -> None:
    """Exact budget, ascending offsets, the dtype and, where tokens are only selected, the chunk's own K-V, bit by bit.

    A chunk within the budget is stored as it is; what was made can be asked for again by its name.
    """
    ids = tokens(SIZE)[0].tolist()
    with attached(build(family).to(dtype), tokenizer=tokenizer()) as attachment:
        chunk = encode(attachment, ids, needs_queries=True)
        for form in SELECTING + ENCODING:
            for budget in (1, 7, SIZE + 5):
                spec = form.replace("N", str(budget))
                payload = compressor(spec).compress(chunk, attachment)
                assert compressor(payload.method) == compressor(spec)
                assert payload.layers.keys() == chunk.layers.keys()
                for layer, (keys, values, offsets) in payload.layers.items():
                    own = chunk.layers[layer]
                    assert keys.shape == values.shape == (own.keys.shape[0], min(budget, SIZE), own.keys.shape[2])
                    assert (keys.dtype, values.dtype, offsets.dtype) == (dtype, dtype, torch.int32)
                    assert offsets.shape in (keys.shape[1:2], keys.shape[:2])
                    assert bool((offsets.diff(dim=-1) > 0).all())
                    assert 0 <= int(offsets.min()) <= int(offsets.max()) < SIZE
                    if form in SELECTING:
                        assert torch.equal(keys, at(own.keys, offsets))
                        assert torch.equal(values, at(own.values, offsets))
                    elif budget >= SIZE:  # the online rule computes in other blocks
                        bound = 1e-5 if dtype == torch.float32 else 0.1
                        assert worst(keys, own.keys) <= bound * float(own.keys.abs().max())


def at(tensor: Tensor, offsets: Tensor) -> Tensor:
    """Tokens of `[H, S, D]` at `[m]` or `[H, m]`, without our own gather."""
    rows = offsets.long() if offsets.ndim == 2 else offsets.long().expand(tensor.shape[0], -1)
    return torch.stack([tensor[head, row] for head, row in enumerate(rows)])


@pytest.mark.parametrize("form", SELECTING + ENCODING)
def test_payloads_survive_the_service(client: kvbank.Client, form: str) -> None:
    """Written, read back and recalled bit by bit, per-head offsets included."""
    ids = tokens(SIZE)[0].tolist()
    for family, dtype in (("llama_gqa", torch.float32), ("qwen3", torch.bfloat16)):
        with attached(build(family).to(dtype), tokenizer=tokenizer()) as attachment:
            spec = form.replace("N", "6")
            _, payload = compressed(attachment, spec, ids)
            memory = Memory(attachment, client, bank(), tokenizer(), chunk=SIZE, compressor=spec, strict=True)
            memory.open()
            memory.remember([encode(attachment, ids, needs_queries=memory.needs_queries)])
            [[got]] = memory.recall([ids])  # type: ignore[misc]
            for layer, (keys, values, offsets) in payload.layers.items():
                assert torch.equal(got.layers[layer][0], keys)
                assert torch.equal(got.layers[layer][1], values)
                assert torch.equal(got.layers[layer][2], offsets)
            stored = client.get_chunk(memory.bank, got.chunk_id)
            assert stored.stored_length == 6
            assert stored.producer is not None
            assert (stored.producer.method, stored.producer.context) == (payload.method, "isolated")
            assert stored.producer.version == payload.version


@pytest.mark.parametrize("family", FAMILIES)
def test_moved_to_any_position(model: Models, family: str) -> None:
    """With all tokens kept, a payload at its place, and moved with what attends to it, is the original computation."""
    net, ids = model(family), tokens(SIZE + 6)
    with torch.no_grad(), attached(net, positions="original", tokenizer=tokenizer()) as attachment:
        plain = net(ids).logits[:, SIZE:]
        for form in SELECTING + ENCODING:
            _, payload = compressed(attachment, form.replace("N", str(SIZE)), ids[0, :SIZE].tolist())
            for place in (0, 1000):
                cache = MemoryCache(attachment, start=SIZE + place)
                cache.set_memory([[RecalledChunk(0, place, dict(payload.layers))]])
                logits = net(ids[:, SIZE:], past_key_values=cache).logits
                assert worst(logits, plain) <= 2e-4


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_some_tokens_moved(model: Models, heads: str) -> None:
    """A payload of some tokens at their offsets equals attention in which the others are masked out, head by head."""
    net, ids, size = model("llama_gqa"), tokens(30), 24
    with torch.no_grad(), attached(net, positions="original") as attachment:
        chunk, payload = compressed(attachment, f"tova:m=5,heads={heads}", ids[0, :size].tolist())
        cache = MemoryCache(attachment, start=size)
        cache.set_memory([[RecalledChunk(0, 0, dict(payload.layers))]])
        found = net(ids[:, size:], past_key_values=cache).logits
        whole = MemoryCache(attachment, start=size)
        everything = torch.arange(size)
        zeroed = {}
        for layer, (_, _, offsets) in payload.layers.items():
            own = chunk.layers[layer]
            kept = torch.zeros(own.keys.shape[:2], dtype=torch.bool)
            kept.scatter_(1, offsets.long().expand(kept.shape[0], -1), True)
            rope = attachment.ropes[layer]
            rotated = rope.rotate(own.keys[None], everything[None])[0]
            zeroed[layer] = (rotated, own.values, kept)
        expected = masked_forward(attachment, whole, ids[:, size:], zeroed)
    assert worst(found, expected) <= 1e-5


def masked_forward(
    attachment: Attachment, cache: MemoryCache, ids: Tensor, memory: dict[int, tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    """The model over rotated keys `[Hkv, S, D]` in front, of which each head sees only some; plain softmax."""
    from torch.nn.functional import scaled_dot_product_attention

    from model_worker.view import ForwardView

    class Masked(ForwardView):
        def attend(self, backend, module, query, key, value, mask, **kwargs):  # type: ignore[no-untyped-def]
            keys, values, kept = memory[module.layer_idx]
            groups, new = query.shape[1] // key.shape[1], query.shape[2]
            seen = torch.ones(new, new, dtype=torch.bool).tril().expand(key.shape[1], -1, -1)
            seen = torch.cat([kept[:, None].expand(-1, new, -1), seen], dim=2)
            key, value = torch.cat([keys[None], key], 2), torch.cat([values[None], value], 2)
            key, value, seen = (x.repeat_interleave(groups, d) for x, d in ((key, 1), (value, 1), (seen, 0)))
            out = scaled_dot_product_attention(query, key, value, seen[None], scale=kwargs["scaling"])
            return out.transpose(1, 2).contiguous(), None

    size = next(iter(memory.values()))[0].shape[1]
    positions = torch.arange(size, size + ids.shape[1])[None]
    return attachment.model(ids, position_ids=positions, use_cache=False, kvbank=Masked()).logits  # type: ignore[no-any-return]


def test_among_equal_scores_the_later_token_stays() -> None:
    assert kept_positions(torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2]), 2).tolist() == [3, 4]
    assert kept_positions(torch.tensor([0.3, 0.1, 0.2, 0.1, 0.1]), 4).tolist() == [0, 2, 3, 4]
    assert kept_positions(torch.tensor([0.1, 0.4, 0.1, 0.3, 0.1]), 3).tolist() == [1, 3, 4]
    assert kept_positions(torch.tensor([0.5, 0.5]), 7).tolist() == [0, 1]
    assert kept_positions(torch.tensor([[0.5, 0.1, 0.5], [0.1, 0.1, 0.1]]), 1).tolist() == [[2], [2]]


@pytest.mark.parametrize("form", ["tova:m=N", "tova:m=N,observer=all,heads=own", "h2o:m=N"])
def test_a_padded_row_is_compressed_as_it_is_alone(model: Models, form: str) -> None:
    net, ids, made = model("llama_gqa"), tokens(20, rows=2), compressor(form.replace("N", "6"))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad(), attached(net) as attachment:
        memory = ListMemory(20, recalls=False, queries=True)
        cache = MemoryCache(attachment, memory, window=20)
        net(ids, attention_mask=mask, past_key_values=cache)
        cache.flush()
        for [chunk], row in zip(memory.rows, (ids[0], ids[1, 7:]), strict=True):
            alone = made.compress(encode(attachment, row.tolist(), needs_queries=True), attachment)
            for layer, (keys, _, offsets) in made.compress(chunk, attachment).layers.items():
                assert torch.equal(offsets, alone.layers[layer][2])
                assert worst(keys, alone.layers[layer][0]) <= 2e-6


def attention_weights(attachment: Attachment, chunk: Captured, layer: int) -> Tensor:
    """All causal attention weights of a layer `[Hq, S, S]`, written out."""
    own, rope, positions = chunk.layers[layer], attachment.ropes[layer], torch.arange(len(chunk))[None]
    assert own.queries is not None
    keys, queries = (rope.rotate(x[None], positions)[0] for x in (own.keys, own.queries))
    groups = queries.shape[0] // keys.shape[0]
    scores = queries @ keys.repeat_interleave(groups, 0).transpose(1, 2) * attachment.reports[layer].scaling
    causal = torch.ones(len(chunk), len(chunk), dtype=torch.bool).tril()
    return scores.masked_fill(~causal, -torch.inf).softmax(-1)


def test_observers_and_heads(model: Models) -> None:
    """Who is asked, and for whom: against the attention matrix written out (more queries than one block holds)."""
    with attached(model("llama_gqa")) as attachment:
        chunk = encode(attachment, tokens(200, seed=5)[0].tolist() + tokens(80, seed=6)[0].tolist(), needs_queries=True)
        for layer, own in chunk.layers.items():
            weights = attention_weights(attachment, chunk, layer)
            for observer, rows in (("last", 1), ("window:7", 7), ("window:999", 280), ("all", 280)):
                mean = weights[:, -rows:].mean(1)
                shared = compressor(f"tova:m=9,observer={observer}").scores(own, layer, attachment)  # type: ignore[attr-defined]
                assert worst(shared, mean.mean(0)) <= 1e-6
                by_head = compressor(f"tova:m=9,observer={observer},heads=own").scores(own, layer, attachment)  # type: ignore[attr-defined]
                assert worst(by_head, mean.view(2, 2, -1).mean(1)) <= 1e-6
            h2o = compressor("h2o:m=9").compress(chunk, attachment).layers[layer][2]
            for head, heavy in enumerate(weights.sum(1).view(2, 2, -1).mean(1)):
                best = heavy[:275].topk(4).indices.sort().values.tolist()
                assert h2o[head].tolist() == [*best, 275, 276, 277, 278, 279]


def test_baselines(model: Models) -> None:
    with attached(model("llama_gqa")) as attachment:
        chunk = encode(attachment, tokens(12)[0].tolist())

        def kept(spec: str, layer: int = 0) -> list[int]:
            return compressor(spec).compress(chunk, attachment).layers[layer][2].tolist()  # type: ignore[no-any-return]

        assert kept("window:3") == [9, 10, 11]
        assert kept("sinks:m=6") == [0, 1, 2, 3, 10, 11]
        assert kept("sinks:m=6,sinks=1") == [0, 7, 8, 9, 10, 11]
        assert kept("sinks:m=2") == [0, 11]
        assert kept("random:m=5") == kept("random:m=5")
        assert kept("random:m=5") != kept("random:m=5,seed=1")
        assert kept("random:m=5") != kept("random:m=5", layer=1)


WRONG = ["tova", "tova:", "tova:m=x", "tova:m=-1", "tova:k=3", "tova:m=1,m=2", "tova:m=3,4", "none:m=1", "homer:leaf=8"]


@pytest.mark.parametrize("spec", WRONG)
def test_wrong_parameters_say_how_to_write_it(spec: str) -> None:
    with pytest.raises(InputError, match=re.escape(usage(spec.partition(":")[0]))):
        compressor(spec)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("tova:m=0", "at least 1"),
        ("tova:m=4,observer=first", "last, all or window"),
        ("tova:m=4,heads=some", "shared or own"),
        ("tova:m=4,block=0", "at least 1"),
        ("homer:m=0", "at least 1"),
        ("homer:m=8,affix=head", "tail or probe"),
        ("homer:m=8,mode=fast", "paper"),
        ("homer:m=8,suffix=9", "do not fit"),
        ("homer:m=8,prefix=8", "do not fit"),
        ("homer:m=8,suffix=3,affix=probe", "length of a tail"),
    ],
)
def test_values_that_make_no_sense(spec: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        compressor(spec)


def test_the_registry_describes_itself() -> None:
    """Every method can be written as its usage says, and says what it keeps, where it comes from and what it costs."""
    examples = {"none": "none", "press": "press:press=KnormPress,m=6", "icae": "icae:adapter=some/folder,payload=kv"}
    for name, method in REGISTRY.items():
        assert method.about
        assert method.paper
        assert method.cost
        spec = examples.get(name, f"{name}:m=6")
        assert compressor(spec).spec == spec
        assert usage(name).startswith(name)
    assert compressor("tova:6") == compressor("tova:m=6,observer=last")
    assert compressor("tova:m=6, heads=own").spec == "tova:m=6,heads=own"
    with pytest.raises(InputError, match=r"(?s)zip.*tova:m=N"):
        compressor("zip:m=2")
