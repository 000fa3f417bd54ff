"""The forward of training is that of a plain implementation, gradients too, and that of the worker's own window."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model_worker.attaching import attach
from model_worker.train.memlong.block_memory import NOTHING, BlockMemory
from model_worker.train.memlong.blockwise import BlockwiseView, Places, blockwise_logits
from model_worker.train.memlong.encoding import encode_alone
from model_worker.train.memlong.rows import Blocks, Rows
from model_worker.window.cache import MemoryCache
from model_worker.window.encoding import encode, encode_sinks
from model_worker.window.recalled import RecalledChunk
from tests.support.diagonal import rotated
from tests.train.memlong.plain import PlainRow, encoded_alone
from tests.worker.tiny import ListMemory, build, tokens

SIZE, BEFORE, COUNT, POOL = 4, 2, 6, 3
MEMLONG = {"mode": "memlong", "memory_layers": [1], "retrieval_layers": [1, 3]}
BEGINS = (0, 16)  # of two rows in their documents


@dataclass(frozen=True)
class Case:
    """A case says the plan, whether chunks are encoded alone and gradients go through their K-V, and the sinks."""

    plan: dict[str, Any]
    alone: bool
    gradients: bool = False
    positions: str = "near:3"
    sinks: int = 0
    gates: bool = False


CASES = {
    "memlong": Case(MEMLONG, True),
    "memlong zero": Case(MEMLONG, True, positions="zero"),
    "memlong gradients": Case(MEMLONG, True, gradients=True),
    "memlong sinks": Case(MEMLONG, True, sinks=2),
    "memlong gates": Case(MEMLONG, True, gates=True),
    "memlong window": Case(MEMLONG, False, gradients=True, sinks=2),
    "per_layer": Case({"mode": "per_layer"}, False),
    "per_layer gradients": Case({"mode": "per_layer"}, False, gradients=True, positions="zero"),
    "per_layer sinks": Case({"mode": "per_layer"}, False, sinks=2),
}


def rows(case: Case) -> Rows:
    """Return the last blocks of two documents, of which the first begins with its row."""
    document = tokens(BEGINS[1] + COUNT * SIZE, rows=2, seed=3)
    ids = torch.stack([document[row, begin : begin + COUNT * SIZE] for row, begin in enumerate(BEGINS)])
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    return Rows(ids, labels, torch.tensor(BEGINS), document[:, : case.sinks])


def choice() -> tuple[Tensor, Tensor, Tensor]:
    """Return which chunks the blocks attend to: none, some of a pool, some of their own row that left the window.

    The pool of 3 chunks has the first of the second row's document, another of it, and one of elsewhere.
    """
    places = torch.full((2, COUNT, 3), NOTHING)
    offsets, own = torch.zeros_like(places), torch.zeros_like(places, dtype=torch.bool)
    for row, block, slot, chunk in ((0, 3, 0, 0), (0, 4, 0, 1), (0, 5, 1, 2), (0, 5, 2, 0), (1, 4, 2, 0), (1, 5, 0, 2)):
        places[row, block, slot] = POOL + row * COUNT + chunk
        offsets[row, block, slot], own[row, block, slot] = chunk * SIZE, True
    for block, slot, chunk, start in ((0, 0, 0, -16), (0, 1, 1, -8), (1, 0, 1, -8), (3, 1, 0, -16), (4, 0, 2, -100)):
        places[1, block, slot], offsets[1, block, slot], own[1, block, slot] = chunk, start, chunk < 2
    places[0, 4, 2], offsets[0, 4, 2] = 2, -100
    return places.flatten(0, 1), offsets.flatten(0, 1), own.flatten(0, 1)


def pool(net: Any, case: Case, layers: tuple[int, ...]) -> dict[int, tuple[Tensor, Tensor]]:
    """Return K-V of the pool's chunks; the first is the beginning of the second row's document."""
    document = tokens(BEGINS[1] + COUNT * SIZE, rows=2, seed=3)[1]
    ids = torch.stack([document[:SIZE], document[8 : 8 + SIZE], tokens(SIZE, seed=9)[0]])
    with torch.no_grad():
        found = {}
        for layer in layers:
            keys, values = zip(*(encoded_alone(net, chunk, layer) for chunk in ids), strict=True)
            found[layer] = torch.stack(keys), torch.stack(values)
        return found


def gates(case: Case) -> dict[int, Tensor]:
    return {3: torch.tensor([0.3, 0.6, 0.5, 0.8])} if case.gates else {}


def forward(net: Any, attachment: Any, case: Case, own: dict[int, Tensor]) -> Tensor:
    """Return the logits of the code under test."""
    step = rows(case)
    fresh = None
    if case.alone:
        with torch.set_grad_enabled(case.gradients):
            fresh = encode_alone(attachment, step.ids.view(-1, SIZE))
    memory = BlockMemory(*choice(), POOL, pool(net, case, attachment.plan.memory_layers), fresh, case.gradients)
    places = Places(Blocks(SIZE, BEFORE), step, case.positions)
    return blockwise_logits(net, BlockwiseView(attachment, places, memory, own), step)


def plain(net: Any, case: Case, own: dict[int, Tensor]) -> Tensor:
    """Return the same logits, computed plainly."""
    step, (places, offsets, _) = rows(case), choice()
    source = {layer: 1 if case.plan is MEMLONG else layer for layer in range(4)}
    held = pool(net, case, tuple(range(4)))
    logits = []
    for row, begin in enumerate(BEGINS):

        def chunks(block: int, layer: int, of: Any, row: int = row) -> list[Any]:
            found, at = [], row * COUNT + block
            for place, offset in zip(places[at].tolist(), offsets[at].tolist(), strict=True):
                if place < 0:
                    continue
                if place < POOL:
                    keys, values = (part[place] for part in held[source[layer]])
                elif case.alone:
                    ids = step.ids[row, offset : offset + SIZE]
                    keys, values = encoded_alone(net, ids, source[layer])
                else:
                    keys, values, _ = of(source[layer])[offset // SIZE]
                if not case.gradients:
                    keys, values = keys.detach(), values.detach()
                found.append((keys, values, offset))
            return found

        near = int(case.positions[5:]) if case.positions.startswith("near") else None
        retrieval = tuple(case.plan.get("retrieval_layers", range(4)))
        first = tuple(step.sinks[row].tolist())
        made = PlainRow(net, step.ids[row], SIZE, BEFORE, retrieval, chunks, near, begin, first, own)
        logits.append(made.logits())
    return torch.stack(logits)


@pytest.mark.parametrize("name", rotated([*CASES], 0, every=2))
def test_logits_and_gradients_are_those_of_a_plain_implementation(name: str) -> None:
    net, case = build("llama_gqa"), CASES[name]
    net.set_attn_implementation("eager" if name == "per_layer sinks" else "sdpa")
    gradients, outputs = [], []
    labels = rows(case).labels
    for compute in ("blockwise", "plain"):
        net.zero_grad()
        own = {layer: gate.requires_grad_() for layer, gate in gates(case).items()}
        if compute == "plain":
            logits = plain(net, case, own)
        else:
            attachment = attach(net, **case.plan, positions=case.positions)
            logits = forward(net, attachment, case, own)
            attachment.detach()
        functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        gradients.append(found | {f"gate {layer}": gate.grad for layer, gate in own.items()})
        outputs.append(logits.detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for weight, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][weight], rtol=0, atol=1e-5, msg=weight)
    assert all(float(gradient.abs().max()) > 1e-4 for gradient in gradients[0].values())


@pytest.mark.parametrize("name", rotated([name for name, case in CASES.items() if not case.gradients], 1, every=2))
def test_the_worker_computes_the_same(name: str) -> None:
    """Feed the blocks to the worker's own window, which recalls the same chunks.

    The second row goes on with a document whose sinks the window has.
    """
    net, case = build("llama_gqa"), CASES[name]
    step = rows(case)
    attachment = attach(net, **case.plan, positions=case.positions, gates=gates(case))
    with torch.no_grad():
        expected = forward(net, attachment, case, gates(case))
        for row, begin in enumerate(BEGINS):
            port = ListMemory(SIZE, recalls=False)
            cache = MemoryCache(attachment, port, window=(BEFORE + 1) * SIZE, sinks=case.sinks, start=begin)
            if begin and case.sinks:
                encode_sinks(cache, step.sinks[row].tolist())
            for block, ids in enumerate(step.ids[row : row + 1].split(SIZE, 1)):
                cache._make_room(SIZE)  # so that what has left can be recalled
                cache.set_memory([recalled(net, attachment, case, row * COUNT + block, port)])
                at = block * SIZE
                logits = net(ids, past_key_values=cache).logits[0]
                torch.testing.assert_close(logits, expected[row, at : at + SIZE], rtol=0, atol=1e-4)
    attachment.detach()


def recalled(net: Any, attachment: Any, case: Case, block: int, port: ListMemory) -> list[RecalledChunk]:
    """Return the chunks of a block as the worker has them. port: has those of the row that left the window."""
    row, stored, found = block // COUNT, pool(net, case, attachment.plan.memory_layers), []
    for place, offset in zip(*(part[block].tolist() for part in choice()[:2]), strict=True):
        if place >= POOL:
            captured = port.rows[0][offset // SIZE]
            if case.alone:
                captured = encode(attachment, captured.token_ids)
            kept = {layer: (own.keys, own.values) for layer, own in captured.layers.items()}
        else:
            kept = {layer: (keys[place], values[place]) for layer, (keys, values) in stored.items()}
        if place >= 0:
            own = {layer: (*pair, torch.arange(SIZE)) for layer, pair in kept.items()}
            found.append(RecalledChunk(0, BEGINS[row] + offset, own))
    return found
