"""The worker's cache of payloads is bounded and never stale."""

from pathlib import Path

import pytest
import torch

import kvbank
from model_worker.remember.memory import Memory
from model_worker.remember.payload_cache import PayloadCache
from model_worker.window.encoding import encode
from model_worker.window.recalled import RecalledChunk
from tests.worker.tiny import attached, bank, build, tokenizer, tokens, worst

BYTES = 2 * 4 * 8 * 4 + 4 * 4  # keys and values [1, 4, 8] float32, offsets int32


def chunk(chunk_id: int, fill: float = 0.0) -> RecalledChunk:
    tensor = torch.full((1, 4, 8), fill)
    return RecalledChunk(chunk_id, 0, {0: (tensor, tensor.clone(), torch.arange(4, dtype=torch.int32))})


def test_least_recently_used_goes() -> None:
    cache = PayloadCache(max_bytes=3 * BYTES)
    for i in (1, 2, 3):
        cache.put("store", i, chunk(i))
    assert cache.get("store", 1, 1) is not None
    cache.put("store", 4, chunk(4))
    assert list(cache.held("store")) == [4, 1, 3]
    assert list(cache.held("store", limit=2)) == [4, 1]
    cache.put("store", 5, RecalledChunk(5, 0, {0: (torch.zeros(9, 9, 9),) * 3}))
    assert list(cache.held("store")) == [4, 1, 3]  # a payload over the bound is not kept, and pushes none out


def test_names_are_exact() -> None:
    cache = PayloadCache()
    cache.put("store", 7, chunk(1))
    assert cache.get("store", 1, 7) is not None
    assert cache.get("store", 1, 8) is None
    assert cache.get("other", 1, 7) is None
    assert cache.held("other") == {}


@pytest.mark.parametrize("room", [0, 3000, 1 << 20])
def test_recall_is_right_whatever_fits(client: kvbank.Client, room: int) -> None:
    """Also when new payloads push out, within one answer, some that the service left out as held."""
    with attached(build("llama_gqa")) as attachment:
        cache = PayloadCache(room)
        memory = Memory(attachment, client, bank(), tokenizer(), chunk=4, top_k=3, payload_cache=cache, order="time")
        memory.open()
        parts = [tokens(4, seed=s)[0].tolist() for s in range(6)]
        chunks = [encode(attachment, part) for part in parts]
        for seen in chunks:
            memory.remember([seen])
        for i in (0, 1, 2, 3, 4, 5, 2, 0, 5):
            [found] = memory.recall([parts[i] + parts[(i + 1) % 6]]) or [[]]
            assert len(found) == 3
            assert [c.chunk_id for c in found] == sorted(c.chunk_id for c in found)
            for got in found:
                own = next(c for c in chunks if torch.equal(c.layers[0].keys, got.layers[0][0]))
                assert all(torch.equal(got.layers[n][1], own.layers[n].values) for n in own.layers)


def test_what_is_held_is_not_sent_again(client: kvbank.Client) -> None:
    with attached(build("llama_gqa")) as attachment:
        memory = Memory(attachment, client, bank(), tokenizer(), chunk=4)
        memory.open()
        ids = tokens(4)[0].tolist()
        memory.remember([encode(attachment, ids)])
        [[first]], [[again]] = memory.recall([ids]) or [], memory.recall([ids]) or []
        assert again.layers is first.layers


def test_recreated_folder_is_another_store(tmp_path: Path) -> None:
    """Chunk ids, address and bank are the same, the contents are others: nothing old is served."""
    import shutil

    from memory_service.api.embedded import LocalServer

    payloads, net = PayloadCache(), build("llama_gqa")
    server = LocalServer(tmp_path / "data")
    address = server.address
    got = []
    with attached(net) as attachment, kvbank.connect(address) as client:
        memory = Memory(attachment, client, "notes", tokenizer(), chunk=4, payload_cache=payloads)
        for seed in (1, 2):
            memory.open()
            ids = [5, 6, 7, 8]
            seen = encode(attachment, tokens(4, seed=seed)[0].tolist())
            memory.remember([type(seen)(ids, 0, seen.layers, "window")])
            [[first]] = memory.recall([ids])  # type: ignore[misc]
            [[again]] = memory.recall([ids])  # type: ignore[misc]
            assert worst(first.layers[0][0], seen.layers[0].keys) == worst(again.layers[0][0], seen.layers[0].keys) == 0
            got.append(first)
            server.stop()
            shutil.rmtree(tmp_path / "data")
            server = LocalServer(tmp_path / "data", listen=address)
        server.stop()
    assert not torch.equal(got[0].layers[0][0], got[1].layers[0][0])
