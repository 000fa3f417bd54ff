"""The loop over a real service: what is written is what is read, and what does not fit is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import kvbank
from model_worker.attaching import attach
from model_worker.attachment.loading import load_model
from model_worker.embed import LexicalEmbedder
from model_worker.errors import BankMismatch, InputError, ModelNotFound
from model_worker.model import MemoryModel
from model_worker.remember.memory import Memory
from model_worker.window.cache import MemoryCache
from model_worker.window.encoding import encode
from tests.worker.tiny import attached, bank, build, tokenizer, tokens, worst

Models = Callable[[str], PreTrainedModel]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama_gqa", "gpt_neox"])
def test_read_back_bit_by_bit(client: kvbank.Client, family: str, dtype: torch.dtype) -> None:
    ids = tokens(6)[0].tolist()
    with attached(build(family).to(dtype)) as attachment:
        about = {"who": "test", "year": np.int64(2024), "final": True}
        memory = Memory(attachment, client, bank(), tokenizer(), chunk=6, metadata=about)
        memory.open()
        seen = encode(attachment, ids, start=30)
        memory.remember([seen])
        for _ in range(2):  # over the wire, then held
            [[got]] = memory.recall([ids])  # type: ignore[misc]
            assert got.start == 30
            for layer, (keys, values, offsets) in got.layers.items():
                assert keys.dtype == dtype
                assert torch.equal(keys, seen.layers[layer].keys)
                assert torch.equal(values, seen.layers[layer].values)
                assert offsets.tolist() == list(range(6))
        stored = client.get_chunk(memory.bank, got.chunk_id)
    assert stored.token_ids == tuple(ids)
    assert stored.text == " ".join(f"w{i}" for i in ids)
    assert stored.metadata == {"who": "test", "year": 2024, "final": True}
    assert stored.producer is not None
    assert (stored.producer.method, stored.producer.context) == ("none", "isolated")
    assert (stored.start, stored.original_length, stored.stored_length) == (30, 6, 6)
    assert (stored.retrieval_count, memory.stats.written, memory.stats.recalls) == (2, 1, 2)


def test_compressed_chunks(client: kvbank.Client) -> None:
    with attached(build("llama_gqa")) as attachment, torch.no_grad():
        memory = Memory(attachment, client, bank(), tokenizer(), chunk=8, compressor="tova:m=3", top_k=9)
        memory.open()
        cache = MemoryCache(attachment, memory, window=8)
        for part in tokens(32).split(8, 1):
            attachment.model(part, past_key_values=cache)
        assert cache.retrieved_tokens == 9
        cache.flush()
    assert {(c.original_length, c.stored_length) for c in client.list_chunks(memory.bank)} == {(8, 3)}
    assert memory.stats.stored_tokens / memory.stats.tokens == 3 / 8
    assert memory.stats.bytes_after * 8 == memory.stats.bytes_before * 3


def test_isolated_chunks_are_encoded_alone(client: kvbank.Client) -> None:
    """Chunks are encoded as MemLong does: a chunk stores the same whatever stood before the chunk."""
    ids = tokens(24)
    with attached(build("llama_gqa"), mode="memlong") as attachment, torch.no_grad():
        memory = Memory(attachment, client, bank(), tokenizer(), chunk=8, top_k=1)
        memory.open()
        cache = MemoryCache(attachment, memory, window=16)
        attachment.model(ids, past_key_values=cache)
        cache.flush()
        for start in (0, 8, 16):
            own = ids[0, start : start + 8].tolist()
            [[got]] = memory.recall([own])  # type: ignore[misc]
            assert got.start == start
            for layer, seen in encode(attachment, own).layers.items():
                assert torch.equal(got.layers[layer][0], seen.keys)


def test_recall_by_what_came_before_only(client: kvbank.Client) -> None:
    """Tokens to be predicted do not choose the memory with `past`; a query without a word finds nothing."""
    with attached(build("llama_gqa")) as attachment, torch.no_grad():
        memory = Memory(attachment, client, bank(), tokenizer(), chunk=4, query="past", top_k=1)
        memory.open()
        memory.remember([encode(attachment, [3, 4, 5, 6]), encode(attachment, [60, 61, 62, 63])])
        cache = MemoryCache(attachment, memory, window=8)
        attachment.model(torch.tensor([[60, 61, 62, 63]]), past_key_values=cache)
        assert cache.retrieved_tokens == 0
        attachment.model(torch.tensor([[3, 4, 5, 6]]), past_key_values=cache)
        [[by_the_past]] = memory.recall([[60, 61, 62, 63]])  # type: ignore[misc]
        assert torch.equal(cache.recalled.blocks[0].keys[0], by_the_past.layers[0][0])
        assert memory.recall([[]]) == [[]]


def test_a_filter_chooses_what_may_be_recalled(client: kvbank.Client) -> None:
    """Test that a chunk which the filter leaves out is not recalled, and is recalled again without the filter."""
    with attached(build("llama_gqa")) as attachment, torch.no_grad():
        memory = Memory(attachment, client, bank(), tokenizer(), chunk=4, top_k=1)
        memory.open()
        memory.remember([encode(attachment, [3, 4, 5, 6])])
        memory.remember([encode(attachment, [3, 9, 10, 11], start=4)])
        starts = []
        for memory.filter in (None, kvbank.Filter(start_from=4), kvbank.Filter(start_before=4), None):
            [[got]] = memory.recall([[3, 4, 5, 6]])  # type: ignore[misc]
            starts.append(got.start)
    assert starts == [0, 4, 0, 0]


@pytest.mark.parametrize(
    ("mode", "order", "starts"),
    [
        ("per_layer", None, [8, 4, 0]),
        ("per_layer", "time", [0, 4, 8]),
        ("memlong", None, [0, 4, 8]),
        ("memlong", "score", [8, 4, 0]),
    ],
)
def test_the_order_of_attention(client: kvbank.Client, mode: str, order: Any, starts: list[int]) -> None:
    """Test that the best match stands next to what is read, or the newest chunk as in MemLong."""
    with attached(build("llama_gqa"), mode=mode) as attachment, torch.no_grad():
        memory = Memory(attachment, client, bank(), tokenizer(), chunk=4, top_k=3, order=order)
        memory.open()
        for start, ids in enumerate(([3, 4, 5, 6], [3, 4, 5, 11], [3, 4, 12, 13])):
            memory.remember([encode(attachment, ids, start=4 * start)])
        [found] = memory.recall([[3, 4, 5, 6]])  # type: ignore[misc]
        assert [chunk.start for chunk in found] == starts
        cache = MemoryCache(attachment, memory)
        attachment.model(torch.tensor([[3, 4, 5, 6]]), past_key_values=cache)
        layer = attachment.plan.memory_layers[0]
        attended = cache.recalled.blocks[layer].offsets[0, 0, ::4]
        assert attended.tolist() == starts


def test_empty_bank_changes_nothing(client: kvbank.Client, model: Models) -> None:
    net, ids = model("qwen3"), tokens(10)
    with torch.no_grad():
        plain = net(ids).logits
        with attached(net) as attachment:
            memory = Memory(attachment, client, bank(), tokenizer(), chunk=4)
            memory.open()
            assert worst(net(ids, past_key_values=MemoryCache(attachment, memory)).logits, plain) <= 1e-6
            assert memory.stats.recalls == 1


def test_capacity_evicts(client: kvbank.Client) -> None:
    with MemoryModel(
        build("llama_gqa"),
        tokenizer(),
        memory=client,
        bank=bank(),
        chunk=4,
        window=8,
        top_k=2,
        capacity=kvbank.Capacity(chunks=6),
        patience=60,  # on a busy machine a call may take longer than the 2 seconds after which a memory does without
    ) as chat:
        chat.read(tokens(80)[0].tolist())
        usage = client.get_bank(chat.memory.bank).usage
        assert usage.chunks <= 6
        assert chat.memory.stats.evicted == usage.chunks_evicted == 20 - usage.chunks


def test_losses_in_a_stream(client: kvbank.Client) -> None:
    """Losses are the plain model's without a memory and with a window over all."""
    ids = tokens(40)
    net = build("llama_gqa")
    with torch.no_grad():
        logits = net(ids).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    with MemoryModel(net, tokenizer(), memory=client, bank=bank(), chunk=8, window=64, top_k=2) as chat:
        losses = chat.losses(ids[0].tolist(), memory=None)
        assert worst(losses.nll, expected) <= 2e-5
        assert losses.by_block().shape == (5,)
        assert client.get_bank(chat.memory.bank).usage.chunks == 0
        quiet = chat.with_bank(chat.memory.bank, query="past")
        chat.losses(ids[0].tolist(), memory=quiet)
        assert client.get_bank(chat.memory.bank).usage.chunks == 5


def open_memory(client: kvbank.Client, name: str, net: PreTrainedModel, **options: Any) -> None:
    settings = {k: options.pop(k) for k in ("dtype",) if k in options}
    embed = options.pop("embedder", None)
    with attached(net, **options) as attachment:
        Memory(attachment, client, name, tokenizer(), embedder=embed).open(**settings)


def test_bank_of_another_reader(client: kvbank.Client) -> None:
    name = bank()
    open_memory(client, name, build("llama_gqa"))
    open_memory(client, name, build("llama_gqa"))
    wanted = client.get_bank(name).kv
    assert wanted is not None
    with attached(build("llama_gqa", seed=1)) as attachment:
        other = attachment.reader.digest
        with pytest.raises(BankMismatch, match=rf"{wanted.reader_digest}.*{other}.*weights differ"):
            Memory(attachment, client, name, tokenizer()).open()
    with pytest.raises(BankMismatch, match=r"layers \(0, 1, 2, 3\).*\(0, 1\)"):
        open_memory(client, name, build("llama_gqa"), memory_layers=[0, 1])
    with pytest.raises(BankMismatch, match="stores fp32, not bf16"):
        open_memory(client, name, build("llama_gqa"), dtype="bf16")
    with pytest.raises(BankMismatch, match=f"{LexicalEmbedder().digest}.*{LexicalEmbedder(8).digest}"):
        open_memory(client, name, build("llama_gqa"), embedder=LexicalEmbedder(8))
    vectors = bank()
    client.create_bank(vectors, kv=None, embedding=kvbank.EmbeddingSpec("e", 4))
    with pytest.raises(BankMismatch, match="vectors only"):
        open_memory(client, vectors, build("llama_gqa"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"chunk": 8, "window": 4}, "smaller than a chunk"),
        ({"chunk": 64, "window": 200, "top_k": 4}, "exceed the 256"),
        ({"chunk": 0, "window": 8, "top_k": -1}, "at least 1"),
        ({"chunk": 4, "compressor": "zip"}, "unknown compressor"),
        ({"chunk": 4, "query": "future"}, "future"),
        ({"chunk": 4, "context": "none"}, "none"),
        ({"chunk": 4, "embed": "lexical:4"}, "lexical:d="),
        ({"chunk": 4, "attach_options": {"mode": "x"}}, "mode 'x'"),
    ],
)
def test_settings_that_make_no_sense(client: kvbank.Client, options: dict[str, Any], reason: str) -> None:
    """Refused at once, with the model as it was."""
    net = build("llama_gqa")
    with pytest.raises(InputError, match=reason):
        MemoryModel(net, tokenizer(), memory=client, bank=bank(), **options)
    assert net.config._attn_implementation == "sdpa"
    attach(net).detach()


def test_texts_that_make_no_sense(client: kvbank.Client) -> None:
    with MemoryModel(build("llama_gqa"), tokenizer(), memory=client, bank=bank(), chunk=4, window=8, top_k=2) as chat:
        for text in ("", []):
            with pytest.raises(InputError, match="empty"):
                chat.read(text)
        with pytest.raises(InputError, match="two tokens"):
            chat.losses([5], memory=None)
        with pytest.raises(InputError, match="no bank"):
            chat.with_bank([chat.memory.bank]).recall([[5], [6]])


def test_models_that_are_not_there(tmp_path: Path) -> None:
    for name, reason in (
        (str(tmp_path / "nothing"), "no model folder"),
        ("./nothing", "no model folder"),
        (str(tmp_path), r"no config\.json"),
    ):
        with pytest.raises(ModelNotFound, match=reason):
            load_model(name)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFound, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_folder_in_one_line(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of a memory may be named by a plain relative path, as the README shows."""
    monkeypatch.chdir(tmp_path)
    options = {"memory": Path("notes"), "bank": "a", "chunk": 16, "window": 64}
    with MemoryModel.from_pretrained(str(stories), **options) as chat:
        count = chat.read("Once upon a time there was a girl named Lily. She had a red ball and a small dog.")
        assert count > 16
    with MemoryModel.from_pretrained(str(stories), **options) as chat:
        text = chat.generate("Lily had a red", max_new_tokens=8, do_sample=False)
        assert text
        assert chat.memory.stats.recalls > 0
        assert chat.client.get_bank("a").usage.tokens == count


@pytest.mark.parametrize("option", ["chunk", "top_k", "window", "cadence", "query_tokens"])
def test_zero_is_not_the_default(client: kvbank.Client, model: Models, option: str) -> None:
    net = model("llama_gqa")
    with pytest.raises(InputError, match=r"at least 1|smaller than a chunk"):
        MemoryModel(net, tokenizer(), memory=client, bank=bank(), **{option: 0})
    assert net.config._attn_implementation == "sdpa"
