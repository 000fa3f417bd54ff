"""The chunks that left a window last are attended to as they are stored, and a recall brings others."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvbank
from memory_service.api.embedded import LocalServer
from model_worker.attachment.attachment import Attachment
from model_worker.errors import InputError
from model_worker.model import MemoryModel
from model_worker.model_settings import ModelOptions
from model_worker.remember.memory import Memory
from model_worker.remember.settings import MemoryOptions
from model_worker.window.cache import MemoryCache
from model_worker.window.recalled import RecalledChunk
from tests.support.diagonal import diagonal
from tests.worker.tiny import attached, bank, tokenizer, tokens, worst

Models = Callable[[str], PreTrainedModel]
CHUNK = 4


def stored(client: kvbank.Client, memory: Memory, name: str) -> list[RecalledChunk]:
    """Return all chunks of a bank as they come back from the service, in the order of their offsets."""
    ids = [chunk.chunk_id for chunk in sorted(client.list_chunks(name), key=lambda chunk: chunk.start)]
    fetched = client.fetch(name, ids, reader_digest=memory.attachment.reader.digest, tensors="torch")
    layers = memory.attachment.plan.memory_layers
    chunks = []
    for chunk in fetched:
        assert chunk.tensors is not None
        own = {n: (chunk.tensors[f"k.{n}"], chunk.tensors[f"v.{n}"], chunk.tensors[f"pos.{n}"]) for n in layers}
        chunks.append(RecalledChunk(chunk.chunk_id, chunk.start, own, chunk.token_ids))
    return chunks


def fed(attachment: Attachment, ids: Tensor, cache: MemoryCache, piece: int = CHUNK) -> Tensor:
    """Feed `ids` in pieces, and return the logits of the last one."""
    with torch.no_grad():
        for part in ids.split(piece, 1):
            logits: Tensor = attachment.model(part, past_key_values=cache).logits
    return logits


@pytest.mark.parametrize(("positions", "compressor"), diagonal(["zero", "continual", "original"], ["none", "tova:m=2"]))
def test_the_last_chunks_are_attended_to_as_the_bank_has_them(
    client: kvbank.Client, model: Models, positions: str, compressor: str
) -> None:
    """Logits without a search (min_score) are those of a cache that was given the bank's last two chunks."""
    name, ids = bank(), tokens(24)
    with attached(model("llama_gqa"), positions=positions) as attachment:
        options: MemoryOptions = {"chunk": CHUNK, "min_score": 2.0, "compressor": compressor}
        memory = Memory(attachment, client, name, tokenizer(), recent=2, **options)
        memory.open(dtype="bf16")
        cache = MemoryCache(attachment, memory, window=8)
        fed(attachment, ids[:, :20], cache)
        seen = fed(attachment, ids[:, 20:], cache)
        chunks = stored(client, memory, name)
        assert [chunk.start for chunk in chunks] == [0, 4, 8, 12]

        by_hand = MemoryCache(attachment, None, window=8)
        for at in range(0, 24, CHUNK):
            left = [chunk for chunk in chunks if chunk.start + CHUNK <= at - CHUNK]
            by_hand.set_memory([left[-2:]])
            with torch.no_grad():
                logits = attachment.model(ids[:, at : at + CHUNK], past_key_values=by_hand).logits
        assert cache.retrieved_tokens == by_hand.retrieved_tokens == (8 if compressor == "none" else 4)
        assert worst(seen, logits) <= 5e-6
        none = MemoryCache(attachment, None, window=8)
        assert worst(seen, fed(attachment, ids, none)) > 1e-3


def test_a_recall_brings_others(client: kvbank.Client, model: Models) -> None:
    """Chunks that are recent are the nearest here: the search gives the next best, in the order of attention."""
    name = bank()
    words = [[40, 41, 42, 43], [3, 80, 5, 6], [3, 80, 70, 6], [3, 80, 70, 60]]
    with attached(model("llama_gqa")) as attachment:
        memory = Memory(attachment, client, name, tokenizer(), chunk=CHUNK, recent=2, top_k=1)
        memory.open()
        cache = MemoryCache(attachment, memory, window=CHUNK)
        fed(attachment, torch.tensor(words).view(1, -1), cache)
        fed(attachment, torch.tensor([[3, 80, 70, 61]]), cache)  # pushes the fourth chunk out
        assert cache.retrieved_tokens == 3 * CHUNK
        chunks = stored(client, memory, name)
        expected = torch.cat([chunks[at].layers[0][0] for at in (1, 2, 3)], dim=1)
        assert torch.equal(cache.recalled.blocks[0].keys[0], expected)


def test_rows_of_a_batch_have_their_own(client: kvbank.Client, model: Models) -> None:
    """Rows that are padded on the left attend to what they attend to alone."""
    names = [bank(), bank()]
    long, short = tokens(21), tokens(13, seed=2)
    net = model("llama_gqa")
    with attached(net) as attachment:
        options: MemoryOptions = {"chunk": CHUNK, "recent": 2, "top_k": 1}
        memory = Memory(attachment, client, names, tokenizer(), **options)
        memory.open()
        cache = MemoryCache(attachment, memory, window=8)
        ids = torch.cat([long, torch.cat([torch.zeros(1, 8, dtype=torch.long), short], 1)])
        mask = (torch.arange(21) >= torch.tensor([[0], [8]])).long()
        with torch.no_grad():
            for at in range(0, 21, CHUNK):
                part = ids[:, at : at + CHUNK]
                logits = net(part, attention_mask=mask[:, : at + CHUNK], past_key_values=cache).logits
        assert [[chunk.start for chunk in row] for row in cache.recents] == [[8, 12], [0, 4]]

        alone = Memory(attachment, client, bank(), tokenizer(), **options)
        alone.open()
        own = MemoryCache(attachment, alone, window=8)
        assert worst(fed(attachment, short, own)[0, -1], logits[1, -1]) <= 1e-5


def test_they_need_no_service(tmp_path: Path, model: Models) -> None:
    """Services that go away take the search with them, not what left the window last."""
    server = LocalServer(tmp_path)
    with kvbank.connect(server.address) as client, attached(model("llama_gqa")) as attachment:
        memory = Memory(attachment, client, bank(), tokenizer(), chunk=CHUNK, recent=1, patience=1.0, min_score=2.0)
        memory.open()
        cache = MemoryCache(attachment, memory, window=8)
        fed(attachment, tokens(12), cache)
        assert cache.retrieved_tokens == CHUNK
        server.stop()
        with pytest.warns(RuntimeWarning, match="away"):
            fed(attachment, tokens(8, seed=2), cache)
        assert [chunk.start for chunk in cache.recents[0]] == [8]
        assert cache.retrieved_tokens == CHUNK
        assert torch.equal(cache.recalled.blocks[0].keys[0], cache.recents[0][0].layers[0][0])


def test_what_an_eviction_took_from_the_bank_stays_recent(client: kvbank.Client, model: Models) -> None:
    with attached(model("llama_gqa")) as attachment:
        memory = Memory(attachment, client, bank(), tokenizer(), chunk=CHUNK, recent=3)
        memory.open(capacity=kvbank.Capacity(chunks=2))
        cache = MemoryCache(attachment, memory, window=CHUNK)
        fed(attachment, tokens(32), cache)
        assert memory.stats.evicted > 0
        assert [chunk.start for chunk in cache.recents[0]] == [16, 20, 24]


def test_a_state_has_them(client: kvbank.Client, model: Models) -> None:
    ids = tokens(24)
    with attached(model("llama_gqa")) as attachment:
        memory = Memory(attachment, client, bank(), tokenizer(), chunk=CHUNK, recent=2, top_k=1)
        memory.open()
        cache = MemoryCache(attachment, memory, window=8)
        fed(attachment, ids[:, :18], cache)
        again = MemoryCache(attachment, memory, window=8, start=18 - cache.physical)
        again.restore({name: tensor.clone() for name, tensor in cache.state().items()})
        memory.link.pause_for(1000)  # both go on with what they have
        assert worst(fed(attachment, ids[:, 18:], cache), fed(attachment, ids[:, 18:], again)) <= 1e-6
        assert [chunk.passage for chunk in cache.recents[0]] == [chunk.passage for chunk in again.recents[0]]
        cache.reset()
        assert cache.recents == []
        assert cache.retrieved_tokens == 0


def test_losses_have_them(client: kvbank.Client, model: Models) -> None:
    """Losses fall back to those without a memory where neither search nor recent chunks bring anything."""
    text = tokens(40)[0].tolist()
    options: ModelOptions = {"chunk": CHUNK, "window": 8, "query": "past", "min_score": 2.0, "recent": 2}
    with MemoryModel(model("llama_gqa"), tokenizer(), memory=client, bank=bank(), **options) as recent:
        without = recent.losses(text, memory=None).nll
        with_them = recent.losses(text, memory=recent.memory).nll
        assert worst(without[:8], with_them[:8]) <= 1e-6  # nothing has left the window
        assert worst(without[8:], with_them[8:]) > 1e-3
        other = recent.with_bank(bank(), recent=0)
        assert worst(without, recent.losses(text, memory=other).nll) <= 1e-6


def test_the_setting(client: kvbank.Client, model: Models) -> None:
    net = model("llama_gqa")
    with pytest.raises(InputError, match="recent is at least 0, not -1"):
        MemoryModel(net, tokenizer(), memory=client, recent=-1)
    with pytest.raises(InputError, match="choose a smaller window, chunk, top_k or recent"):
        MemoryModel(net, tokenizer(), memory=client, chunk=8, window=64, top_k=4, recent=30)
    net.config.kvbank = {"recent": 3, "chunk": 8, "window": 64}
    try:
        with MemoryModel(net, tokenizer(), memory=client, bank=bank()) as made:
            assert made.memory.recent == 3
            assert made.with_bank(bank(), recent=0).recent == 0
    finally:
        del net.config.kvbank
