"""Round trips through the real service, by both clients."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import kvbank

Make = Callable[..., kvbank.NewChunk]
MakeBank = Callable[..., str]
Check = Callable[[kvbank.Chunk, kvbank.NewChunk], None]
Unit = Callable[[int], np.ndarray]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_chunk_comes_back_to_the_bit(
    client: kvbank.Client,
    make_bank: MakeBank,
    make_chunk: Make,
    digests: dict[str, str],
    assert_equal: Check,
    unit: Unit,
    dtype: str,
) -> None:
    bank, new = make_bank(dtype), make_chunk(3, dtype)
    written = client.write(bank, new, **digests)
    assert written == kvbank.WriteResult(written.chunk_id, replayed=False, gone=False, evicted=())
    found = client.retrieve(bank, unit(3), **digests)
    assert found.queries == [[kvbank.Hit(written.chunk_id, pytest.approx(1.0))]]
    assert found.store_id == client.server_info().store_id
    assert_equal(found.chunks[written.chunk_id], new)
    (fetched,) = client.fetch(bank, [written.chunk_id], reader_digest=digests["reader_digest"])
    assert_equal(fetched, new)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_async_client_does_the_same(
    address: str,
    make_bank: MakeBank,
    make_chunk: Make,
    digests: dict[str, str],
    assert_equal: Check,
    unit: Unit,
    dtype: str,
) -> None:
    bank = make_bank(dtype)
    new = [make_chunk(i, dtype) for i in range(5)]

    async def use() -> None:
        async with kvbank.connect_async(address) as client:
            written = await client.write_many(bank, new, **digests)
            found = await client.retrieve(bank, np.stack([unit(2), unit(4)]), top_k=1, **digests)
            assert [hits[0].chunk_id for hits in found.queries] == [written[2].chunk_id, written[4].chunk_id]
            for i in (2, 4):
                assert_equal(found.chunks[written[i].chunk_id], new[i])
            ids = [result.chunk_id for result in written]
            for chunk, original in zip(
                await client.fetch(bank, ids, reader_digest=digests["reader_digest"]), new, strict=True
            ):
                assert_equal(chunk, original)
            assert [chunk.chunk_id async for chunk in client.list_chunks(bank)] == ids
            assert (await client.write(bank, new[0], **digests)).replayed

    asyncio.run(use())


def test_everything_about_a_chunk_is_kept(
    client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str]
) -> None:
    producer = kvbank.Producer("tova:m=4", "1", "isolated", "", 0.25)
    new = make_chunk(
        1, token_ids=np.arange(9), start=70, text="nine words", metadata={"source": "test"}, producer=producer
    )
    bank = make_bank()
    chunk_id = client.write(bank, new, **digests).chunk_id
    found = client.get_chunk(bank, chunk_id, with_embedding=True)
    assert found.idempotency_key == new.idempotency_key
    assert (found.bank, found.start, found.original_length, found.stored_length) == (bank, 70, 9, 4)
    assert (found.token_ids, found.text, found.metadata) == (tuple(range(9)), "nine words", {"source": "test"})
    assert found.producer == producer
    assert {info.name for info in found.layout} == set(new.tensors or ())
    assert kvbank.TensorInfo("k.1", "bf16", (2, 4, 8), 128) in found.layout
    assert found.tensors is None
    assert found.embedding is not None
    assert np.array_equal(found.embedding, np.asarray(new.embedding))
    assert (found.retrieval_count, found.last_retrieve_time) == (0, None)
    assert found.create_time.tzinfo is not None
    assert client.get_chunk(bank, chunk_id).embedding is None


def test_layers_held_payloads_and_no_payload(
    client: kvbank.Client,
    make_bank: MakeBank,
    make_chunk: Make,
    digests: dict[str, str],
    assert_equal: Check,
    unit: Unit,
) -> None:
    bank, new = make_bank(), [make_chunk(0), make_chunk(1)]
    first, second = (result.chunk_id for result in client.write_many(bank, new, **digests))
    found = client.retrieve(bank, unit(0), layers=[3], **digests)
    assert set(found.chunks[first].tensors or ()) == {"k.3", "v.3", "pos.3"}
    (fetched,) = client.fetch(bank, [first], layers=[1], reader_digest=digests["reader_digest"])
    assert set(fetched.tensors or ()) == {"k.1", "v.1", "pos.1"}

    held = kvbank.Held(found.store_id, {first: found.chunks[first].checksum})
    again = client.retrieve(bank, unit(0), held=held, **digests)
    assert again.chunks[first].tensors is None
    assert_equal(again.chunks[second], new[1])
    other_store = kvbank.Held("0" * 32, held.checksums)
    assert_equal(client.retrieve(bank, unit(0), held=other_store, **digests).chunks[first], new[0])

    bare = client.retrieve(bank, unit(0), payload=False, embedder_digest=digests["embedder_digest"])
    assert [chunk.tensors for chunk in bare.chunks.values()] == [None, None]


def test_counting(
    client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str], unit: Unit
) -> None:
    bank = make_bank()
    chunk_id = client.write(bank, make_chunk(0), **digests).chunk_id
    client.retrieve(bank, unit(0), count=False, **digests)
    client.retrieve(bank, [unit(0), unit(1)], **digests)
    found = client.get_chunk(bank, chunk_id)
    assert found.retrieval_count == 2
    assert found.last_retrieve_time is not None


def test_several_banks_and_a_minimum_score(
    client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str], unit: Unit
) -> None:
    banks = [make_bank(), make_bank()]
    ids = [client.write(bank, make_chunk(i), **digests).chunk_id for i, bank in enumerate(banks)]
    found = client.retrieve(banks, unit(1), **digests)
    assert [hit.chunk_id for hit in found.queries[0]] == [ids[1], ids[0]]
    assert [found.chunks[chunk_id].bank for chunk_id in ids] == banks
    found = client.retrieve(banks, unit(1), min_score=0.5, **digests)
    assert [hit.chunk_id for hit in found.queries[0]] == [ids[1]]


def test_vectors_only(client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, unit: Unit) -> None:
    bank = make_bank(None)
    assert client.get_bank(bank).kv is None
    new = [make_chunk(i, None, text=f"text {i}") for i in range(4)]
    embedder = client.get_bank(bank).embedding.embedder_digest
    ids = [result.chunk_id for result in client.write_many(bank, new, reader_digest="", embedder_digest=embedder)]
    found = client.retrieve(bank, unit(2), top_k=1, payload=False, embedder_digest=embedder)
    assert found.chunks[ids[2]].text == "text 2"
    assert found.chunks[ids[2]].layout == ()


def test_pages_are_hidden(
    client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str]
) -> None:
    bank = make_bank()
    new = [make_chunk(i, tokens=1) for i in range(120)]
    ids = [result.chunk_id for result in client.write_many(bank, new, **digests)]
    listed = list(client.list_chunks(bank, with_embedding=True))
    assert [chunk.chunk_id for chunk in listed] == ids
    assert [chunk.idempotency_key for chunk in listed] == [chunk.idempotency_key for chunk in new]
    assert all(chunk.embedding is not None for chunk in listed)


def test_chunks_are_updated_and_deleted(
    client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str]
) -> None:
    bank = make_bank()
    new = [make_chunk(i, metadata={"old": "yes"}) for i in range(3)]
    ids = [result.chunk_id for result in client.write_many(bank, new, **digests)]
    assert client.update_chunk(bank, ids[0], metadata={"new": "yes"}).metadata == {"new": "yes"}
    assert client.get_chunk(bank, ids[0]).metadata == {"new": "yes"}
    assert client.delete_chunks(bank, [ids[1], ids[2], 2**60]) == 2
    assert [chunk.chunk_id for chunk in client.list_chunks(bank)] == ids[:1]
    gone = client.write(bank, new[1], **digests)
    assert (gone.chunk_id, gone.replayed, gone.gone) == (ids[1], True, True)


def test_threads_share_a_client(
    client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str]
) -> None:
    bank = make_bank()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: client.write(bank, make_chunk(i), **digests), range(40)))
    assert len({result.chunk_id for result in results}) == 40
    assert client.get_bank(bank).usage.chunks == 40
