"""Chunks of a stream that is a conversation: they end before given offsets, and go on behind a part that is gone."""

from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import PreTrainedModel

import kvbank
from model_worker.model import MemoryModel
from model_worker.window.cache import MemoryCache
from model_worker.window.chunking import chunks
from tests.worker.test_reading import STOPS, tokenizer
from tests.worker.tiny import bank, tokens

Models = Callable[[str], PreTrainedModel]
CHUNK, WINDOW = 8, 24


def feed(cache: MemoryCache, ids: Sequence[int]) -> None:
    with torch.no_grad():
        for piece in chunks(ids, CHUNK):
            cache.attachment.decoder(input_ids=torch.tensor([piece]), past_key_values=cache, use_cache=True)


def stored(model: MemoryModel) -> list[tuple[int, list[int]]]:
    """Return the offset and the tokens of each chunk in the model's bank."""
    listed = model.client.list_chunks(str(model.memory.bank))
    return sorted((chunk.start, list(chunk.token_ids)) for chunk in listed)


@pytest.fixture
def worker(client: kvbank.Client, model: Models) -> MemoryModel:
    return MemoryModel(model("llama_gqa"), tokenizer(), memory=client, bank=bank(), chunk=CHUNK, window=WINDOW, sinks=2)


def test_pieces_end_before_a_cut_and_else_at_sentences() -> None:
    ids, stops = list(range(20)), frozenset({6, 13})
    assert [len(piece) for piece in chunks(ids, 8, stops, [3, 5, 16])] == [3, 2, 8, 3, 4]
    assert [len(piece) for piece in chunks(ids, 8, cuts=[0, 8, 20, 30])] == [8, 8, 4]


def test_chunks_end_where_the_stream_is_cut(worker: MemoryModel) -> None:
    ids, cuts = tokens(60)[0].tolist(), [3, 20, 21, 40]
    with worker:
        cache = worker.cache()
        cache.cuts.update(cuts[:2])
        feed(cache, ids[:21])
        cache.cuts.update(cuts[2:])
        feed(cache, ids[21:])
        cache.flush()
        wanted = [len(piece) for piece in chunks(ids, CHUNK, frozenset(STOPS), cuts)]
        assert stored(worker) == [
            (begin, ids[begin : begin + length])
            for begin, length in zip([sum(wanted[:at]) for at in range(len(wanted))], wanted, strict=True)
        ]


@pytest.mark.parametrize("restored", [False, True])
def test_a_stream_goes_on_behind_a_part_that_is_gone(worker: MemoryModel, restored: bool) -> None:
    """Offsets have the hole, positions have none; a window that comes back has it too."""
    ids = tokens(60)[0].tolist()
    with worker:
        cache = worker.cache()
        cache.skip(10)  # before the first token: the stream begins later
        feed(cache, ids[:13])
        cache.skip(100)
        feed(cache, ids[13:20])
        if restored:
            state, start = cache.state(), cache.columns.first_offset
            cache = MemoryCache(worker.attachment, worker.memory, window=WINDOW, start=start, sinks=2, ends=worker.ends)
            cache.restore(state)
            cache.cuts.add(23)
        positions = cache.columns.positions[0].tolist()
        assert positions == list(range(positions[0], positions[0] + len(positions)))
        feed(cache, ids[20:40])
        cache.skip(7)
        feed(cache, ids[40:])
        cache.flush()
        at = dict(zip([*range(10, 23), *range(123, 150), *range(157, 177)], ids, strict=True))
        found = stored(worker)
        assert {start + place: token for start, own in found for place, token in enumerate(own)} == at
        assert sum(len(own) for _, own in found) == 60
