"""ICAE as a compressor: what is stored, what is not compressed, and how other workers read it."""

import gc
import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import kvbank
from memory_service.api.embedded import LocalServer
from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.attachment.digest import reader_of, state_token
from model_worker.compress import Payload, compressor
from model_worker.compress.icae import adapter_of
from model_worker.errors import BankMismatch, InputError, ModelNotFound
from model_worker.evaluate.compression import Plan, measure
from model_worker.homer.tree import trees_of
from model_worker.icae import Icae, IcaeConfig, Slots, answer, loss, restore
from model_worker.icae.expanded import expanded
from model_worker.remember import stored
from model_worker.remember.memory import Memory
from model_worker.remember.spool import Spool, Spooled
from model_worker.window.cache import MemoryCache
from model_worker.window.capture import Captured
from model_worker.window.encoding import encode
from model_worker.window.recalled import RecalledChunk
from tests.support.diagonal import diagonal, rotated
from tests.worker.tiny import attached, bank, build, tokenizer, tokens, worst
from tests.worker.worker_process import worker

Models = Callable[[str], PreTrainedModel]
Adapter = Callable[..., str]
FAMILIES = ["llama_mha", "llama_gqa", "mistral", "qwen2", "qwen3", "gemma"]
SLOTS, SIZE = 4, 40  # 40 tokens are three spans of at most 16: 12 slots
KEPT = 12


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """Make the folder of an adapter for a model, with random weights that matter, once for the same words."""
    made: dict[object, tuple[str, PreTrainedModel]] = {}  # with the model, whose id is another's once it is gone

    def get(model: PreTrainedModel, seed: int = 0, **config: object) -> str:
        words = (id(model), seed, *sorted(config.items()))
        if words not in made:
            icae = Icae.create(model, IcaeConfig(slots=SLOTS, **config), rank=4, seed=seed)  # type: ignore[arg-type]
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for name, parameter in icae.encoder.named_parameters():
                    if "lora_B" in name:
                        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            folder = tmp_path_factory.mktemp("adapter")
            icae.save_pretrained(folder)
            made[words] = str(folder), model
        return made[words][0]

    return get


def compressed(attachment: Attachment, spec: str, ids: list[int]) -> Payload:
    return compressor(spec).compress(Captured(ids, 0, {}, "isolated"), attachment)


def ids_of(seed: int, count: int = SIZE) -> list[int]:
    return tokens(count, seed=seed)[0].tolist()  # type: ignore[no-any-return]


def opened(attachment: Attachment, client: kvbank.Client, spec: str, **options: object) -> Memory:
    memory = Memory(attachment, client, bank(), tokenizer(), chunk=SIZE, compressor=spec, strict=True, **options)  # type: ignore[arg-type]
    memory.open()
    return memory


def remembered(memory: Memory, *seeds: int, count: int = SIZE) -> list[kvbank.Chunk]:
    """Chunks of random text, as the service has them."""
    known = {chunk.chunk_id for chunk in memory.client.list_chunks(str(memory.bank))}
    for at, seed in enumerate(seeds):
        memory.remember([Captured(ids_of(seed, count), at * count, {}, "isolated")])
    return [chunk for chunk in memory.client.list_chunks(str(memory.bank)) if chunk.chunk_id not in known]


# -- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"),
    diagonal(FAMILIES, {"fp32": torch.float32, "bf16": torch.bfloat16}, first=1, every=2),
)
def test_every_family(adapter: Adapter, family: str, dtype: torch.dtype) -> None:
    """Soft tokens are the adapter's slots; K-V are what a plain forward over them makes, or the encoder's own."""
    net = build(family).to(dtype)
    folders = {form: adapter(net, interface=form, positions="spread") for form in ("soft", "kv")}
    with attached(net, tokenizer=tokenizer()) as attachment:
        reports = attachment.reports
        for form, folder in folders.items():
            icae = adapter_of(attachment, folder)
            with torch.no_grad():
                [own] = icae.encode([ids_of(1)])
            for kind in ("soft", "kv"):
                if (form, kind) == ("kv", "soft"):
                    continue
                payload = compressed(attachment, f"icae:adapter={folder},payload={kind}", ids_of(1))
                assert compressor(payload.method).spec == payload.method
                assert payload.adapter_digest == icae.digest
                assert payload.measured_loss == float(loss(icae, own, ids_of(1)))
                if kind == "soft":
                    assert (payload.layers, payload.version) == ({}, "1")
                    assert payload.soft is not None
                    assert own.soft is not None
                    assert payload.soft.dtype == dtype
                    assert torch.equal(payload.soft, own.soft)
                    continue
                assert payload.soft is None
                assert payload.version == ("1+decoder" if form == "soft" else "1+encoder")
                assert payload.layers.keys() == set(range(len(reports)))
                for layer, (keys, values, offsets) in payload.layers.items():
                    shape = (reports[layer].kv_heads, KEPT, reports[layer].head_dim)
                    assert (keys.shape, values.shape, keys.dtype, values.dtype) == (shape, shape, dtype, dtype)
                    assert (offsets.dtype, offsets.shape) == (torch.int32, (KEPT,))
                    if form == "soft":
                        assert offsets.tolist() == list(range(KEPT))
                    else:
                        assert own.layers is not None
                        assert torch.equal(keys, own.layers[layer][0])
                        assert torch.equal(values, own.layers[layer][1])
                        assert offsets.tolist() == own.positions.tolist() != list(range(KEPT))


def test_a_chunk_beyond_the_models_positions_is_stored_uncompressed(client: kvbank.Client, adapter: Adapter) -> None:
    """Spans of the chunk are three: 12 slots, a row and 40 tokens. Nothing is measured beyond, and no text ends for
    that."""
    net = build("llama_gqa", positions=53)
    folder = adapter(net)
    with attached(net, tokenizer=tokenizer()) as attachment:
        memory = opened(attachment, client, f"icae:{folder}")
        [fits] = remembered(memory, 1)
        [beyond] = remembered(memory, 1, count=41)
        assert fits.producer is not None
        assert beyond.producer is not None
        assert (fits.kind, fits.stored_length) == ("soft_tokens", KEPT)
        assert fits.producer.measured_loss is not None
        assert (beyond.kind, beyond.stored_length, beyond.producer.method) == ("layer_kv", 41, "none")
        assert beyond.producer.measured_loss is None


@pytest.mark.parametrize(
    ("chunk", "reason"),
    [
        (7, "7 tokens are fewer than twice their 4 slots"),
        (8, None),
        (41, None),  # shorter ones, cut at the end of a sentence, are compressed
        (79, None),
        (81, r"81 tokens needs 106 positions .* this model has 53: at most 40 tokens"),
    ],
)
def test_chunks_of_which_none_could_be_compressed(
    client: kvbank.Client, adapter: Adapter, chunk: int, reason: str | None
) -> None:
    net = build("llama_gqa", positions=53)
    spec = f"icae:{adapter(net)}"
    with attached(net, tokenizer=tokenizer()) as attachment:
        memory = Memory(attachment, client, bank(), tokenizer(), chunk=chunk, compressor=spec, strict=True)
        if reason is None:
            memory.open()
            return
        with pytest.raises(InputError, match=f"chunks of {chunk} tokens are not compressed: .*{reason}"):
            memory.open()


def test_the_smaller_payload_unless_one_is_asked_for(model: Models, adapter: Adapter) -> None:
    """Hidden 32, one K-V head of 8: 16 numbers a layer. Soft tokens win ties."""
    folder = adapter(model("gemma"))
    for layers, form in (([1], "kv"), ([1, 2], "soft"), ([0, 1, 2], "soft")):
        with attached(model("gemma"), mode="per_layer", memory_layers=layers) as attachment:
            payload = compressed(attachment, f"icae:{folder}", ids_of(1))
            assert (payload.soft is not None) == (form == "soft")
            assert payload.layers.keys() == (set(layers) if form == "kv" else set())
            other = "kv" if form == "soft" else "soft"
            asked = compressed(attachment, f"icae:adapter={folder},payload={other}", ids_of(1))
            assert (asked.soft is not None) == (other == "soft")


def test_what_is_recorded_and_what_it_takes(client: kvbank.Client, model: Models, adapter: Adapter) -> None:
    """Service and statistics count 32 numbers a slot, where K-V of a token are 4 layers of 2 * 2 * 8."""
    folder = adapter(model("llama_gqa"))
    with attached(model("llama_gqa"), tokenizer=tokenizer()) as attachment:
        memory = opened(attachment, client, f"icae:{folder}")
        [chunk] = remembered(memory, 1)
        icae = adapter_of(attachment, folder)
        assert chunk.producer is not None
        with torch.no_grad():
            lost = float(loss(icae, icae.encode([ids_of(1)])[0], ids_of(1)))
        assert chunk.producer == kvbank.Producer(f"icae:adapter={folder}", "1", "isolated", icae.digest, lost)
        assert (chunk.kind, chunk.original_length, chunk.stored_length) == ("soft_tokens", SIZE, KEPT)
        assert client.get_bank(str(memory.bank)).kv.reader_digest == attachment.reader.digest  # type: ignore[union-attr]
        stats = memory.stats
        assert (stats.tokens, stats.stored_tokens) == (SIZE, KEPT)
        assert (stats.bytes_before, stats.bytes_after) == (SIZE * 4 * 2 * 2 * 8 * 4, KEPT * 32 * 4)


@pytest.mark.parametrize(("count", "short"), [(7, True), (8, False), (15, False), (16, False), (17, False)])
def test_a_chunk_shorter_than_twice_its_slots_is_not_compressed(
    model: Models, adapter: Adapter, count: int, short: bool
) -> None:
    """Spans of up to 16 tokens have 4 slots."""
    folder = adapter(model("llama_gqa"))
    with attached(model("llama_gqa")) as attachment:
        payload = compressed(attachment, f"icae:{folder}", ids_of(1, count))
        assert (payload.soft is None) == short
        if not short:
            return
        assert (payload.method, payload.adapter_digest, payload.measured_loss) == ("none", "", None)
        plain = encode(attachment, ids_of(1, count))
        for layer, (keys, values, offsets) in payload.layers.items():
            assert torch.equal(keys, plain.layers[layer].keys)
            assert torch.equal(values, plain.layers[layer].values)
            assert offsets.tolist() == list(range(count))


def test_every_length_makes_a_payload_that_the_service_takes(
    client: kvbank.Client, model: Models, adapter: Adapter
) -> None:
    """Also where the last span is short, and spread slots would share a place."""
    folder = adapter(model("llama_gqa"), rate=3, interface="kv", positions="spread")
    with attached(model("llama_gqa"), tokenizer=tokenizer()) as attachment:
        spans = adapter_of(attachment, folder).spans
        memory = opened(attachment, client, f"icae:{folder}")
        for length, last, kept in ((23, 11, 8), (24, 12, 8), (25, 7, 12), (110, 11, 40), (111, 3, 111), (112, 4, 40)):
            assert spans(length)[-1].stop - spans(length)[-1].start == last
            [chunk] = remembered(memory, 1, count=length)
            assert chunk.stored_length == kept


def test_a_chunk_that_is_restored_badly_is_stored_uncompressed(
    client: kvbank.Client, model: Models, adapter: Adapter
) -> None:
    """Losses of two chunks lie on both sides of the guard; what was measured is recorded of both."""
    folder = adapter(model("llama_gqa"))
    with attached(model("llama_gqa"), tokenizer=tokenizer()) as attachment:
        open_ = opened(attachment, client, f"icae:{folder}")
        lost = [chunk.producer.measured_loss for chunk in remembered(open_, 1, 2)]  # type: ignore[union-attr]
        assert lost[0] is not None
        assert lost[1] is not None
        worse = int(lost[1] > lost[0])
        guarded = opened(attachment, client, f"icae:adapter={folder},guard={(lost[0] + lost[1]) / 2:.6f}")
        chunks = remembered(guarded, 1, 2)
        assert [chunk.kind for chunk in chunks] == [("layer_kv", "soft_tokens")[i != worse] for i in (0, 1)]
        producer = chunks[worse].producer
        assert producer == kvbank.Producer("none", "1", "isolated", measured_loss=lost[worse])
        assert all(guarded.compressor.has_made(chunk.producer, SIZE, attachment) for chunk in chunks)
        assert not open_.compressor.has_made(chunks[1 - worse].producer, SIZE, attachment)
        [found] = guarded.recall([ids_of(1) + ids_of(2)]) or [[]]
        assert [len(chunk.layers[0][2]) for chunk in found] == [(SIZE, KEPT)[i != worse] for i in (0, 1)]


def test_slots_that_are_no_numbers_are_not_stored(tmp_path: Path, adapter: Adapter) -> None:
    net = build("llama_gqa")
    icae = Icae.from_pretrained(net, adapter(net))
    with torch.no_grad():
        icae.memory[0, 0] = math.nan
    icae.save_pretrained(tmp_path)
    with attached(net) as attachment:
        payload = compressed(attachment, f"icae:{tmp_path}", ids_of(1))
        assert (payload.method, payload.measured_loss) == ("none", None)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_the_attached_model_is_not_changed(model: Models, adapter: Adapter) -> None:
    net = model("llama_gqa")
    folders = [adapter(net), adapter(net, interface="kv")]
    with attached(net, tokenizer=tokenizer()) as attachment, torch.no_grad():
        before, plain, state = reader_of(net, tokenizer()), net(tokens(9)).logits, state_token(net)
        for folder in folders:
            compressed(attachment, f"icae:{folder}", ids_of(1))
        attachment.check_unchanged()
        assert state_token(net) == state
        assert reader_of(net, tokenizer()) == before == attachment.reader
        assert torch.equal(net(tokens(9)).logits, plain)
        assert adapter_of(attachment, folders[0]) is adapter_of(attachment, folders[0])


def test_an_attachment_goes_with_what_is_known_of_it(adapter: Adapter) -> None:
    """Trees and adapters are found by their attachment, and do not keep it and its model alive."""
    net = build("llama_gqa")
    folder = adapter(build("llama_gqa"))
    attachment = attach(net)
    assert trees_of(attachment) is trees_of(attachment)
    assert adapter_of(attachment, folder) is adapter_of(attachment, folder)
    gone = weakref.ref(attachment), weakref.ref(net)
    del attachment, net
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_an_adapter_of_another_base_is_refused_before_the_first_chunk(
    client: kvbank.Client, model: Models, adapter: Adapter, tmp_path: Path
) -> None:
    other = build("llama_gqa", seed=1)
    folder = adapter(other)
    with attached(model("llama_gqa")) as attachment:
        with pytest.raises(InputError, match="trained for another base") as refusal:
            opened(attachment, client, f"icae:{folder}")
        assert reader_of(other).digest in str(refusal.value)
        with pytest.raises(ModelNotFound, match="is not an ICAE adapter"):
            opened(attachment, client, f"icae:{tmp_path}")
        with pytest.raises(InputError, match="makes K-V, no soft tokens"):
            opened(attachment, client, f"icae:adapter={adapter(model('llama_gqa'), interface='kv')},payload=soft")
    with pytest.raises(InputError, match="auto, soft or kv"):
        compressor("icae:adapter=a,payload=both")
    with pytest.raises(InputError, match="icae:adapter=ADAPTER"):
        compressor("icae")


def test_a_bank_of_before_there_were_soft_tokens(client: kvbank.Client, model: Models, adapter: Adapter) -> None:
    """Chunks for such a bank are K-V, and that is said where soft tokens were asked for."""
    folder = adapter(model("llama_gqa"))
    with attached(model("llama_gqa"), tokenizer=tokenizer()) as attachment:
        memory = opened(attachment, client, "none")
        older = client.get_bank(str(memory.bank))
        assert older.kv is not None
        assert older.kv.hidden_size == 32
        name = bank()
        client.create_bank(name, kv=replace(older.kv, hidden_size=0), embedding=older.embedding)
        of_it = Memory(attachment, client, name, tokenizer(), chunk=SIZE, compressor=f"icae:{folder}", strict=True)
        of_it.open()
        [chunk] = remembered(of_it, 1)
        assert chunk.producer is not None
        assert (chunk.kind, chunk.producer.method) == ("layer_kv", f"icae:adapter={folder},payload=kv")
        stubborn = Memory(attachment, client, name, tokenizer(), compressor=f"icae:adapter={folder},payload=soft")
        with pytest.raises(BankMismatch, match="takes no soft tokens"):
            stubborn.open()
        wider = bank()
        client.create_bank(wider, kv=replace(older.kv, hidden_size=64), embedding=older.embedding)
        with pytest.raises(BankMismatch, match="soft tokens of 64 numbers, this model reads 32"):
            Memory(attachment, client, wider, tokenizer()).open()


# -- how it is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", rotated(FAMILIES, 1))
def test_attention_to_one_chunk_is_what_the_model_reads(model: Models, adapter: Adapter, family: str) -> None:
    """Recalled at its own places, a chunk of soft tokens gives the logits of one forward over slots and text."""
    net, ids = model(family), tokens(6, seed=9)
    folder = adapter(net)
    with torch.no_grad(), attached(net, positions="original", tokenizer=tokenizer()) as attachment:
        payload = compressed(attachment, f"icae:adapter={folder},payload=soft", ids_of(1))
        assert payload.soft is not None
        cache = MemoryCache(attachment, start=KEPT)
        cache.set_memory([[RecalledChunk(0, 0, expanded(payload.soft, attachment))]])
        found = net(ids, past_key_values=cache).logits
        embeds = torch.cat([payload.soft[None], net.get_input_embeddings()(ids)], dim=1)
        expected = net(inputs_embeds=embeds).logits[:, KEPT:]
        assert worst(found, expected) <= 2e-4
        assert worst(net(ids).logits, expected) > 0.1


@pytest.mark.parametrize("family", ["llama_gqa", "qwen3"])
def test_soft_tokens_are_recalled_as_the_keys_and_values_that_would_have_been_stored(
    client: kvbank.Client, model: Models, adapter: Adapter, family: str
) -> None:
    """Bit by bit, and the same when the worker has them already; beside a chunk that was not compressed."""
    folder = adapter(model(family))
    with attached(model(family), tokenizer=tokenizer()) as attachment:
        memory = opened(attachment, client, f"icae:adapter={folder},payload=soft", top_k=3)
        remembered(memory, 1, 2)
        [short] = remembered(memory, 3, count=7)
        assert short.kind == "layer_kv"
        kv = compressed(attachment, f"icae:adapter={folder},payload=kv", ids_of(2))
        for _ in range(2):
            [chunks] = memory.recall([ids_of(1)[:9] + ids_of(2)[:9] + ids_of(3, 7)]) or [[]]
            assert [len(chunk.layers[0][2]) for chunk in chunks] == [KEPT, KEPT, 7]
            assert chunks[1].start == SIZE
            for layer, parts in kv.layers.items():
                assert all(torch.equal(a, b) for a, b in zip(chunks[1].layers[layer], parts, strict=True))
        cache = MemoryCache(attachment)
        cache.set_memory([chunks])
        assert cache.retrieved_tokens == 2 * KEPT + 7
        with torch.no_grad():
            assert bool(attachment.model(tokens(5), past_key_values=cache).logits.isfinite().all())


@pytest.mark.parametrize("interface", [pytest.param("soft", marks=pytest.mark.slow), "kv"])
def test_several_chunks_are_read_exactly(
    client: kvbank.Client, model: Models, adapter: Adapter, interface: str
) -> None:
    """Restored and asked from the service as from the slots at hand, in any order, an uncompressed one among them."""
    folder = adapter(model("qwen3"), interface=interface, positions="spread", prefix_ids=(5, 6))
    with torch.no_grad(), attached(model("qwen3"), tokenizer=tokenizer()) as attachment:
        memory = opened(attachment, client, f"icae:{folder}")
        ids = [chunk.chunk_id for chunk in (*remembered(memory, 1, 2), *remembered(memory, 3, count=7))]
        icae = adapter_of(attachment, folder)
        own = icae.encode([ids_of(1), ids_of(2)])
        got = memory.slots([ids[1], ids[0]], icae)
        assert [restore(icae, slots) for slots in got] == [restore(icae, slots) for slots in reversed(own)]
        assert restore(icae, own[0]) != restore(icae, own[1])
        assert answer(icae, got, [7, 8], max_new_tokens=9) == answer(icae, own[::-1], [7, 8], max_new_tokens=9)
        assert answer(icae, own, [7, 8], max_new_tokens=9) != answer(icae, own[::-1], [7, 8], max_new_tokens=9)
        [whole] = memory.slots(ids[2:], icae)
        places = torch.arange(7)
        if interface == "soft":
            expected = Slots(icae.embed(ids_of(3, 7)), None, (7,), places)
        else:
            plain = encode(attachment, ids_of(3, 7)).layers
            expected = Slots(None, {n: (layer.keys, layer.values) for n, layer in plain.items()}, (7,), places)
        said = answer(icae, [expected, *own[::-1]], [7], max_new_tokens=9)
        assert answer(icae, [whole, *got], [7], max_new_tokens=9) == said


def test_chunks_of_which_no_slots_can_be_had(client: kvbank.Client, model: Models, adapter: Adapter) -> None:
    net = model("llama_gqa")
    mine, other, pairs = adapter(net), adapter(net, seed=1), adapter(net, interface="kv")
    with attached(net, tokenizer=tokenizer()) as attachment:
        memory = opened(attachment, client, f"icae:{mine}")
        [chunk] = remembered(memory, 1)
        digests = [adapter_of(attachment, folder).digest for folder in (mine, other)]
        with pytest.raises(BankMismatch, match=f"another ICAE adapter .digest {digests[0]}, this one is {digests[1]}"):
            memory.slots([chunk.chunk_id], adapter_of(attachment, other))
        for spec, reason in ((f"icae:adapter={mine},payload=kv", "payload=soft"), ("tova:m=6", "stored by 'tova:m=6'")):
            memory.compressor = compressor(spec)
            captured = encode(attachment, ids_of(2), needs_queries=True)
            memory.remember([replace(captured, start=memory.stats.tokens)])
            *_, last = client.list_chunks(str(memory.bank))
            with pytest.raises(InputError, match=reason):
                memory.slots([last.chunk_id], adapter_of(attachment, mine))
        tensors = stored.tensors_of(compressor("none").compress(captured, attachment), torch.float32)
        new = kvbank.NewChunk(memory.embedder.embed(["w5"])[0], tensors, producer=kvbank.Producer("none"))
        of = {"reader_digest": attachment.reader.digest, "embedder_digest": memory.embedder.digest}
        written = client.write(str(memory.bank), new, **of)
        with pytest.raises(InputError, match="its tokens are not stored"):
            memory.slots([written.chunk_id], adapter_of(attachment, mine))
    with attached(net, tokenizer=tokenizer(), memory_layers=[1, 2]) as attachment:
        memory = opened(attachment, client, f"icae:{pairs}")
        [chunk] = remembered(memory, 1)
        with pytest.raises(InputError, match=r"layers \(1, 2\) alone"):
            memory.slots([chunk.chunk_id], adapter_of(attachment, pairs))


def test_soft_tokens_wait_in_the_spool(client: kvbank.Client, model: Models, adapter: Adapter, tmp_path: Path) -> None:
    with attached(model("llama_gqa"), tokenizer=tokenizer()) as attachment:
        memory = opened(attachment, client, f"icae:{adapter(model('llama_gqa'))}", spool=Spool(tmp_path))
        payload = memory.compressor.compress(Captured(ids_of(2), 0, {}, "isolated"), attachment)
        producer = kvbank.Producer(payload.method, adapter_digest=payload.adapter_digest, measured_loss=0.5)
        tensors = stored.tensors_of(payload, torch.float32)
        new = kvbank.NewChunk(memory.embedder.embed(["w5"])[0], tensors, original_length=SIZE, producer=producer)
        assert memory.spool is not None
        memory.spool.put(Spooled(str(memory.bank), new, attachment.reader.digest, memory.embedder.digest))
        assert memory.deliver_spooled()
        [known] = client.list_chunks(str(memory.bank))
        [got] = client.fetch(str(memory.bank), [known.chunk_id], reader_digest=attachment.reader.digest)
        assert (got.kind, got.producer) == ("soft_tokens", producer)
        assert got.tensors is not None
        assert got.tensors["soft"].tobytes() == tensors["soft"].numpy().tobytes()


@pytest.mark.slow
def test_another_worker_restores_what_was_stored(tmp_path: Path, adapter: Adapter, model: Models) -> None:
    """Text, slots, service, another process: the same text as from the slots here. Without peft it can still attend."""
    net = model("llama_gqa")
    folder, other = adapter(net), adapter(net, seed=1)
    name = bank()
    with (
        LocalServer(tmp_path) as server,
        kvbank.connect(server.address) as client,
        attached(net, tokenizer=tokenizer()) as attachment,
    ):
        memory = Memory(attachment, client, name, tokenizer(), chunk=SIZE, compressor=f"icae:{folder}", strict=True)
        memory.open()
        remembered(memory, 1, 2)
        icae = adapter_of(attachment, folder)
        with torch.no_grad():
            own = icae.encode([ids_of(1), ids_of(2)])
        process = worker("slots", server.address, name, folder, other)
        try:
            found = json.loads(process.communicate(timeout=120)[0])
        finally:
            process.kill()
        assert found["restored"] == [restore(icae, slots) for slots in own]
        assert found["answer"] == answer(icae, own, [7, 8], max_new_tokens=9)
        assert adapter_of(attachment, folder).digest in found["refused"]
        sums = [expanded(slots.soft, attachment) for slots in own if slots.soft is not None]
        assert found["sums"] == [float(sum(k.double().sum() for k, _, _ in layers.values())) for layers in sums]


def test_its_cost_can_be_measured_like_that_of_others(model: Models, adapter: Adapter) -> None:
    net = model("llama_gqa")
    folder = adapter(net)
    methods = [f"icae:adapter={folder},payload={form}" for form in ("soft", "kv")]
    documents = [ids_of(seed, SIZE + 8) for seed in (1, 2)]
    rows = measure(net, tokenizer(), documents, Plan(SIZE, 8, [KEPT], methods))
    nothing, _, soft, kv = rows
    assert soft.loss == kv.loss != nothing.loss
    assert (soft.bytes_per_token, kv.bytes_per_token) == (KEPT * 32 * 4 / SIZE, KEPT * 4 * 32 * 4 / SIZE)
