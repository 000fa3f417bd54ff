"""Other families train with the attention that the worker has for them: logits of blocks are those of its window."""

from typing import Any

import pytest
import torch

from model_worker.attaching import attach
from model_worker.train.memlong.block_memory import NOTHING, BlockMemory
from model_worker.train.memlong.blockwise import BlockwiseView, Places, blockwise_logits
from model_worker.train.memlong.encoding import encode_alone
from model_worker.train.memlong.rows import Blocks, Rows
from model_worker.train.memlong.trainable import freeze_below
from model_worker.window.cache import MemoryCache
from model_worker.window.encoding import encode
from model_worker.window.recalled import RecalledChunk
from tests.worker import zoo
from tests.worker.tiny import ListMemory, tokens

SIZE, BEFORE, COUNT = 4, 2, 5


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_neox", "mistral"])
def test_blocks_are_those_of_the_window(family: str) -> None:
    """Let the last two blocks attend to the first chunks, encoded alone, which have left their windows."""
    net: Any = zoo.build(family)
    attachment = attach(net, mode="memlong", positions="near:3")
    ids = tokens(COUNT * SIZE)
    places = torch.full((COUNT, 2), NOTHING)
    places[3, 1], places[4, 0], places[4, 1] = 0, 0, 1
    rows = Rows(ids, torch.full_like(ids, -100), torch.tensor([0]), ids[:, :0])
    with torch.no_grad():
        fresh = encode_alone(attachment, ids.view(-1, SIZE))
        memory = BlockMemory(places, places.clamp(min=0) * SIZE, places >= 0, 0, {}, fresh)
        view = BlockwiseView(attachment, Places(Blocks(SIZE, BEFORE), rows, "near:3"), memory)
        found = blockwise_logits(net, view, rows)[0]
        cache = MemoryCache(attachment, ListMemory(SIZE, recalls=False), window=SIZE * (BEFORE + 1), sinks=0)
        for block, part in enumerate(ids.split(SIZE, 1)):
            chunks = []
            for place in places[block][places[block] >= 0].tolist():
                own = encode(attachment, ids[0, place * SIZE : (place + 1) * SIZE].tolist()).layers
                layers = {n: (each.keys, each.values, torch.arange(SIZE)) for n, each in own.items()}
                chunks.append(RecalledChunk(place, place * SIZE, layers))
            cache.set_memory([chunks])
            logits = net(part, past_key_values=cache).logits[0]
            torch.testing.assert_close(found[block * SIZE : (block + 1) * SIZE], logits, rtol=0, atol=1e-4)
    attachment.detach()
    freeze_below(net, 2)
    assert {
        name.split(".layers.")[1][0] for name, p in net.named_parameters() if p.requires_grad and "layers" in name
    } == {str(layer) for layer in range(2, net.config.num_hidden_layers)}
